"""statefeed bench digits: the pixels, the parts of the data, and the error without scikit-learn."""

import importlib.util
import json

import pytest
import torch

from statefeed.bench import digits, main
from statefeed.bench.long_memory_options import DigitsOptions
from statefeed.bench.options import OptionError

needs_sklearn = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="the extra statefeed[examples] is not installed"
)


def test_pictures_are_enlarged_by_repeating_pixels():
    pictures = torch.arange(2 * 64.0).view(2, 8, 8)
    large = digits.enlarge(pictures, 32)
    assert large.shape == (2, 32, 32)
    for row, column in ((0, 0), (3, 4), (17, 31), (31, 12)):
        assert torch.equal(large[:, row, column], pictures[:, row // 4, column // 4])


@needs_sklearn
def test_the_parts_are_fixed_disjoint_and_have_every_digit_in_equal_shares():
    from sklearn.datasets import load_digits

    split = digits.read(64)
    assert [len(part.target) for part in split] == [1077, 360, 360]
    counts = torch.stack([part.target.bincount(minlength=10) / len(part.target) for part in split])
    assert float((counts - counts[0]).abs().max()) < 0.01
    images = torch.from_numpy(load_digits().images).float().flatten(1)
    together = torch.cat([(part.x[..., 0].T + 1) * 8 for part in split])
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, images.tolist()))  # each picture once
    again = digits.read(64)
    assert all(torch.equal(a.target, b.target) and torch.equal(a.x, b.x) for a, b in zip(split, again, strict=True))


@needs_sklearn
def test_a_rate_is_chosen_on_the_validation_part_and_scores_are_of_the_test_part():
    task, generator = digits.Digits(256), torch.Generator().manual_seed(0)
    assert task.held_out(True, generator) is task.split.valid
    assert task.held_out(False, generator) is task.split.test
    x, target = task.draw(50, generator)
    known = {
        (tuple(column), int(digit))
        for column, digit in zip(task.split.train.x[..., 0].T.tolist(), task.split.train.target, strict=True)
    }
    assert x.shape == (256, 50, 1)
    assert all((tuple(column), int(digit)) in known for column, digit in zip(x[..., 0].T.tolist(), target, strict=True))


@needs_sklearn
def test_smoke(tmp_path):
    output = tmp_path / "records.jsonl"
    assert main(["digits", "--smoke", "--rules=dsf,bptt", f"--output={output}"]) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(r["bench"], r["variant"], r["T"], r["H"]) for r in records] == [
        ("digits", "dsf", 64, 8),
        ("digits", "bptt", 64, 8),
    ]
    assert all(r["curve"][-1][:2] == [4, r["accuracy"]] for r in records)


@needs_sklearn
def test_another_length_is_an_error():
    with pytest.raises(OptionError, match="length must be among 64, 256, 1024, got 100"):
        DigitsOptions(length=100)


def test_a_missing_package_is_one_sentence(monkeypatch, capsys, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))
    assert main(["digits", "--smoke", f"--output={tmp_path}/records.jsonl"]) == 2
    assert capsys.readouterr().err == (
        'statefeed bench: digits needs scikit-learn, which is not installed: pip install "statefeed[examples]"\n'
    )
