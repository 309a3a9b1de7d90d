"""The measurement of the table of paths: what it runs, and what it calls slower."""

import json

import pytest
import torch

from statefeed import native as kernels
from statefeed.bench import paths
from statefeed.bench.options import Shape

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"no kernels: {kernels.unavailable()}")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_form_is_written_as_a_record(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(paths, "SECONDS", 0.0)
    output = tmp_path / "paths.jsonl"
    flags = ["--cells=gru,lstm", "--dtypes=float32", f"--forms={','.join(paths.FORMS)}", "--shapes=1x2x8,30x2x8"]
    code = paths.main([*flags, "--repeats=5", f"--output={output}"])
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(records) == 2 * 4 * 2 * 2
    assert code == int(any(r["slower"] for r in records))
    assert {("torch.nn" in r["path"], r["T"]) for r in records} == {(True, 1), (False, 30)}
    assert all({"bptt", "kernels", "torch.nn as shipped"} <= r["ms"].keys() for r in records)
    for record in records:
        settings = {name.removeprefix("torch.nn ") for name in record["ms"] if name.startswith("torch.nn")}
        ours = {name.removeprefix("bptt ") for name in record["ms"] if name.startswith("bptt")}
        assert ours == ({"bptt"} | settings - {"as shipped"} if "torch.nn" in record["path"] else {"bptt"})
        assert record["times_faster"].keys() == {"bptt", "bptt as shipped", "kernels"}
    assert all(r["threads"] == 1 and r["command"].startswith("python -m statefeed.bench.paths") for r in records)
    assert f"of {len(records)} cases are slower" in capsys.readouterr().out


def test_a_projection_is_measured_and_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "SECONDS", 0.0)
    output = tmp_path / "paths.jsonl"
    flags = ["--cells=lstm", "--projection=3", "--dtypes=float32", "--passes=training", "--shapes=30x2x8"]
    paths.main([*flags, "--repeats=5", f"--output={output}"])
    (record,) = [json.loads(line) for line in output.read_text().splitlines()]
    assert record["projection"] == 3
    assert "kernels" in record["path"]
    case = paths.Case("lstm", "float32", "padded", "training", Shape(30, 2, 8), 3)
    assert case.layer(torch.nn.LSTM).weight_hr_l0.shape == (3, 8)


@pytest.mark.parametrize(("ours", "slower"), [(1.0, False), (1.01, False), (1.2, True)])
def test_slower_means_both_by_ratio_and_by_time(ours, slower, monkeypatch):
    turns = {"torch.nn as shipped": [(1e-3,)] * 5, "bptt": [(ours * 1e-3,)] * 5, "kernels": [(2e-3,)] * 5}
    monkeypatch.setattr(paths, "interleaved", lambda *_: turns)
    case = paths.Case("gru", "float32", "padded", "training", Shape(5, 2, 8))
    assert paths.measure(case, 5)["slower"] == slower
    # Ten times slower, but by a microsecond a call.
    monkeypatch.setattr(paths, "interleaved", lambda *_: {n: [(1e-7,)] * 5 for n in turns} | {"bptt": [(1e-6,)] * 5})
    assert not paths.measure(case, 5)["slower"]


@pytest.mark.parametrize("again", [1e-3, 1.2e-3])
def test_what_seems_slower_is_measured_again_for_longer(again, monkeypatch):
    rounds = []

    def turns(_contenders, count):
        rounds.append(count)
        ours = again if len(rounds) > 1 else 1.2e-3
        return {"torch.nn as shipped": [(1e-3,)] * count, "bptt": [(ours,)] * count, "kernels": [(2e-3,)] * count}

    monkeypatch.setattr(paths, "interleaved", turns)
    record = paths.measure(paths.Case("gru", "float32", "padded", "training", Shape(5, 2, 8)), 5)
    assert rounds == [5, 5 * paths.AGAIN]
    assert (record["slower"], record["repeats"]) == (again > 1e-3, 5 * paths.AGAIN)


@pytest.mark.parametrize(
    "flags",
    [
        ["--cells=mgu"],
        ["--repeats=1"],
        ["--shapes=5x5"],
        ["--forms=ragged"],
        ["--projection=2"],
        ["--cells=lstm", "--projection=8", "--shapes=5x5x8"],
    ],
)
def test_invalid_flags_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as error:
        paths.main(flags)
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err
