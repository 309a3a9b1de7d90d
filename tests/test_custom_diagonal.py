"""Cells with a diagonal Jacobian: exact gradients in one scan, and the check of that promise and of others."""

import pytest
import torch
from torch import nn

import statefeed as sf
from statefeed.custom import block

T, B, I, H = 6, 3, 4, 5


class IndRNNCell(nn.Module):
    """h = tanh(W x + b + u * h') (Li et al., 2018)."""

    diagonal_jacobian = True

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.input = nn.Linear(input_size, hidden_size)
        self.u = nn.Parameter(torch.randn(hidden_size))

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.input(x) + self.u * h)


class MinGRUCell(nn.Module):
    """h = (1 - z) h' + z n, z = sigmoid(W_z x), n = W_n x (Feng et al., 2024); both products in ``project_input``."""

    diagonal_jacobian = True

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.input = nn.Linear(input_size, 2 * hidden_size)

    def project_input(self, x: torch.Tensor) -> torch.Tensor:
        return self.input(x)

    def step(self, inputs: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        z, n = inputs.chunk(2, -1)
        return torch.lerp(h, n, torch.sigmoid(z))

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return self.step(self.project_input(x), h)


class TwoAveragesCell(nn.Module):
    """Two independent running averages of different width, a state of two tensors."""

    diagonal_jacobian = True

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.input = nn.Linear(input_size, hidden_size + 2)
        self.rate = nn.Parameter(torch.rand(hidden_size + 2))

    def forward(self, x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        after = torch.tanh(self.rate * torch.cat(state, -1) ** 2 + self.input(x))
        return after[:, : self.hidden_size], after[:, self.hidden_size :]


CELLS = {"indrnn": IndRNNCell, "mingru": MinGRUCell, "two averages": TwoAveragesCell}


def make(name: str, rule: str = "bptt") -> sf.Recurrent:
    torch.manual_seed(0)
    return sf.Recurrent(CELLS[name](I, H).double(), rule, state_size=(H, 2) if name == "two averages" else None)


def gradients(layer: sf.Recurrent) -> list[torch.Tensor]:
    """Gradients of a random linear loss on outputs and final state, for x, the initial state and the parameters."""
    generator = torch.Generator().manual_seed(1)
    widths = layer.state_size if isinstance(layer.state_size, tuple) else (layer.state_size,)
    shapes = [(T, B, I), *((B, width) for width in widths)]
    x, *states = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    y, final = layer(x, states[0] if len(states) == 1 else tuple(states))
    outputs = [y, *([final] if isinstance(final, torch.Tensor) else final)]
    loss = sum((v * torch.randn(v.shape, generator=generator, dtype=v.dtype)).sum() for v in outputs)
    return list(torch.autograd.grad(loss, [x, *states, *layer.parameters()]))


@pytest.mark.parametrize("rule", ["bptt", "jacobian"])
@pytest.mark.parametrize("name", CELLS)
def test_one_scan_equals_autograd(name: str, rule: str) -> None:
    layer = make(name, rule)
    ours = gradients(layer)
    layer.feedback = "torch"
    for g, exact in zip(ours, gradients(layer), strict=True):
        torch.testing.assert_close(g, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CELLS)
def test_it_is_a_scan_and_not_autograd_through_the_loop(name: str) -> None:
    calls = []
    layer = make(name)
    layer.cell.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    gradients(layer)
    assert calls == [False] * T + [True]  # the loop without autograd, then all rows at once


@pytest.mark.parametrize("elements", [1, 2 * B * H, 4 * B * (H + 2)])
@pytest.mark.parametrize("rule", ["bptt", "jacobian", "dsf", "0.5", "0.5+1", "calibrated"])
@pytest.mark.parametrize("name", CELLS)
def test_blocks_of_steps_do_not_change_the_gradient(
    name: str, rule: str, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gradients(make(name, rule))
    monkeypatch.setattr(block, "ELEMENTS", elements)
    for g, expected in zip(gradients(make(name, rule)), whole, strict=True):
        torch.testing.assert_close(g, expected, rtol=1e-12, atol=1e-12)


def test_steps_are_computed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    layer = make("indrnn")
    layer.cell.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    monkeypatch.setattr(block, "ELEMENTS", 4 * B * H)
    gradients(layer)
    assert rows == [B] * T + [2 * B, 4 * B]  # the loop, then the last block first


def test_exploding_and_saturated_steps_have_the_gradient_of_autograd() -> None:
    cell = IndRNNCell(1, 3)
    with torch.no_grad():
        cell.u.fill_(2.0)
        cell.input.bias.zero_()
    x = torch.cat([torch.zeros(600, 2, 1), torch.full((50, 2, 1), 100.0)])  # D = 2, then D = 0
    found = []
    for rule in ("bptt", "torch"):
        layer = sf.Recurrent(cell, rule)
        found.append(torch.autograd.grad(layer(x)[0][-20:].sum(), list(cell.parameters())))
    for g, exact in zip(*found, strict=True):
        assert exact.isfinite().all()
        torch.testing.assert_close(g, exact)


def test_a_wrong_promise_changes_the_gradient_and_is_detected() -> None:
    layer = sf.Recurrent(nn.GRUCell(I, H).double(), diagonal_jacobian=True)
    ours = gradients(layer)
    layer.feedback = "torch"
    assert max(float((a - b).abs().max()) for a, b in zip(ours, gradients(layer), strict=True)) > 1e-3
    with pytest.raises(ValueError, match=r"^GRUCell has no diagonal Jacobian, .* leave diagonal_jacobian out"):
        layer.check(torch.randn(T, B, I, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CELLS)
def test_a_correct_promise_passes_the_check(name: str, dtype: torch.dtype) -> None:
    make(name).to(dtype).check(torch.randn(50, B, I, dtype=dtype))


def test_one_entry_off_the_diagonal_is_detected() -> None:
    class Leaking(IndRNNCell):
        def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            leak = torch.zeros_like(h).index_copy(1, torch.tensor([2]), 1e-3 * h[:, :1])
            return torch.tanh(self.input(x) + self.u * h + leak)

    with pytest.raises(ValueError, match="Leaking has no diagonal Jacobian"):
        sf.Recurrent(Leaking(I, H).double()).check(torch.randn(T, B, I, dtype=torch.float64))


def test_the_promise_is_an_argument_or_an_attribute_of_the_cell() -> None:
    assert make("indrnn").diagonal_jacobian
    assert not sf.Recurrent(IndRNNCell(I, H), diagonal_jacobian=False).diagonal_jacobian
    assert not sf.Recurrent(nn.GRUCell(I, H)).diagonal_jacobian
    assert "diagonal_jacobian=True" in repr(make("indrnn"))


def test_dependent_rows_and_random_numbers_are_detected() -> None:
    class Centered(IndRNNCell):
        def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            return super().forward(x, h - h.mean(0))

    class Noisy(IndRNNCell):
        def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            return super().forward(x, h + torch.randn_like(h))

    x = torch.randn(T, B, I, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^rows of Centered must be independent"):
        sf.Recurrent(Centered(I, H).double()).check(x)
    with pytest.raises(ValueError, match=r"^Noisy must return the same state twice"):
        sf.Recurrent(Noisy(I, H).double()).check(x)


def test_second_derivatives_and_batches_of_gradients_name_the_rule_that_has_them() -> None:
    layer = make("indrnn")
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match='set feedback to "torch"'):
        torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='set feedback to "torch"'):
        torch.autograd.grad(layer(x)[0], x, torch.ones(2, T, B, H, dtype=x.dtype), is_grads_batched=True)
    layer.feedback = "torch"
    torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_transforms_and_complex_numbers_run_through_the_loop() -> None:
    layer = make("indrnn")
    x = torch.randn(T, B, I, dtype=torch.float64)
    found = torch.func.grad(lambda x: layer(x)[0].square().sum())(x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(layer(leaf)[0].square().sum(), leaf)
    torch.testing.assert_close(found, expected)
    layer.to(torch.complex128)
    y, _ = layer(x.to(torch.complex128), torch.zeros(B, H, dtype=torch.complex128))
    y.abs().sum().backward()
    assert layer.cell.u.grad is not None
