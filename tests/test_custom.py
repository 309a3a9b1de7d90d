"""Recurrent with custom cells: autograd BPTT with enough corrections, and equality with the built-in layers."""

import copy

import pytest
import torch
from torch import nn

import statefeed as sf

pytestmark = pytest.mark.filterwarnings("ignore:feedback .* passes no gradient")  # tests/test_custom_parts.py


class LayerNormGRUCell(nn.Module):
    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.input = nn.Linear(input_size, 3 * hidden_size)
        self.hidden = nn.Linear(hidden_size, 3 * hidden_size)
        self.norm_input = nn.LayerNorm(3 * hidden_size)
        self.norm_hidden = nn.LayerNorm(3 * hidden_size)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        x_r, x_z, x_n = self.norm_input(self.input(x)).chunk(3, -1)
        h_r, h_z, h_n = self.norm_hidden(self.hidden(h)).chunk(3, -1)
        z = torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
        return (1 - z) * n + z * h


class LiGRUCell(nn.Module):
    """Light GRU (Ravanelli et al., 2018): no reset gate, relu candidate; layer norm where the paper has batch norm."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.input = nn.Linear(input_size, 2 * hidden_size, bias=False)
        self.hidden = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.norm = nn.LayerNorm(2 * hidden_size)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        a, b = (self.norm(self.input(x)) + self.hidden(h)).chunk(2, -1)
        z = torch.sigmoid(a)
        return z * h + (1 - z) * torch.relu(b)


class MinimalCell(nn.Module):
    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.mix = nn.Linear(input_size + hidden_size, hidden_size)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.mix(torch.cat([x, h], -1)))


CELLS = {"layernorm-gru": LayerNormGRUCell, "ligru": LiGRUCell, "minimal": MinimalCell, "lstm": nn.LSTMCell}
T, B, I, H = 6, 3, 4, 5


def gradients(layer: sf.Recurrent, x: torch.Tensor, states: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of a loss on every output and on the final state, for x, the initial state and all parameters."""
    x, states = x.clone().requires_grad_(), [s.clone().requires_grad_() for s in states]
    y, final = layer(x, states[0] if len(states) == 1 else tuple(states))
    generator = torch.Generator().manual_seed(5)
    outputs = [y, *((final,) if isinstance(final, torch.Tensor) else final)]
    loss = sum((v * torch.randn(v.shape, generator=generator, dtype=v.dtype)).sum() for v in outputs)
    return list(torch.autograd.grad(loss, [x, *states, *layer.parameters()]))


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.manual_seed(0)


def make(name: str, feedback: object) -> tuple[sf.Recurrent, torch.Tensor, list[torch.Tensor]]:
    layer = sf.Recurrent(CELLS[name](I, H).double(), feedback=feedback)
    states = [torch.randn(B, H, dtype=torch.float64) for _ in range(2 if name == "lstm" else 1)]
    return layer, torch.randn(T, B, I, dtype=torch.float64), states


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("rule", ["0.3", "calibrated", "jacobian", "ft-bptt"])
def test_enough_corrections_equal_autograd(name: str, rule: str) -> None:
    layer, x, states = make(name, f"{rule}+{T}")
    ours = gradients(layer, x, states)
    layer.feedback = "torch"
    for g, exact in zip(ours, gradients(layer, x, states), strict=True):
        torch.testing.assert_close(g, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CELLS)
def test_one_correction_too_few_differs(name: str) -> None:
    layer, x, states = make(name, f"ft-bptt+{T - 2}")
    ours = gradients(layer, x, states)
    layer.feedback = "torch"
    assert (ours[1] - gradients(layer, x, states)[1]).abs().max() > 1e-8


@pytest.mark.parametrize("rule", ["dsf", "ft-bptt", 0.7, "0.5+2"])
def test_a_gru_cell_equals_the_gru_layer(rule: object) -> None:
    layer = sf.GRU(I, H, feedback=rule, dtype=torch.float64)
    cell = nn.GRUCell(I, H, dtype=torch.float64)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    custom = sf.Recurrent(cell, feedback=rule)
    x, h0 = torch.randn(T, B, I, dtype=torch.float64), torch.randn(B, H, dtype=torch.float64)
    results = []
    for module, state in ((layer, h0[None]), (custom, h0)):
        leaf = x.clone().requires_grad_()
        y, _ = module(leaf, state)
        results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *module.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_calibrated_averages_to_the_diagonal_of_the_jacobian() -> None:
    layer = sf.Recurrent(MinimalCell(I, H).double(), feedback="calibrated")
    x = torch.randn(1, 1, I, dtype=torch.float64).expand(4000, 3, I)
    layer.train()
    y, _ = layer(x)
    y.sum().backward()
    fixed = y[-1, 0]
    exact = torch.func.jacrev(lambda h: layer.cell(x[0, 0], h))(fixed).diagonal()
    # Off-diagonal entries of size J average out as J / sqrt(rows).
    torch.testing.assert_close(layer.diagonal[0], exact, rtol=0, atol=0.05)
    frozen = layer.diagonal.clone()
    layer.eval()
    layer(x[:5])[0].sum().backward()
    assert torch.equal(layer.diagonal, frozen)


@pytest.mark.parametrize("name", ["layernorm-gru", "lstm"])
def test_fitted_is_exact_once_and_then_the_fit_by_least_squares(name: str) -> None:
    layer, x, states = make(name, "fitted")
    first = gradients(layer, x, states)
    ours = gradients(layer, x, states)
    a = layer.diagonal.clone()
    layer.feedback = "torch"
    exact = gradients(layer, x, states)
    for g, h in zip(first, exact, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-9, atol=1e-9)
    assert (ours[-1] - exact[-1]).abs().max() > 1e-3
    layer.feedback = a
    for g, h in zip(gradients(layer, x, states), ours, strict=True):
        torch.testing.assert_close(g, h)

    # g[t] - e[t] and g[t+1] from autograd: the gradient of every state on its way through the loop.
    state, reached = tuple(s.clone().requires_grad_() for s in states), []
    y = []
    for x_t in x:
        state = tuple(s.clone() for s in state)
        for s in state:
            s.retain_grad()
        reached.append(state)
        after = layer.cell(x_t, state if len(state) > 1 else state[0])
        state = after if isinstance(after, tuple) else (after,)
        state = tuple(s.clone() for s in state)
        for s in state:
            s.retain_grad()
        y.append(state)
    generator = torch.Generator().manual_seed(5)
    outputs = [torch.stack([s[0] for s in y]), *y[-1]]
    sum((v * torch.randn(v.shape, generator=generator, dtype=v.dtype)).sum() for v in outputs).backward()
    back = torch.stack([torch.cat([s.grad for s in parts], -1) for parts in reached])
    g = torch.stack([torch.cat([s.grad for s in parts], -1) for parts in y])
    torch.testing.assert_close(a[0], (back * g).sum((0, 1)) / g.square().sum((0, 1)), rtol=1e-9, atol=1e-9)


def test_state_sizes_shapes_and_errors() -> None:
    class Bare(nn.Module):
        def forward(
            self, x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]
        ) -> tuple[torch.Tensor, torch.Tensor]:
            a, b = state
            return torch.tanh(a + x), b * 0.5 + a.sum(-1, keepdim=True)

    with pytest.raises(ValueError, match="state_size must be given, because Bare"):
        sf.Recurrent(Bare())
    layer = sf.Recurrent(Bare(), state_size=(3, 1), batch_first=True)
    x = torch.randn(2, 7, 3, requires_grad=True)
    y, (a, b) = layer(x)
    assert y.shape == (2, 7, 3)
    assert (a.shape, b.shape) == ((2, 3), (2, 1))
    (y.sum() + b.sum()).backward()
    assert x.grad is not None
    with pytest.raises(ValueError, match="shapes"):
        layer(x, (torch.zeros(2, 3), torch.zeros(2, 2)))
    with pytest.raises(ValueError, match="at least one step"):
        layer(x[:, :0])
    with pytest.raises(ValueError, match=r"\(T, B, I\)"):
        layer(x[0])
    with pytest.raises(ValueError, match="gate"):
        layer.feedback = "gate"
    with pytest.raises(ValueError, match="one value per unit of the state, 4 here"):
        layer.feedback = torch.rand(3)


class Returns(nn.Module):
    """A cell that returns a given value."""

    hidden_size = H

    def __init__(self, after: object) -> None:
        super().__init__()
        self.after = after

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> object:
        return self.after


@pytest.mark.parametrize(
    ("after", "got"),
    [
        (torch.zeros(B, H + 1), r"\[\(3, 6\)\]"),
        (torch.zeros(1, H), r"\[\(1, 5\)\]"),
        ((torch.zeros(B, H), torch.zeros(B, H)), r"\[\(3, 5\), \(3, 5\)\]"),
        ((torch.zeros(B, H), None), r"\[\(3, 5\), 'NoneType'\]"),
        (None, "NoneType"),
    ],
)
def test_a_cell_that_returns_no_next_state_raises(after: object, got: str) -> None:
    sentence = rf"^Returns must return only its next state, with the shapes \[\(3, 5\)\], got {got}$"
    for rule in ("dsf", "torch"):
        with pytest.raises(ValueError, match=sentence):
            sf.Recurrent(Returns(after), feedback=rule)(torch.zeros(T, B, I))


def test_a_function_is_no_cell_and_a_parameter_is_a_fixed_diagonal() -> None:
    with pytest.raises(TypeError, match=r"^cell must be a torch.nn.Module, got function$"):
        sf.Recurrent(lambda x, h: h, state_size=H)  # type: ignore[arg-type]
    layer = sf.Recurrent(MinimalCell(I, H), feedback=nn.Parameter(torch.full((H,), 0.5)))
    assert str(layer.feedback) == f"tensor({H})"
    assert list(layer.state_dict()) == ["cell.mix.weight", "cell.mix.bias"]


@pytest.mark.parametrize("rule", ["dsf", "calibrated", "jacobian+1"])
@pytest.mark.parametrize("name", CELLS)
def test_an_empty_batch_has_gradients_of_zero(name: str, rule: str) -> None:
    layer, x, states = make(name, rule)
    found = gradients(layer, x[:, :0], [s[:0] for s in states])
    assert found[0].shape == (T, 0, I)
    assert not any(g.any() for g in found)


def test_deepcopy_state_dict_and_no_grad() -> None:
    layer = sf.Recurrent(MinimalCell(I, H), feedback="calibrated")
    assert list(layer.state_dict()) == ["cell.mix.weight", "cell.mix.bias"]
    twin = copy.deepcopy(layer)
    x = torch.randn(T, B, I)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], twin(x)[0])
