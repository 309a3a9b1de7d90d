"""torchrecurrent: every cell that takes (x, state) runs unmodified in Recurrent, with the gradients of its own loop."""

import gzip

import pytest
import torch

import statefeed as sf

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]
torchrecurrent = pytest.importorskip("torchrecurrent", reason="run `make interop`")

from interop import torchrecurrent_table, torchrecurrent_tasks  # noqa: E402 - it imports the package

T, B, I, H = 5, 3, 4, 6
CELLS = sorted(name for name in torchrecurrent.__all__ if name.endswith("Cell"))
# Their output is not part of the state: cell(x, state) = (output, state').
WITH_OUTPUT = ["IntersectionRNNCell", "MCLSTMCell", "TLSTMCell"]
STATE_CELLS = [name for name in CELLS if name not in WITH_OUTPUT]
NUMBER_OF_CELLS = 38


def make(name):
    """A cell in float64 with random parameters, zeros included, and the widths of its state."""
    torch.manual_seed(0)
    cell = getattr(torchrecurrent, name)(H if name == "IntersectionRNNCell" else I, H).double()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.normal_(std=0.4)
    if not cell.uses_double_state():
        return cell, (H,)
    return cell, (H, I if name in ("TGRUCell", "TLSTMCell") else H)  # typed cells keep the previous input


def recurrent(cell, widths, **arguments):
    return sf.Recurrent(cell, state_size=widths if len(widths) > 1 else widths[0], **arguments)


def data(widths):
    generator = torch.Generator().manual_seed(1)
    x, *states = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((T, B, I), *((B, width) for width in widths))
    )
    return x, states


def own_loop(cell, x, states):
    """The package's loop over its cell: the outputs and the final state."""
    outputs = []
    for step in x:
        after = cell(step, states[0] if len(states) == 1 else tuple(states))
        states = [after] if isinstance(after, torch.Tensor) else list(after)
        outputs.append(states[0])
    return [torch.stack(outputs), *states]


def layer_outputs(layer, x, states):
    y, final = layer(x, states[0] if len(states) == 1 else tuple(states))
    return [y, *([final] if isinstance(final, torch.Tensor) else final)]


def with_gradients(function, parameters, x, states):
    """Outputs, and the gradients of a random linear loss for x, the initial state and the parameters."""
    leaves = [t.clone().requires_grad_() for t in (x, *states)]
    outputs = function(leaves[0], leaves[1:])
    generator = torch.Generator().manual_seed(2)
    loss = sum((y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum() for y in outputs)
    return outputs + list(torch.autograd.grad(loss, leaves + parameters, materialize_grads=True))


def differences(name, rule, corrupt=None, **arguments):
    """The largest difference of every output and gradient, relative to the largest value of the package's."""
    cell, widths = make(name)
    x, states = data(widths)
    parameters = list(cell.parameters())
    theirs = with_gradients(lambda x, states: own_loop(cell, x, states), parameters, x, states)
    layer = recurrent(cell, widths, feedback=rule, **arguments)
    if corrupt is not None:
        corrupt(cell)
    ours = with_gradients(lambda x, states: layer_outputs(layer, x, states), parameters, x, states)
    return [
        float((a - b).detach().abs().max() / b.detach().abs().max().clamp_min(1e-12))
        for a, b in zip(ours, theirs, strict=True)
    ]


def test_the_number_of_cells():
    assert len(STATE_CELLS) == NUMBER_OF_CELLS, STATE_CELLS
    assert len(CELLS) == NUMBER_OF_CELLS + len(WITH_OUTPUT)


@pytest.mark.parametrize("rule", [f"0.3+{T}", f"jacobian+{T}", "bptt"])
@pytest.mark.parametrize("name", STATE_CELLS)
def test_forward_and_gradients_equal_those_of_its_own_loop(name, rule):
    assert max(differences(name, rule)) < 1e-9


@pytest.mark.parametrize("name", STATE_CELLS)
def test_an_error_of_a_thousandth_in_a_parameter_is_seen(name):
    def corrupt(cell):
        with torch.no_grad():
            next(cell.parameters()).mul_(1.001)

    assert max(differences(name, f"0.3+{T}", corrupt)) > 1e-6


@pytest.mark.parametrize("name", STATE_CELLS)
def test_no_correction_differs(name):
    assert max(differences(name, "0.3")) > 1e-6


@pytest.mark.parametrize("name", WITH_OUTPUT)
def test_a_cell_with_a_separate_output_raises(name):
    cell, widths = make(name)
    x, states = data(widths)
    x = torch.randn(T, B, cell.input_size, dtype=torch.float64)
    with pytest.raises(ValueError, match="must return only its next state"):
        layer_outputs(recurrent(cell, widths), x, states)


# Cells whose units depend on themselves only.
DIAGONAL = ["BRCell", "IndRNNCell", "TRNNCell"]


def has_diagonal_jacobian(name):
    cell, widths = make(name)
    x, states = data(widths)
    layer, state = recurrent(cell, widths, diagonal_jacobian=True), states[0] if len(states) == 1 else tuple(states)
    try:
        layer.check(x, state)
    except ValueError as error:
        return "has no diagonal Jacobian" not in str(error)
    return True


def test_the_cells_with_a_diagonal_jacobian():
    assert [name for name in STATE_CELLS if has_diagonal_jacobian(name)] == DIAGONAL


@pytest.mark.parametrize("name", DIAGONAL)
def test_a_diagonal_cell_is_exact_in_one_scan(name):
    assert max(differences(name, "bptt", diagonal_jacobian=True)) < 1e-9


@pytest.mark.parametrize("name", [name for name in STATE_CELLS if name not in DIAGONAL])
def test_a_wrong_promise_of_a_diagonal_jacobian_changes_the_gradients(name):
    assert max(differences(name, "bptt", diagonal_jacobian=True)) > 1e-6


# The package's tasks ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["penn_treebank", "sequential_mnist"])
def task(request, tmp_path):
    """A small task of its kind, through the package's own loader."""
    generator = torch.Generator().manual_seed(0)
    if request.param == "penn_treebank":
        for split, lines in (("train", 200), ("valid", 40)):
            words = torch.randint(0, 20, (lines, 8), generator=generator)
            text = "\n".join(" ".join(f"w{word}" for word in line) for line in words.tolist())
            (tmp_path / f"ptb.{split}.txt").write_text(text)
    else:
        for split, images in (("train", 128), ("t10k", 10)):
            for name, values in (
                ("images-idx3", torch.randint(0, 256, (images, 28, 28), generator=generator)),
                ("labels-idx1", torch.randint(0, 10, (images,), generator=generator)),
            ):
                sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
                content = bytes([0, 0, 8, values.dim()]) + sizes + values.to(torch.uint8).numpy().tobytes()
                (tmp_path / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
    return torchrecurrent_tasks.TASKS[request.param](tmp_path)


@pytest.mark.parametrize("cell", ["MGU", "IndRNN", "PeepholeLSTM"])
def test_its_tasks_train_with_recurrent_in_place_of_its_loop(task, cell):
    record = torchrecurrent_tasks.measure(task, cell, ["bptt", "dsf"], torchrecurrent_tasks.Sizes(8, 2, 2))
    assert record["losses"]["bptt"] == pytest.approx(record["losses"]["torchrecurrent"], rel=1e-4)
    assert record["scores"]["bptt"] == pytest.approx(record["scores"]["torchrecurrent"], rel=1e-3)
    assert record["times_faster"].keys() == {"bptt", "dsf"}


def test_the_newest_record_of_a_task_is_in_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(torchrecurrent_table, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(torchrecurrent_table, "PAGE", tmp_path / "page.md")
    marks = f"{torchrecurrent_table.BEGIN}\n{torchrecurrent_table.END}"
    torchrecurrent_table.PAGE.write_text(f"above\n{marks}\nbelow\n")

    spread = {"median": 2.0, "min": 1.0, "max": 3.0}
    for score in (0.1, 0.3):
        record = {
            "package": "torchrecurrent",
            "task": "sequential_mnist",
            "data": "digits",
            "model": "MGU",
            "cpu": "Zen",
            "shape": "784x64x8",
            "batches": 5,
            "score": "accuracy",
            "scores": {"torchrecurrent": 0.2, "dsf": score},
            "step_ms": {"torchrecurrent": spread, "dsf": spread},
            "times_faster": {"dsf": spread},
        }
        torchrecurrent_table.append("machine", record)
    page = torchrecurrent_table.PAGE.read_text()
    assert page.startswith("above\n")
    assert page.endswith("below\n")
    assert "| `dsf` | 2.00 (1.00 to 3.00) | accuracy 0.2, 0.3 | Zen |" in page
    assert page.count("sequential_mnist") == 1
