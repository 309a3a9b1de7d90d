"""One comparison of the layer benchmarks: its input, and the ways to run it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import statefeed as sf
from statefeed.bench.measure import NO_ONEDNN, ONEDNN_MATMUL, Seconds, Setting, applied, clock, usual
from statefeed.bench.options import LAYER_GATES, SLSTM_HEADS, Shape
from statefeed.bench.published import published
from statefeed.bench.slstm_rivals import Loop, Package, missing_package

PADDED = "torch.nn padded"


class Input(NamedTuple):
    """What a contender runs on.

    Attributes:
        x: (T, B, H), or the rows (N, H) of a packed sequence; requires grad.
        grad: the gradient of the outputs, (T, B, H) or (N, H) times the directions.
        batch_sizes: of a packed sequence, (T,); None for a padded or dense one.
    """

    x: Tensor
    grad: Tensor
    batch_sizes: Tensor | None = None

    def argument(self) -> Tensor | PackedSequence:
        """What a layer is called with."""
        return self.x if self.batch_sizes is None else PackedSequence(self.x, self.batch_sizes)

    def to(self, dtype: torch.dtype) -> Input:
        """The same values in another dtype, as a new leaf of autograd."""
        return Input(self.x.detach().to(dtype).requires_grad_(), self.grad.to(dtype), self.batch_sizes)


class Case(NamedTuple):
    """One comparison; I = H."""

    cell: str
    shape: Shape
    dtype: str
    device: str
    layers: int = 1
    bidirectional: bool = False
    packed: bool = False
    training: bool = True
    projection: int = 0

    def __str__(self) -> str:
        parts = [self.cell, str(self.shape), self.dtype]
        parts += [f"{self.layers} layers"] if self.layers > 1 else []
        parts += [f"projection {self.projection}"] if self.projection else []
        parts += [
            word
            for word, on in (
                ("bidirectional", self.bidirectional),
                ("packed", self.packed),
                ("forward", not self.training),
            )
            if on
        ]
        return " ".join(parts)

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def output_width(self) -> int:
        """Of one direction."""
        return self.projection or self.shape.H

    @property
    def leaf_dtype(self) -> torch.dtype:
        """The dtype of input and parameters; bfloat16 is autocast."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    def lengths(self, steps: int) -> list[int]:
        """Evenly spaced lengths from ``steps`` down to half of it, one for each sequence; all equal if not packed.

        Example:
            >>> Case("gru", Shape(10, 3, 4), "float32", "cpu", packed=True).lengths(10)
            [10, 8, 5]
        """
        B = self.shape.B
        if not self.packed:
            return [steps] * B
        shortest = (steps + 1) // 2
        return [round(steps - k * (steps - shortest) / max(B - 1, 1)) for k in range(B)]

    @property
    def rows(self) -> int:
        """Steps of all sequences together."""
        return sum(self.lengths(self.shape.T))

    @property
    def flops(self) -> float:
        """Of the products that every method needs: forward x W_ih and h W_hh, backward dW_ih, dW_hh and dx.

        With a projection u W_hr, and backward dW_hr and the gradient of u.
        """
        H, P, products = self.shape.H, self.output_width, 0
        fed = H // SLSTM_HEADS if self.cell == "slstm" else P  # units that one unit reads from the step before
        for layer in range(self.layers):
            width = H if layer == 0 else P * self.directions
            products += (3 * width + 2 * fed if self.training else width + fed) * self.directions
        projection = self.projection * (3 if self.training else 1) * self.layers * self.directions
        return 2.0 * self.rows * H * (LAYER_GATES[self.cell] * products + projection)

    def data(self, steps: int | None = None, padded: bool = False) -> Input:
        """Input and output gradient, unit normal.

        Args:
            steps: T, where it is not the shape's.
            padded: whether sequences of different lengths are padded with zeros instead of packed.
        """
        torch.manual_seed(1)
        T, B, H = self.shape
        T = steps or T
        width = self.output_width * self.directions
        x = torch.randn(T, B, H, device=self.device).to(self.leaf_dtype)
        grad = torch.randn(T, B, width, device=self.device).to(self.leaf_dtype)
        if not self.packed:
            return Input(x.requires_grad_(), grad)
        lengths = torch.tensor(self.lengths(T), device="cpu")
        rows, grad_rows = (pack_padded_sequence(each, lengths) for each in (x, grad))
        if padded:
            return Input(pad_packed_sequence(rows)[0].requires_grad_(), pad_packed_sequence(grad_rows)[0])
        return Input(rows.data.requires_grad_(), grad_rows.data, rows.batch_sizes)

    def layer(self, package: Any, **feedback: str) -> Any:
        """The cell's layer of torch.nn or statefeed, always with the same weights; for slstm that of statefeed."""
        torch.manual_seed(0)
        H = self.shape.H
        options: dict[str, Any] = {
            "bidirectional": self.bidirectional,
            "device": self.device,
            "dtype": self.leaf_dtype,
            **({"proj_size": self.projection} if self.projection else {}),
            **feedback,
        }
        if self.cell == "slstm":
            slstm = sf.SLSTM(H, H, self.layers, num_heads=SLSTM_HEADS, **options)
            for name, weight in slstm.named_parameters():
                if name.startswith("weight_hh"):  # which is zero at first
                    nn.init.normal_(weight, std=H**-0.5)
            return slstm
        return getattr(package, self.cell.upper())(H, H, self.layers, **options)

    def truth(self) -> Any:
        """The layer in float64, exact by autograd: torch.nn's, or for slstm a loop over its step."""
        layer = self.layer(nn).double()
        return Loop(layer, compiled=False) if isinstance(layer, sf.SLSTM) else layer


class Contender(NamedTuple):
    """One way to run a layer.

    Attributes:
        implementation: ``"torch.nn"``, ``"torch.nn padded"``, ``"published"`` or ``"statefeed"``; for slstm
            ``"torch.compile"`` or ``"xlstm"`` in the place of the first three.
        variant: torch.nn's setting, or the rule.
        layer: the module with the parameters.
        forward: what the layer is called with -> outputs and final state.
        setting: torch setting during the run.
        autocast: whether the forward pass runs under bfloat16 autocast.
        training: whether a backward pass follows; otherwise the forward pass runs without autograd.
    """

    implementation: str
    variant: str
    layer: Any
    forward: Callable[[Any], tuple[Any, Any]]
    setting: Setting
    autocast: bool
    training: bool = True

    @property
    def name(self) -> str:
        return f"{self.implementation} {self.variant}"

    @property
    def padded(self) -> bool:
        return self.implementation == PADDED

    def outputs(self, data: Input) -> Tensor:
        with torch.autocast(data.x.device.type, torch.bfloat16, enabled=self.autocast):
            y = self.forward(data.argument())[0]
        result: Tensor = y.data if isinstance(y, PackedSequence) else y
        return result

    def gradients(self, data: Input, y: Tensor) -> dict[str, Tensor]:
        """The gradients of the input and of every parameter."""
        named = {"x": data.x, **dict(self.layer.named_parameters())}
        return dict(zip(named, torch.autograd.grad(y, list(named.values()), data.grad.to(y.dtype)), strict=True))

    def once(self, data: Input) -> Seconds:
        """Seconds of one forward pass, and of the backward pass in training."""
        device = data.x.device.type
        with applied(self.setting), contextlib.nullcontext() if self.training else torch.no_grad():
            start = clock(device)
            y = self.outputs(data)
            forward = clock(device) - start
            if not self.training:
                return (forward,)
            data = data._replace(grad=data.grad.to(y.dtype))
            start = clock(device)
            self.gradients(data, y)
            return forward, clock(device) - start


def contenders(case: Case, rules: Sequence[str], tried: Sequence[Setting]) -> list[Contender]:
    """torch.nn under every setting, and the published procedure and statefeed's rules under the first setting.

    For bfloat16, torch.nn runs under autocast and also in float32 under every setting. For packed sequences it runs
    packed and padded. The published procedure is there for training one layer of one direction on dense input. An
    sLSTM has other rivals than torch.nn and the published procedure.

    Args:
        case: the comparison.
        rules: rules of statefeed.
        tried: settings of torch, the common one first.
    """
    first, autocast = tried[0], case.dtype == "bfloat16"
    result = _slstm_rivals(case, first, autocast) if case.cell == "slstm" else _torch_rivals(case, tried, autocast)
    for rule in rules:
        layer = case.layer(sf, feedback=rule)
        result.append(Contender("statefeed", rule, layer, layer, first, autocast, case.training))
    return result


def _slstm_rivals(case: Case, setting: Setting, autocast: bool) -> list[Contender]:
    """A loop over a compiled step, and the xlstm package if it is installed."""
    layer = case.layer(sf)
    loop = Loop(layer, compiled=True)
    result = [Contender("torch.compile", "step", loop, loop, setting, autocast, case.training)]
    if missing_package() is None:
        package = Package(layer)
        result.append(Contender("xlstm", "vanilla", package, package, setting, autocast, case.training))
    return result


def _torch_rivals(case: Case, tried: Sequence[Setting], autocast: bool) -> list[Contender]:
    """torch.nn under every setting, and the published procedure."""
    plain, first = case.layer(nn), tried[0]
    result = []
    for rival in ("torch.nn", PADDED) if case.packed else ("torch.nn",):
        result.append(Contender(rival, first.name, plain, plain, first, autocast, case.training))
        for setting in tried:
            packed = case.packed and rival != PADDED
            if setting == NO_ONEDNN and (case.cell != "lstm" or packed or case.projection):
                continue  # torch.nn's RNN and GRU do not use oneDNN, nor does its LSTM if packed or projected
            if autocast:
                name = f"float32 {setting.name}"
                result.append(Contender(rival, name, plain, plain, setting, False, case.training))
            elif setting != first:
                result.append(Contender(rival, setting.name, plain, plain, setting, False, case.training))
    if case.training and not case.packed and case.layers == case.directions == 1 and not case.projection:
        result.append(Contender("published", "dsf", plain, lambda x: published(plain, x), first, autocast))
    return result


def settings_for(case: Case, settings: list[Setting]) -> list[Setting]:
    """torch.nn's settings for a case; for bfloat16 they include oneDNN products, which may compute in bfloat16."""
    if case.device != "cpu" or case.dtype == "float64":
        return [usual(case.device, case.dtype)]
    if case.dtype == "float32" or ONEDNN_MATMUL in settings:
        return settings
    return [*settings, ONEDNN_MATMUL]
