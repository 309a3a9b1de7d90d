"""Steps of a user's cell: split at the input, as torch's cells are, and compiled."""

import copy
import pickle

import pytest
import torch
from torch import nn

import statefeed as sf

pytestmark = pytest.mark.filterwarnings("ignore:feedback .* passes no gradient")  # tests/test_custom_parts.py

T, B, I, H = 6, 3, 4, 5


class SplitGRUCell(nn.Module):
    """A GRU cell with layer norm, written in one piece and in two."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.input = nn.Linear(input_size, 3 * hidden_size)
        self.hidden = nn.Linear(hidden_size, 3 * hidden_size)
        self.norm = nn.LayerNorm(3 * hidden_size)  # in both parts
        self.projections: list[int] = []  # rows of every call

    def project_input(self, x: torch.Tensor) -> torch.Tensor:
        self.projections.append(len(x))
        return self.norm(self.input(x))

    def step(self, inputs: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        x_r, x_z, x_n = inputs.chunk(3, -1)
        h_r, h_z, h_n = self.norm(self.hidden(h)).chunk(3, -1)
        z = torch.sigmoid(x_z + h_z)
        return (1 - z) * torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n) + z * h

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return self.step(self.norm(self.input(x)), h)


class WholeGRUCell(SplitGRUCell):
    project_input = None  # type: ignore[assignment]


CELLS = {
    "split": lambda: SplitGRUCell(I, H),
    "rnn": lambda: nn.RNNCell(I, H),
    "relu": lambda: nn.RNNCell(I, H, nonlinearity="relu"),
    "gru": lambda: nn.GRUCell(I, H),
    "lstm": lambda: nn.LSTMCell(I, H),
    "no bias": lambda: nn.LSTMCell(I, H, bias=False),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return CELLS[name]().double()


def loop(cell: nn.Module, x: torch.Tensor, states: list[torch.Tensor]) -> list[torch.Tensor]:
    """The outputs and the final state of the cell, called as a whole."""
    outputs = []
    for step in x:
        after = cell(step, states[0] if len(states) == 1 else tuple(states))
        states = [after] if isinstance(after, torch.Tensor) else list(after)
        outputs.append(states[0])
    return [torch.stack(outputs), *states]


def run(layer: sf.Recurrent, x: torch.Tensor, states: list[torch.Tensor]) -> list[torch.Tensor]:
    y, final = layer(x, states[0] if len(states) == 1 else tuple(states))
    return [y, *([final] if isinstance(final, torch.Tensor) else final)]


def with_gradients(function, module: nn.Module, steps: int = T, batch: int = B) -> list[torch.Tensor]:
    """Outputs, and the gradients of a random linear loss for x, the initial state and the parameters."""
    generator = torch.Generator().manual_seed(1)
    widths = [H, H] if isinstance(getattr(module, "cell", module), nn.LSTMCell) else [H]
    shapes = [(steps, batch, I), *((batch, width) for width in widths)]
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    outputs = function(module, leaves[0], leaves[1:])
    loss = sum((y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum() for y in outputs)
    return outputs + list(torch.autograd.grad(loss, [*leaves, *module.parameters()]))


def largest_difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("rule", ["bptt", "torch", f"0.3+{T}", f"jacobian+{T}", f"ft-bptt+{T}"])
@pytest.mark.parametrize("name", CELLS)
def test_a_split_cell_has_the_outputs_and_gradients_of_the_whole_one(name: str, rule: str) -> None:
    cell = make(name)
    ours = with_gradients(run, sf.Recurrent(cell, rule))
    assert largest_difference(ours, with_gradients(loop, cell)) < 1e-9


@pytest.mark.parametrize("rule", ["dsf", "0.5+2", "ft-bptt"])
def test_a_split_cell_has_the_approximate_gradients_of_the_whole_one(rule: str) -> None:
    whole = WholeGRUCell(I, H).double()
    whole.load_state_dict(make("split").state_dict())
    ours = with_gradients(run, sf.Recurrent(make("split"), rule))
    assert largest_difference(ours, with_gradients(run, sf.Recurrent(whole, rule))) < 1e-9


def test_the_input_is_projected_once_for_all_steps() -> None:
    cell = make("split")
    for rule in ("bptt", "dsf"):
        cell.projections.clear()
        with_gradients(run, sf.Recurrent(cell, rule))
        assert cell.projections == [T * B]


@pytest.mark.parametrize("rule", ["bptt", "dsf"])
def test_a_wrong_split_is_seen(rule: str) -> None:
    class Wrong(SplitGRUCell):
        def project_input(self, x: torch.Tensor) -> torch.Tensor:
            return 1.001 * self.norm(self.input(x))

    torch.manual_seed(0)
    cell = Wrong(I, H).double()
    ours = with_gradients(run, sf.Recurrent(cell, rule))
    assert largest_difference(ours[:1], with_gradients(loop, cell)[:1]) > 1e-5
    with pytest.raises(ValueError, match=r"^Wrong: step\(project_input\(x\), state\) must equal forward\(x, state\)"):
        sf.Recurrent(cell, rule).check(torch.randn(T, B, I, dtype=torch.float64))


def test_a_cell_with_hooks_or_another_forward_is_called_as_a_whole() -> None:
    seen = []
    cell = make("gru")
    handle = cell.register_forward_hook(lambda *_: seen.append(1))
    layer = sf.Recurrent(cell, "dsf")
    layer(torch.randn(T, B, I, dtype=torch.float64))
    assert len(seen) == T
    handle.remove()

    class Doubled(nn.GRUCell):
        def forward(self, x: torch.Tensor, h: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(x, super().forward(x, h))

    doubled = Doubled(I, H, dtype=torch.float64)
    assert largest_difference(with_gradients(run, sf.Recurrent(doubled)), with_gradients(loop, doubled)) < 1e-9


@pytest.mark.parametrize(("returned", "got"), [(torch.zeros(B, H), r"\(3, 5\)"), (None, "NoneType")])
def test_project_input_must_return_one_row_for_each_row(returned: object, got: str) -> None:
    cell = make("split")
    cell.project_input = lambda x: returned  # type: ignore[assignment]
    with pytest.raises(ValueError, match=rf"project_input must return a tensor .* \(18, \.\), got {got}$"):
        sf.Recurrent(cell)(torch.zeros(T, B, I, dtype=torch.float64))


@pytest.mark.parametrize("name", ["split", "gru", "lstm"])
def test_autocast_and_an_empty_batch(name: str) -> None:
    for rule in ("bptt", "dsf"):
        layer = sf.Recurrent(make(name).float(), rule)
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = layer(torch.randn(T, B, I))
        y.float().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
        y, _ = layer(torch.zeros(T, 0, I))
        assert y.shape == (T, 0, H)


# A compiled step ------------------------------------------------------------------------------------------------------

# torch hides it from everyone who does not turn warnings into errors.
HIDDEN = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def counting(graphs: list[object]):
    """A backend of ``torch.compile`` that runs the graph as it is and counts it."""

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    yield
    torch._dynamo.reset()


@HIDDEN
@pytest.mark.parametrize("rule", ["bptt", "dsf", f"0.3+{T}"])
@pytest.mark.parametrize("name", ["split", "gru", "lstm"])
def test_a_compiled_step_has_the_same_outputs_and_gradients(name: str, rule: str) -> None:
    cell, graphs = make(name), []
    ours = with_gradients(run, sf.Recurrent(cell, rule, compile_step={"backend": counting(graphs)}))
    assert len(graphs) == 1
    assert largest_difference(ours, with_gradients(run, sf.Recurrent(cell, rule))) < 1e-12


@pytest.mark.parametrize("rule", ["bptt", "dsf"])
def test_a_step_is_compiled_once_whatever_the_number_of_steps(rule: str) -> None:
    graphs: list[object] = []
    layer = sf.Recurrent(WholeGRUCell(I, H), rule, compile_step={"backend": counting(graphs)})
    sizes = []
    for steps in (1, T, 40):
        layer(torch.randn(steps, B, I))[0].sum().backward()
        sizes.append(len(graphs[0].graph.nodes))
    assert len(graphs) == 1
    assert len(set(sizes)) == 1
    for batch in (B + 1, B + 2, B + 5):  # the second batch size makes the code take any
        layer(torch.randn(T, batch, I))[0].sum().backward()
    assert len(graphs) == 2


def test_a_cell_that_cannot_be_compiled_raises_its_own_error() -> None:
    class Printing(WholeGRUCell):
        def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return super().forward(x, h)

    layer = sf.Recurrent(Printing(I, H), "dsf", compile_step={"backend": "eager"})
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        layer(torch.randn(T, B, I))
    layer.compile_step = False
    layer(torch.randn(T, B, I))


def test_many_cells_do_not_share_a_limit_of_recompilations() -> None:
    for hidden_size in range(1, 13):
        layer = sf.Recurrent(nn.GRUCell(I, hidden_size), "dsf", compile_step={"backend": "eager"})
        layer(torch.randn(2, B, I))


@HIDDEN
def test_an_outer_compiler_does_not_unroll_a_compiled_step() -> None:
    inner: list[object] = []
    outer: list[object] = []
    layer = sf.Recurrent(make("gru"), "dsf", compile_step={"backend": counting(inner)})
    model = torch.compile(nn.ModuleList([layer])[0], backend=counting(outer))
    x = torch.randn(T, B, I, dtype=torch.float64)
    torch.testing.assert_close(model(x)[0], layer(x)[0])
    assert len(inner) == 1
    assert all(len(graph.graph.nodes) < 3 * T for graph in outer)


def test_a_layer_with_a_compiled_step_is_copied_and_pickled() -> None:
    layer = sf.Recurrent(nn.GRUCell(I, H), "dsf", compile_step={"backend": "eager"})
    x = torch.randn(T, B, I)
    expected = layer(x)[0]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(x)[0], expected)
    assert "compile_step={'backend': 'eager'}" in repr(layer)
    assert list(layer.state_dict()) == ["cell.weight_ih", "cell.weight_hh", "cell.bias_ih", "cell.bias_hh"]
