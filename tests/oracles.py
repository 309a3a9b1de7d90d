"""Reference gradients: every rule from its equations, in float64 loops independent of the package.

Letters as in the package: T time, B batch, I input, H hidden, S state width. A state s is h, or for the LSTM (h, c)
joined, so S = H or 2H, and P + H where h is projected to P units; for the sLSTM it is (h, c, n, m), S = 4H, of which m
is a constant for the gradient: its entries of J and D are zero. states[0] is the initial state and states[t + 1] the
state after step t. Step t is the transition into states[t + 1], and J[t], D[t], F[t] belong to that transition. e[t] is
the gradient that reaches the state after step t from outside the recurrence. Cells are "tanh" and "relu" (RNN), "gru",
"lstm", "lstm_projected", "slstm" and "slstm_exp" (with an exponential forget gate); weights are a dictionary with
torch's names without their layer suffix.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jacrev, vjp, vmap

Weights = dict[str, Tensor]


def hidden_size(cell: str, w: Weights) -> int:
    """H."""
    return len(w["weight_hh"]) // (
        4 if cell.startswith("slstm") else {"gru": 3, "lstm": 4, "lstm_projected": 4}.get(cell, 1)
    )


# One step of one row --------------------------------------------------------------------------------------------------


def gates(cell: str, w: Weights, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    """The gates of one step, after their nonlinearities: (r, z, n) or (i, f, g, o)."""
    input_part = w["weight_ih"] @ x + w.get("bias_ih", 0.0)
    hidden_part = w["weight_hh"] @ h + w.get("bias_hh", 0.0)
    if cell == "gru":
        (r, z, n), (r_h, z_h, n_h) = input_part.chunk(3), hidden_part.chunk(3)
        r, z = torch.sigmoid(r + r_h), torch.sigmoid(z + z_h)
        return r, z, torch.tanh(n + r * n_h)
    i, f, g, o = (input_part + hidden_part).chunk(4)
    return torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)


def slstm_gates(cell: str, w: Weights, x: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    """i, f, z, o and m of one step, unit by unit; the heads are the blocks of W_hh."""
    h, _, n, m_before = s.chunk(4)
    m_before = m_before.detach()
    W, H = w["weight_hh"], len(h)
    width = W.shape[1]
    head = [slice(u // width * width, u // width * width + width) for u in range(H)]
    bias = w.get("bias_ih", torch.zeros(4 * H, dtype=x.dtype)) + w.get("bias_hh", 0.0)
    rows = [torch.dot(W[row], h[head[row % H]]) for row in range(4 * H)]
    pre_i, pre_f, pre_z, pre_o = (w["weight_ih"] @ x + torch.stack(rows) + bias).chunk(4)
    log_f = pre_f if cell == "slstm_exp" else -torch.log1p(torch.exp(-pre_f))
    m = torch.where(n == 0, pre_i, torch.maximum(pre_i, log_f + m_before)).detach()
    f = torch.exp(log_f + m_before - m).clamp(max=1)  # above 1 in a first step only, where it multiplies zeros
    return torch.exp(pre_i - m), f, torch.tanh(pre_z), torch.sigmoid(pre_o), m


def step(cell: str, w: Weights, x: Tensor, s: Tensor) -> Tensor:
    """The state after one step."""
    if cell == "gru":
        _, z, n = gates(cell, w, x, s)
        return (1 - z) * n + z * s
    if cell.startswith("lstm"):
        h, c = s[: w["weight_hh"].shape[1]], s[w["weight_hh"].shape[1] :]
        i, f, g, o = gates(cell, w, x, h)
        c = f * c + i * g
        h = o * torch.tanh(c)
        return torch.cat((w["weight_hr"] @ h if "weight_hr" in w else h, c))
    if cell.startswith("slstm"):
        _, c, n, _ = s.chunk(4)
        i, f, z, o, m = slstm_gates(cell, w, x, s)
        c, n = f * c + i * z, f * n + i
        return torch.cat((o * c / n, c, n, m))
    a = w["weight_ih"] @ x + w.get("bias_ih", 0.0) + w["weight_hh"] @ s + w.get("bias_hh", 0.0)
    return torch.tanh(a) if cell == "tanh" else torch.relu(a)


# One layer, one direction ---------------------------------------------------------------------------------------------


def run(cell: str, w: Weights, x: Tensor, initial: Tensor) -> Tensor:
    """All states, (T + 1, B, S), from inputs (T, B, I) and the initial state (B, S)."""
    states = [initial]
    for x_t in x:
        states.append(torch.stack([step(cell, w, row, s) for row, s in zip(x_t, states[-1], strict=True)]))
    return torch.stack(states)


def jacobians(cell: str, w: Weights, x: Tensor, states: Tensor) -> Tensor:
    """J[t] = d state after step t / d state before it: (T, B, S, S), rows after, columns before."""
    one = jacrev(lambda s, row: step(cell, w, row, s))
    return torch.stack([vmap(one)(s, x_t) for s, x_t in zip(states[:-1], x, strict=True)])


def diagonals(cell: str, w: Weights, x: Tensor, states: Tensor, diagonal: str | float | Tensor) -> Tensor:
    """D[t] of a rule, (T, B, S): "dsf", "gate", "jacobian", a number, a stationary (S,) or a full (T, B, S)."""
    after = states[1:]
    if isinstance(diagonal, str) and diagonal == "dsf":
        constants = hidden_size(cell, w) if cell.startswith("slstm") else 0
        diagonal = torch.linspace(0, 1, after.shape[-1] - constants, dtype=torch.float64)
    elif isinstance(diagonal, str) and diagonal == "jacobian":
        diagonal = jacobians(cell, w, x, states).diagonal(dim1=-2, dim2=-1)
    elif isinstance(diagonal, str) and diagonal == "gate" and cell.startswith("slstm"):
        f = vmap(vmap(lambda row, s: slstm_gates(cell, w, row, s)[1]))(x, states[:-1])
        diagonal = torch.cat((torch.zeros_like(f), f, f), -1)
    elif isinstance(diagonal, str) and diagonal == "gate":
        width = w["weight_hh"].shape[1]
        every = vmap(vmap(lambda row, s: torch.cat(gates(cell, w, row, s[:width]))))(x, states[:-1])
        if cell == "gru":
            diagonal = every[..., width : 2 * width]
        else:
            f = every.chunk(4, -1)[1]
            diagonal = torch.cat((torch.zeros_like(after[..., :width]), f), -1)
    diagonal = torch.as_tensor(diagonal, dtype=after.dtype)
    if cell.startswith("slstm"):  # m has no gradient
        S = 3 * hidden_size(cell, w)
        D = diagonal[..., :S] if diagonal.dim() else diagonal
        diagonal = torch.cat((D.expand(*after.shape[:-1], S), torch.zeros_like(after[..., S:])), -1)
    return diagonal.expand(after.shape)


def feedbacks(cell: str, w: Weights, x: Tensor, states: Tensor, D: Tensor) -> Tensor:
    """F[t], the approximation of J[t]: diag(D); D_c multiplies the whole gradient at c, and D_n that at n."""
    F = torch.diag_embed(D)
    if cell.startswith("slstm"):
        H = hidden_size(cell, w)
        _, c, n, _ = states[1:].chunk(4, -1)
        o = vmap(vmap(lambda row, s: slstm_gates(cell, w, row, s)[3]))(x, states[:-1])
        F[..., :H, H : 2 * H] = torch.diag_embed(o / n * D[..., H : 2 * H])
        F[..., :H, 2 * H : 3 * H] = torch.diag_embed(-o * c / n**2 * D[..., 2 * H : 3 * H])
    if cell.startswith("lstm"):
        width = w["weight_hh"].shape[1]
        c = states[1:, :, width:]
        o = vmap(vmap(lambda row, s: gates(cell, w, row, s[:width])[3]))(x, states[:-1])
        through_c = torch.diag_embed(o * (1 - torch.tanh(c) ** 2) * D[..., width:])
        F[..., :width, width:] = w["weight_hr"] @ through_c if "weight_hr" in w else through_c
    return F


def returned(M: Tensor, delta: Tensor) -> Tensor:
    """Gradient of the state before each step: M^T delta."""
    return torch.einsum("...ij,...i->...j", M, delta)


def shift(back: Tensor) -> Tensor:
    """Gradients of step t + 1 moved to step t, zero at the last step."""
    return torch.cat((back[1:], torch.zeros_like(back[:1])))


def backward_scan(e: Tensor, F: Tensor) -> Tensor:
    """delta[t] = e[t] + F[t + 1]^T delta[t + 1]."""
    delta = e.clone()
    for t in reversed(range(len(e) - 1)):
        delta[t] += returned(F[t + 1], delta[t + 1])
    return delta


def adjoint(e: Tensor, J: Tensor, F: Tensor, corrections: int) -> tuple[Tensor, Tensor]:
    """delta of a rule, (T, B, S), and the gradient of the initial state; F = J is exact."""
    delta = backward_scan(e, F)
    first = returned(F[0], delta[0])
    for _ in range(corrections):
        missing = returned(J - F, delta)
        delta = backward_scan(e + shift(missing), F)
        first = returned(F[0], delta[0]) + missing[0]
    return delta, first


def local_gradients(cell: str, w: Weights, x: Tensor, states: Tensor, delta: Tensor) -> tuple[Weights, Tensor]:
    """Gradients of weights and inputs, with the state before each step held constant."""
    total, dx = {name: torch.zeros_like(value) for name, value in w.items()}, torch.zeros_like(x)
    for t in range(len(x)):
        for b in range(x.shape[1]):
            _, back = vjp(lambda w, row, s=states[t, b]: step(cell, w, row, s), w, x[t, b])
            dw, dx[t, b] = back(delta[t, b])
            total = {name: total[name] + dw[name] for name in total}
    return total, dx


def layer_gradients(
    cell: str, w: Weights, x: Tensor, initial: Tensor, e: Tensor, rule: tuple[str | float | Tensor, int] | None
) -> Weights:
    """Gradients of the weights, of "x" and of "initial" under a rule (diagonal, corrections), or exact for None."""
    states = run(cell, w, x, initial)
    J = jacobians(cell, w, x, states)
    if rule is None:
        delta, first = adjoint(e, J, J, 0)
    else:
        D = diagonals(cell, w, x, states, rule[0])
        delta, first = adjoint(e, J, feedbacks(cell, w, x, states, D), rule[1])
    dw, dx = local_gradients(cell, w, x, states, delta)
    return {**dw, "x": dx, "initial": first}


def truncated_gradients(cell: str, w: Weights, x: Tensor, initial: Tensor, e: Tensor, k: int) -> Weights:
    """k-step truncated BPTT by its definition: the loss of each step is differentiated through k transitions."""
    states = run(cell, w, x, initial)
    leaves = {**{name: value.clone().requires_grad_() for name, value in w.items()}, "x": x.clone().requires_grad_()}
    leaves["initial"] = initial.clone().requires_grad_()
    total = {name: torch.zeros_like(value) for name, value in leaves.items()}
    for t in range(len(x)):
        first = max(t - k, 0)
        before = leaves["initial"] if t - k < 0 else states[first]
        last = run(cell, leaves, leaves["x"][first : t + 1], before)[-1]
        found = torch.autograd.grad(last, list(leaves.values()), e[t], materialize_grads=True)
        for name, value in zip(leaves, found, strict=True):
            total[name] += value
    return total


def least_squares(cell: str, w: Weights, x: Tensor, states: Tensor, J: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Numerator and denominator, (S,), of the stationary a that is the least-squares fit to J^T delta.

    a_i = sum (g_t - e_t)_i g_(t+1),i / sum g_(t+1),i^2 over all steps and rows; g - e is J^T delta, and for the LSTM's
    c, a multiplies the whole gradient at c, as in ``feedbacks``.
    """
    F = feedbacks(cell, w, x, states, torch.ones_like(states[1:]))
    numerator, denominator = torch.zeros_like(states[0, 0]), torch.zeros_like(states[0, 0])
    for t in range(len(x)):
        for b in range(x.shape[1]):
            g = F[t, b].T @ delta[t, b]
            numerator += (J[t, b].T @ delta[t, b]) * g
            denominator += g * g
    return numerator, denominator


def fitted(cell: str, w: Weights, x: Tensor, initial: Tensor, e: Tensor) -> Tensor:
    """The diagonal fitted to the exact gradient of a problem, (S,)."""
    states = run(cell, w, x, initial)
    J = jacobians(cell, w, x, states)
    numerator, denominator = least_squares(cell, w, x, states, J, adjoint(e, J, J, 0)[0])
    return numerator / denominator


def running_mean(values: Sequence[Tensor]) -> Tensor:
    """The calibrated diagonal after updates with these means, with weight max(1/n, 0.01)."""
    mean = torch.zeros_like(values[0])
    for n, value in enumerate(values, start=1):
        mean = mean + max(1 / n, 0.01) * (value - mean)
    return mean


# Layers, directions, sequences of different lengths -------------------------------------------------------------------


class Network(NamedTuple):
    """Results of a whole network: one output (T_b, directions * H) per sequence, final states, gradients."""

    outputs: list[Tensor]
    final: Tensor  # (layers * directions, B, S)
    gradients: dict[str, Tensor]  # by parameter name, and "initial": (layers * directions, B, S)
    inputs: list[Tensor]  # the gradient of every sequence
    diagonals: Tensor  # (layers * directions, S): the mean of diag(J) over the steps of all sequences
    fits: (
        Tensor  # (layers * directions, S): the least-squares fit to these gradients, exact ones where the rule is None
    )


def weights_of(parameters: Weights, suffix: str) -> Weights:
    """The weights of one layer and direction, without their suffix ("_l0", "_l1_reverse")."""
    return {name[: -len(suffix)]: value for name, value in parameters.items() if name.endswith(suffix)}


def network(
    cell: str,
    parameters: Weights,
    sequences: list[Tensor],
    initial: Tensor,
    output_gradients: list[Tensor],
    final_gradients: Tensor,
    rule: tuple[str | float | Tensor | Callable[[int, Tensor], Tensor], int] | None,
) -> Network:
    """Run every sequence separately through every layer and direction, forward and backward.

    The initial state is (layers * directions, B, S). A callable diagonal receives the index of the layer and direction
    and the mean of diag(J) over all its steps.
    """
    directions = ["", "_reverse"] if "weight_ih_l0_reverse" in parameters else [""]
    suffixes = [f"_l{n}{d}" for n in range(len(initial) // len(directions)) for d in directions]
    of_first = weights_of(parameters, "_l0")
    width = len(of_first["weight_hr"]) if "weight_hr" in of_first else hidden_size(cell, of_first)  # of h

    def in_time_order(suffix: str, value: Tensor) -> Tensor:
        return value.flip(0) if suffix.endswith("_reverse") else value

    inputs, final, per_direction, means = [sequences], [], [], []
    for index in range(0, len(suffixes), len(directions)):
        outputs = [[] for _ in sequences]
        for place, suffix in enumerate(suffixes[index : index + len(directions)], start=index):
            w = weights_of(parameters, suffix)
            x = [in_time_order(suffix, sequence)[:, None] for sequence in inputs[-1]]
            states = [run(cell, w, x[b], initial[place, b : b + 1]) for b in range(len(x))]
            J = [jacobians(cell, w, x[b], states[b]) for b in range(len(x))]
            per_direction.append((suffix, w, x, states, J))
            means.append(torch.cat([j.diagonal(dim1=-2, dim2=-1).flatten(0, 1) for j in J]).mean(0))
            final.append(torch.cat([s[-1] for s in states]))
            for b, s in enumerate(states):
                outputs[b].append(in_time_order(suffix, s[1:, 0, :width]))
        inputs.append([torch.cat(parts, -1) for parts in outputs])

    gradients, first = {}, torch.zeros_like(initial)
    fits = torch.zeros(2, *initial[:, 0].shape, dtype=initial.dtype)
    above = output_gradients
    for index in reversed(range(0, len(suffixes), len(directions))):
        below = [torch.zeros_like(sequence) for sequence in inputs[index // len(directions)]]
        for side in range(len(directions)):
            place = index + side
            suffix, w, x, states, J = per_direction[place]
            total = {name: torch.zeros_like(value) for name, value in w.items()}
            for b in range(len(sequences)):
                e = torch.zeros_like(states[b][1:])
                e[:, 0, :width] = in_time_order(suffix, above[b][:, side * width : (side + 1) * width])
                e[-1, 0] += final_gradients[place, b]
                if rule is None:
                    delta, start = adjoint(e, J[b], J[b], 0)
                else:
                    diagonal = rule[0](place, means[place]) if callable(rule[0]) else rule[0]
                    D = diagonals(cell, w, x[b], states[b], diagonal)
                    delta, start = adjoint(e, J[b], feedbacks(cell, w, x[b], states[b], D), rule[1])
                fits[:, place] += torch.stack(least_squares(cell, w, x[b], states[b], J[b], delta))
                dw, dx = local_gradients(cell, w, x[b], states[b], delta)
                total = {name: total[name] + dw[name] for name in total}
                below[b] += in_time_order(suffix, dx[:, 0])
                first[place, b] = start[0]
            gradients.update({name + suffix: value for name, value in total.items()})
        above = below
    gradients["initial"] = first
    return Network(inputs[-1], torch.stack(final), gradients, above, torch.stack(means), fits[0] / fits[1])


# The scan -------------------------------------------------------------------------------------------------------------


def scan(x: Tensor, a: Tensor, reverse: bool = False, initial: Tensor | None = None) -> Tensor:
    """y[t] = a[t] y[t - 1] + x[t] from y[-1] = initial; reversed: y[t] = a[t] y[t + 1] + x[t] from y[T] = initial."""
    a = a.expand(x.shape)
    y = torch.zeros_like(x[0]) if initial is None else initial
    every = {}
    for t in reversed(range(len(x))) if reverse else range(len(x)):
        y = a[t] * y + x[t]
        every[t] = y
    return torch.stack([every[t] for t in range(len(x))])
