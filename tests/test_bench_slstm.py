"""statefeed bench layers --cells=slstm: its rivals, which are not torch.nn's, and what the records say."""

import json

import pytest
import torch
from torch import nn

import statefeed as sf
from statefeed.bench import case as cases
from statefeed.bench import layers, main, measure
from statefeed.bench.options import OptionError, Shape
from statefeed.bench.slstm_rivals import Loop

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile's own


@pytest.fixture(autouse=True)
def one_thread_and_no_compiler(monkeypatch):
    """The step is traced as torch.compile does it, and runs without a compiler."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **options: compiled(step, backend="eager", **options))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_loop_is_the_recurrence_with_a_dense_matrix_and_no_stabilizer():
    torch.manual_seed(0)
    H, heads, T, B = 8, 2, 6, 3
    layer = sf.SLSTM(5, H, num_heads=heads).double()
    for weight in layer.parameters():
        nn.init.normal_(weight, std=0.5)
    loop = Loop(layer, compiled=True)
    x = torch.randn(T, B, 5, dtype=torch.float64)
    y, (h, c, n, m) = loop(x)

    R = torch.stack([torch.block_diag(*gate.split(H // heads)) for gate in layer.weight_hh_l0.split(H)])
    state, cell, norm, expected = *(torch.zeros(3, B, H, dtype=torch.float64)), []
    for row in x:
        pre = row @ layer.weight_ih_l0.T + layer.bias_ih_l0 + layer.bias_hh_l0 + torch.cat([state @ r.T for r in R], 1)
        i, f, z, o = pre.chunk(4, 1)
        cell = torch.sigmoid(f) * cell + i.exp() * torch.tanh(z)
        norm = torch.sigmoid(f) * norm + i.exp()
        state = torch.sigmoid(o) * cell / norm
        expected.append(state)
    expected = torch.stack(expected)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.stack([h, c * m.exp(), n * m.exp()]), torch.stack([state, cell, norm]))
    grad = torch.randn_like(y)
    names = [name for name, _ in layer.named_parameters()]
    found = torch.autograd.grad(y, [loop.get_parameter(name) for name in names], grad)
    truth = torch.autograd.grad(expected, [layer.get_parameter(name) for name in names], grad)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", layers.DTYPES["cpu"])
def test_parity_holds_for_every_contender(dtype, monkeypatch):
    monkeypatch.setattr(cases, "missing_package", lambda: "not here")
    case = layers.Case("slstm", Shape(20, 3, 24), dtype, "cpu")
    entries = layers.contenders(case, ["bptt", "dsf", "gate+1"], measure.float32_settings("cpu"))
    found = layers.check_parity(case, entries)
    assert list(found) == ["torch.compile step", "statefeed bptt", "statefeed dsf", "statefeed gate+1"]
    assert found["torch.compile step"].keys() == {"output"}
    assert found["statefeed dsf"].keys() == {"output", "corrected"}
    for entry in entries:
        assert len(entry.once(case.data(4))) == 2


def test_parity_catches_a_planted_error(tmp_path, capsys, monkeypatch):
    right = Loop.forward

    def wrong(self, x):
        y, states = right(self, x)
        return y.roll(1, 2), states

    monkeypatch.setattr(Loop, "forward", wrong)
    output = tmp_path / "records.jsonl"
    flags = ["layers", "--smoke", "--cells=slstm", "--rules=bptt", "--dtypes=float32", f"--output={output}"]
    assert main(flags) == 1
    assert "the output y of statefeed bptt must agree with float64" in capsys.readouterr().err
    assert not output.exists()


def test_records_have_the_rivals_that_are_there_and_name_the_one_that_is_not(tmp_path, capsys, monkeypatch):
    for module in (cases, layers):
        monkeypatch.setattr(module, "missing_package", lambda: "it is not installed")
    output = tmp_path / "records.jsonl"
    flags = ["--cells=gru,slstm", "--rules=gate+1", "--dtypes=float32", f"--output={output}"]
    assert main(["layers", "--smoke", *flags]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("layers: no rows of the xlstm package: it is not installed") == 1
    assert "x compiled step" in printed.out
    records = [json.loads(line) for line in output.read_text().splitlines()]
    for r in records:
        ours = r["cell"] == "slstm"
        assert (
            ("torch.compile" in r["times_faster_than"])
            == ours
            == ("torch.nn at its best" not in r["times_faster_than"])
        )
        assert (r["torch_nn_best"] is None) == ours
    found = {(r["implementation"], r["variant"]) for r in records if r["cell"] == "slstm"}
    assert found == {("torch.compile", "step"), ("statefeed", "gate+1")}
    assert output.with_suffix(".png").stat().st_size > 1000


def test_the_products_of_a_head_are_counted():
    case = layers.Case("slstm", Shape(9, 3, 8), "float32", "cpu")
    # Of 27 rows: three products with (8, 32) and two with four blocks of (2, 8).
    assert case.flops == 2 * 27 * (3 * 8 * 32 + 2 * 4 * 2 * 8)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"packed": True}, "slstm is measured as one layer of one direction on dense input"),
        ({"layers": 2}, "slstm is measured as one layer"),
        ({"shapes": "4x2x6"}, "the widths of slstm must be multiples of 4, got 4x2x6"),
    ],
)
def test_user_errors(options, sentence):
    with pytest.raises(OptionError, match=sentence):
        layers.Options(cells="slstm", **options)
