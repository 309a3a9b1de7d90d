"""Baseline sequence layers: causal attention, a diagonal state space model, minGRU.

Each has the interface of a recurrent layer: (x (T, B, H), state) to (y (T, B, H), state), with state None at the
beginning of a text. In a padded batch no output before the end of a column depends on the padding, but the final state
does and must not be used.
"""

import math
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import statefeed as sf

Cache: TypeAlias = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Causal self-attention with rotary position embeddings; the output projection is part of the block.

    Attention depends on relative positions only, so that a text of any length can be read in segments.

    Args:
        width: H.
        heads: A, number of heads; H must be a multiple of 2 A.
        window: number of tokens that a token attends to, including itself. The state is the last `window - 1` keys and
            values, each (., B, H), so that a token costs O(window).
    """

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.project = nn.Linear(width, 3 * width)
        nn.init.normal_(self.project.weight, std=0.02)
        nn.init.zeros_(self.project.bias)

    def forward(self, x: Tensor, state: Cache | None = None) -> tuple[Tensor, Cache]:
        """Outputs (T, B, H), and the keys and values for the next segment of the text."""
        q, k, v = self.project(x).chunk(3, -1)
        if state is not None:
            k, v = torch.cat([state[0], k]), torch.cat([state[1], v])
        (T, B, H), S = x.shape, len(k)
        positions = torch.arange(S, device=x.device)
        distance = positions[S - T :, None] - positions
        heads = [part.unflatten(-1, (self.heads, -1)).permute(1, 2, 0, 3) for part in (q, k, v)]  # (B, A, ., H / A)
        y = F.scaled_dot_product_attention(
            _rotated(heads[0], positions[S - T :]),
            _rotated(heads[1], positions),
            heads[2],
            attn_mask=(distance >= 0) & (distance < self.window),
        )
        first = max(0, S - self.window + 1)
        return y.permute(2, 0, 1, 3).reshape(T, B, H), (k[first:], v[first:])


def _rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding of queries or keys x (B, A, T, E) at positions (T,)."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * 10_000.0 ** (torch.arange(half, device=x.device) / -half)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class S4D(nn.Module):
    """S4D-Lin: N complex modes per unit, one linear recurrence each, followed by a readout and a GELU.

    ``s[t] = exp(dt A) s[t-1] + (exp(dt A) - 1) / A u[t]`` (the input held over a step of length dt),
    ``y[t] = gelu(2 Re(C s[t]) + D u[t])``, where A starts at -1/2 + i pi n and dt between 0.001 and 0.1
    (Gu et al., On the Parameterization and Initialization of Diagonal State Space Models, 2022).

    Outputs are computed as a convolution, by FFT, with one kernel: the impulse response that `sf.diagonal_scan`
    computes. The states of all steps, N times the size of the input, are never in memory at once.

    Args:
        width: H.
        modes: N, number of modes per unit. The state is complex, (1, B, H * N), so that a token costs O(1).
        device: device of the parameters.
    """

    def __init__(self, width: int, modes: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.log_dt = nn.Parameter(torch.empty(width, 1, device=device).uniform_(math.log(1e-3), math.log(1e-1)))
        self.log_decay = nn.Parameter(torch.full((width, modes), math.log(0.5), device=device))
        mode = torch.arange(modes, device=device).float()
        self.frequency = nn.Parameter(math.pi * mode.expand(width, -1).contiguous())
        self.readout = nn.Parameter(torch.randn(width, modes, 2, device=device) / math.sqrt(2))
        self.direct = nn.Parameter(torch.randn(width, device=device))

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs (T, B, H) and the state after the last one."""
        with torch.autocast(x.device.type, enabled=False):
            u = x.to(torch.promote_types(x.dtype, torch.float32))
            T, B, H = u.shape
            # Double precision, for powers of numbers near 1 and differences from 1; cheap, as there is no batch axis.
            A = torch.complex(-self.log_decay.double().exp(), self.frequency.double())
            a = (A * self.log_dt.double().exp()).exp()  # (H, N)
            impulse = F.pad(torch.ones_like(a).view(1, -1), (0, 0, 0, T - 1))
            powers = sf.diagonal_scan(impulse, a.flatten()).view(T, H, -1)
            responses = powers * ((a - 1) / A)  # of the states to an impulse
            readout = 2 * torch.view_as_complex(self.readout.double())
            kernel = (responses * readout).sum(-1).real.to(u.dtype)  # (T, H)
            rows = u.permute(2, 1, 0).contiguous()  # (H, B, T): transforms and products are contiguous
            spectrum = torch.fft.rfft(rows, 2 * T) * torch.fft.rfft(kernel.T.contiguous(), 2 * T)[:, None]
            y = torch.fft.irfft(spectrum, 2 * T)[..., :T].permute(2, 1, 0)
            parts = torch.view_as_real(responses.flip(0)).to(u.dtype)
            after = torch.view_as_complex(torch.einsum("hbt,thnc->bhnc", rows, parts).contiguous())
            if state is not None:
                fading = a * powers
                before = state.view(B, H, -1)
                y = y + torch.einsum("bhn,thn->tbh", before, (readout * fading).to(before.dtype)).real
                after = after + fading[-1].to(before.dtype) * before
            return F.gelu(y + self.direct * u).to(x.dtype), after.view(1, B, -1)


class MinGRU(nn.Module):
    """minGRU: a GRU whose gate and candidate do not depend on the state, so that it is a linear scan over time.

    ``h[t] = (1 - z[t]) h[t-1] + z[t] n[t]`` with ``z = sigmoid(W_z x + b_z)`` and ``n = W_n x + b_n``
    (Feng et al., Were RNNs All We Needed?, 2024).

    Args:
        width: H; the state is (1, B, H), so that a token costs O(1).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_and_candidate = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs (T, B, H) and the state after the last one."""
        both = self.gate_and_candidate(x)
        gate, candidate = both.to(torch.promote_types(both.dtype, torch.float32)).chunk(2, -1)
        y = sf.diagonal_scan(gate.sigmoid() * candidate, (-gate).sigmoid(), initial=None if state is None else state[0])
        return y.to(x.dtype), y[-1:]
