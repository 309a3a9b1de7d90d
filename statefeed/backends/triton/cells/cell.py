"""Cell interface of the Triton kernels: sizes and two functions of one row of one block of units."""

from __future__ import annotations

from typing import Any, NamedTuple


class Cell(NamedTuple):
    """One row of the table of cells.

    Attributes:
        name: name of the Python cell.
        states: 1 for h, 2 for h and c, 3 for h, c and n: the parts of the state with a gradient.
        gates: G, blocks of H rows in the weights.
        shared_gates: number of leading gates with the same gradient at the input and the hidden part. The hidden part
            of one more gate (the GRU's W_hn h' + b_hn) is stored separately, in ``saved``.
        factors: Triton function ``(gates, saved, state, state_stride, w0, w1, w2, w3, row, unit, H, mask, ACC)`` that
            returns the tuples ``k, direct, through_h, jacobian``. The factors k turn the gradient of the state into
            the gradients of the pre-activations, ``direct`` is the diagonal part of the Jacobian that passes no weight
            for every part of the state, ``through_h`` the derivatives of h with respect to the other parts of the same
            step, and ``jacobian`` the whole diagonal; w0 .. w3 are the diagonals of W_hh for each gate.
        local: Triton function ``(k, delta, gamma_c, gamma_n)`` that returns the gradients d0 .. d3 at the
            pre-activations; delta is the gradient of h, gamma_c that of c, gamma_n that of n.
        output: Triton function ``(gates, saved, row, unit, H, mask, ACC)`` that returns the output u of a cell whose h
            is a projection of it; ``factors`` and ``local`` are then those at u. None without a projection.
        saved: content of ``saved``: ``""``, ``"candidate_hidden"``, ``"cell_state"`` (c before the step) or
            ``"states"``, of a cell whose forward pass is a loop: the parts besides h before the step, then the constant
            ones after it.
    """

    name: str
    states: int
    gates: int
    shared_gates: int
    factors: Any
    local: Any
    saved: str = ""
    output: Any = None

    @property
    def projects(self) -> bool:
        """Whether h is a projection of the output of the cell."""
        return self.output is not None

    @property
    def from_states(self) -> bool:
        """Whether gates and saved values are computed from the states of a loop over time, not from h alone."""
        return self.saved == "states"

    @property
    def gathers_x(self) -> bool:
        """Whether the gates are recomputed from rows of x and h next to each other."""
        return self.gates > 1 and not self.from_states

    @property
    def sums(self) -> int:
        """Number of gradients at the pre-activations that ``local`` computes."""
        return 1 if self.gates == 1 else 4

    @property
    def constants(self) -> dict[str, Any]:
        """The compile-time arguments of a kernel that depend on the cell."""
        return {"FACTORS": self.factors, "LOCAL": self.local, "STATES": self.states, "GATES": self.gates}
