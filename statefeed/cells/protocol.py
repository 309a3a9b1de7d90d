"""Interface of recurrent cells: sizes, forward step, and the parts of the gradient.

Every tensor of a cell is (..., width), and functions treat rows independently, so that one call computes one time step
or all steps. ``inputs`` and ``hidden`` are the preactivations x W_ih^T + b_ih and h' W_hh^T + b_hh, each with ``gates``
blocks of H columns; a prime denotes the previous step.

A cell may project its output, ``h = u W_hr^T``: h then has P units and the other parts H. The cell computes u in place
of h, and receives the gradient at u, ``delta W_hr``, in place of that at h. The backends do the products with W_hr.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from statefeed.layout import Layout

State: TypeAlias = tuple[Tensor, ...]
Preactivations: TypeAlias = Callable[[], tuple[Tensor, Tensor]]
# (part of the state, a, b) -> s[t] = a[t] s[t-1] + b[t] over time; a is None for zero.
Scan: TypeAlias = Callable[[int, Tensor | None, Tensor], Tensor]


class Step(NamedTuple):
    """Argument of ``Cell.linearize``: rows of one step or of all steps.

    Attributes:
        previous: state before the step of each row, as far as it is known (always h).
        after: state after the step of each row, as far as it is known (always h).
        preactivations: computes ``inputs`` and ``hidden``; costs two products, so call it only if needed.
    """

    previous: State
    after: State
    preactivations: Preactivations


class Cell(ABC):
    """Base class of recurrent cells.

    Attributes:
        name: name of the cell, also in the tables of the backends.
        gates: G, number of blocks of H rows in the weights.
        shared_gates: number of leading gates with the same gradient at ``inputs`` and ``hidden``.
        states: names of the parts of the state; the first is h, which is also the output.
        projects: whether h is a projection of the output u; then there is a weight W_hr (P, H).
        constant_states: the last of these names, if they are constants for the gradient: no part of S, no gradient
            enters or leaves them, and ``delta`` and every diagonal are those of the parts before them.
        saved_type: the NamedTuple that ``linearize`` returns.
        saved_values: values per row and unit that a fused forward pass saves for the backward pass, besides h.
        has_direct_path: whether part of the Jacobian is a direct path, without a weight.
        torch_forward: name of the function of ``torch._VF`` that runs the layer; None if torch has none.
    """

    name: ClassVar[str]
    gates: ClassVar[int]
    shared_gates: ClassVar[int]
    states: ClassVar[tuple[str, ...]] = ("h",)
    projects: ClassVar[bool] = False
    constant_states: ClassVar[tuple[str, ...]] = ()
    saved_type: ClassVar[Callable[..., Any]]
    saved_values: ClassVar[int] = 0
    has_direct_path: ClassVar[bool] = True
    torch_forward: ClassVar[str | None] = None

    def weight_shapes(
        self, input_size: int, hidden_size: int, output_size: int | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters of one layer and direction by torch's names, in torch's order.

        Args:
            input_size: I, number of input features.
            hidden_size: H, number of units.
            output_size: width of h, P if the cell projects it; H if None.
        """
        rows, width = self.gates * hidden_size, output_size or hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (rows, input_size),
            "weight_hh": (rows, width),
            "bias_ih": (rows,),
            "bias_hh": (rows,),
        }
        return {**shapes, "weight_hr": (width, hidden_size)} if self.projects else shapes

    def weight_names(self, bias: bool) -> tuple[str, ...]:
        """Names of the parameters of one layer and direction in torch's order, with or without biases."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if bias else ("weight_ih", "weight_hh")
        return (*names, "weight_hr") if self.projects else names

    def state_widths(self, hidden_size: int, output_size: int | None = None) -> tuple[int, ...]:
        """Width of every part of the state, of h ``output_size`` (H if None)."""
        return (output_size or hidden_size, *(hidden_size,) * (len(self.states) - 1))

    @property
    def gradient_parts(self) -> int:
        """Number of parts of the state with a gradient, which come first; S is the sum of their widths."""
        return len(self.states) - len(self.constant_states)

    def hidden_product(self, h: Tensor, w_hh: Tensor, b_hh: Tensor | None) -> Tensor:
        """``hidden``, h' W_hh^T + b_hh, of rows (N, H)."""
        return F.linear(h, w_hh, b_hh)

    def hidden_by_gate(self, addend: Tensor, h: Tensor, w_hh: Tensor) -> Tensor:
        """``addend`` (G, N, H) plus h' W_hh^T by gate, in the dtype of ``addend``; h and w_hh may have a lower one."""
        rows, w = h.expand(self.gates, -1, -1), w_hh.view(self.gates, -1, w_hh.shape[1]).mT
        if h.dtype == addend.dtype:
            return torch.baddbmm(addend, rows, w)
        return addend + torch.bmm(rows, w)

    def grad_h(self, grad_hidden: Tensor, w_hh: Tensor) -> Tensor:
        """The gradient that ``hidden_product`` passes to h', (N, H)."""
        return grad_hidden.to(w_hh.dtype) @ w_hh

    def grad_w_hh(self, grad_hidden: Tensor, h: Tensor, w_hh: Tensor) -> Tensor:
        """The gradient that ``hidden_product`` passes to W_hh, in its shape and dtype."""
        return (grad_hidden.to(w_hh.dtype).T @ h.to(w_hh.dtype)).to(w_hh.dtype)

    def autocast_dtype(self, compute_dtype: torch.dtype, state_dtype: torch.dtype, ragged: bool) -> torch.dtype:
        """The dtype that torch's layer returns under autocast on a CPU.

        Args:
            compute_dtype: dtype of the products.
            state_dtype: dtype of the initial state.
            ragged: whether sequences are packed and have different lengths.

        Returns:
            The dtype of outputs and final states.
        """
        return compute_dtype

    def autocast_dtypes(
        self, compute_dtype: torch.dtype, state_dtype: torch.dtype, ragged: bool
    ) -> tuple[torch.dtype, ...]:
        """``autocast_dtype`` for every part of the state, if they differ; outputs have the dtype of h."""
        return (self.autocast_dtype(compute_dtype, state_dtype, ragged),) * len(self.states)

    @abstractmethod
    def step(self, inputs: Tensor, hidden: Tensor, previous: State) -> State:
        """The state after one step, with u in place of h if the cell projects it."""

    @abstractmethod
    def linearize(self, step: Step) -> Any:
        """The quantities of the rows that the other functions need, as a NamedTuple of tensors (rows, H)."""

    @abstractmethod
    def local_gradient(self, at: Any, delta: State) -> tuple[Tensor, Tensor]:
        """Gradients at ``inputs`` and ``hidden`` from those of the state; the same tensor twice if they are equal.

        The gradient of the state has ``gradient_parts`` parts, here and in the functions below.
        """

    @abstractmethod
    def direct_path(self, at: Any) -> tuple[Tensor | None, ...]:
        """Diagonal of the direct path, the Jacobian without weights, per part of the state; None means zero."""

    @abstractmethod
    def jacobian_diagonal(self, at: Any, w_hh: Tensor) -> State:
        """diag(J) per part of the state, with the other parts fixed.

        Args:
            at: what ``linearize`` returned.
            w_hh: recurrent weights (G * H, H); if the cell projects h, ``projected_w_hh``.
        """

    def same_step(self, at: Any, grad_h: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the other parts of the state through h, or u, of the same step."""
        return ()

    def unprojected(self, at: Any) -> Tensor:
        """u of every row; needed only if the cell projects h."""
        raise NotImplementedError(f"the cell {self.name!r} projects h and must define unprojected(at)")

    def newton_update(self, gates: Tensor, inputs: Tensor, h_prev: Tensor, w_hh: Tensor, scan: Scan) -> State:
        """The next estimate of all states from an estimate of h: ``step`` with a diagonal Jacobian, solved over time.

        The diagonal is the direct path, or diag(J) clamped to (-1, 1) for a cell without one. A cell with several parts
        overrides this method and solves the other parts before h.

        Args:
            gates: (G, T, B, H), ``inputs + hidden`` of the shared gates, ``hidden`` of the others; may be overwritten.
            inputs: (G - shared_gates, T, B, H), ``inputs`` of the others.
            h_prev: (T, B, H), the estimate of h before every step.
            w_hh: recurrent weights (G * H, H).
            scan: solves one part over time, from its initial state; takes u in place of h, with a = None.

        Returns:
            The parts of the state, (T, B, width) each.
        """
        shared = gates[: self.shared_gates]
        blocks = torch.cat([shared, inputs]), torch.cat([torch.zeros_like(shared), gates[self.shared_gates :]])
        inputs, hidden = (block.movedim(0, -2).flatten(-2) for block in blocks)
        after = self.step(inputs, hidden, (h_prev,))
        at = self.linearize(Step((h_prev,), after, lambda: (inputs, hidden)))
        (a,) = self.direct_path(at)
        if a is None:
            a = self.jacobian_diagonal(at, w_hh)[0].clamp(-1, 1)
        return (scan(0, a, after[0] - a * h_prev),)

    def recover_states(self, preactivations: Preactivations, initial: State, layout: Layout) -> State:
        """Recompute the parts of the state besides h after every step, which a forward pass may not save.

        A cell with several parts overrides it if it has a ``torch_forward``, or to avoid another loop over ``step``.
        """
        return ()


def projected_w_hh(w_hh: Tensor, w_hr: Tensor | None) -> Tensor:
    """What diag(J) needs of W_hh: W_hh itself, or with a projection ``W_hh[gj, p] W_hr[p, j]``, (G * H, P).

    The entry is the weight from unit p of h to itself through gate g of unit j.
    """
    if w_hr is None:
        return w_hh
    return (w_hh.view(-1, *w_hr.T.shape) * w_hr.T).view_as(w_hh)


def w_hh_diagonal(w_hh: Tensor, gate: int) -> Tensor:
    """Diagonal of one gate's block of W_hh, the weight from every unit to itself, (H,)."""
    H = w_hh.shape[1]
    return w_hh[gate * H : (gate + 1) * H].diagonal()
