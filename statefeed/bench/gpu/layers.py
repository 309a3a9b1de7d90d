"""Stage "layers": forward and backward of a layer under every rule against torch.nn (cuDNN's BPTT)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import statefeed as sf
from statefeed.bench.gpu import rivals
from statefeed.bench.gpu.stage import Options
from statefeed.bench.gpu.timing import Work, measure
from statefeed.bench.measure import SHIPPED, Setting, applied
from statefeed.bench.precision import flags

# On a GPU "bptt" is cuDNN's own, through torch: compared with torch.nn it shows the overhead of statefeed's layer.
RULES = ("bptt", "dsf", "gate", "gate+1")
# "shipped" is float32 with torch's default settings: cuDNN in TF32, other products in float32.
SETTINGS = {
    "shipped": SHIPPED,
    "bfloat16": SHIPPED,
    "float32": Setting("float32", tf32=False),
    "tf32": Setting("tf32", tf32=True),
}
USUAL = ("shipped", "bfloat16")
DTYPES = {"cpu": USUAL, "cuda": tuple(SETTINGS)}


class Case(NamedTuple):
    """One layer on one input; I = H.

    Attributes:
        cell: gru, lstm or slstm, which torch.nn does not have.
        T: steps of the longest sequence.
        B: sequences.
        H: hidden units.
        layers: L.
        bidirectional: whether the layer has both directions.
        packed: sequences of T to T / 4 steps, as a PackedSequence.
        proj_size: P of an LSTM; 0 is no projection.
        heads: heads of an sLSTM; 0 for other cells.
    """

    cell: str
    T: int
    B: int
    H: int
    layers: int = 1
    bidirectional: bool = False
    packed: bool = False
    proj_size: int = 0
    heads: int = 0

    def layer(self, package: Any, device: str) -> Any:
        """The layer of torch.nn or statefeed, always with the same weights."""
        torch.manual_seed(0)
        special = {"proj_size": self.proj_size} if self.proj_size else {}
        if self.heads:
            special["num_heads"] = self.heads
        kind = getattr(package, self.cell.upper())
        return kind(self.H, self.H, self.layers, bidirectional=self.bidirectional, device=device, **special)

    def data(self, device: str) -> tuple[Tensor | PackedSequence, Tensor]:
        """An input that requires a gradient, and the gradient of the outputs."""
        torch.manual_seed(1)
        x = torch.randn(self.T, self.B, self.H, device=device)
        width = (self.proj_size or self.H) * (2 if self.bidirectional else 1)
        grad = torch.randn(self.T, self.B, width, device=device)
        if not self.packed:
            return x.requires_grad_(), grad
        lengths = torch.linspace(self.T, max(1, self.T // 4), self.B, device="cpu").long()
        packed, packed_grad = pack_padded_sequence(x, lengths), pack_padded_sequence(grad, lengths)
        return packed._replace(data=packed.data.detach().requires_grad_()), packed_grad.data


# The most important cases: widths above those of cuDNN's persistent kernels (128 backward, 192 forward), and packed
# input, for which cuDNN has no persistent kernels.
DECIDING = (
    Case("gru", 256, 128, 512),
    Case("gru", 4096, 8, 512),
    Case("gru", 1024, 8, 256),
    Case("gru", 256, 128, 512, packed=True),
    Case("lstm", 256, 128, 512),
    Case("gru", 256, 128, 512, layers=3),
    Case("gru", 256, 64, 512, bidirectional=True),
    Case("lstm", 256, 128, 512, proj_size=128),
)
BROAD = (
    Case("gru", 64, 256, 512),
    Case("gru", 1024, 32, 1024),
    Case("gru", 256, 64, 2048),
    Case("gru", 1024, 1, 128),
    Case("gru", 4096, 1, 128),
    Case("lstm", 1024, 8, 256),
    Case("lstm", 256, 128, 512, packed=True),
    Case("lstm", 256, 64, 512, layers=3, bidirectional=True),
    Case("gru", 256, 64, 512, layers=3, bidirectional=True, packed=True),
    Case("slstm", 256, 128, 512, heads=4),  # last: its forward pass is slow
)
SMOKE = (
    Case("gru", 5, 2, 16),
    Case("lstm", 7, 3, 8, packed=True),
    Case("gru", 5, 4, 8, layers=3, bidirectional=True, packed=True),
    Case("lstm", 5, 3, 8, proj_size=3),
    Case("slstm", 5, 3, 8, heads=2),
)


def work(layer: Callable[[Any], Any], parameters: list[Tensor], x: Any, grad: Tensor, bfloat16: bool) -> Work:
    """Outputs of a layer, and the gradients of its input and parameters."""
    leaf = x.data if isinstance(x, PackedSequence) else x
    grads = {grad.dtype: grad}

    def forward() -> Tensor:
        with torch.autocast(leaf.device.type, torch.bfloat16, enabled=bfloat16):
            y = layer(x)[0]
        outputs: Tensor = y.data if isinstance(y, PackedSequence) else y
        if outputs.dtype not in grads:
            grads[outputs.dtype] = grad.to(outputs.dtype)
        return outputs

    def backward(y: Tensor) -> Any:
        return torch.autograd.grad(y, [leaf, *parameters], grads[y.dtype])

    return Work(forward, backward)


def contenders(case: Case, dtype: str, device: str) -> tuple[dict[str, Work], dict[str, dict[str, Any]]]:
    """torch.nn first if it has the cell, then every rule of statefeed; the result of ``explain`` for each rule."""
    bfloat16 = dtype == "bfloat16"
    x, grad = case.data(device)
    found = {}
    if hasattr(nn, case.cell.upper()):
        plain = case.layer(nn, device)
        found["torch.nn"] = work(plain, list(plain.parameters()), x, grad, bfloat16)
    kernels = {}
    for rule in RULES:
        layer = case.layer(sf, device)
        layer.feedback = rule
        found[rule] = work(layer, list(layer.parameters()), x, grad, bfloat16)
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            explanation = sf.explain(layer, x)
        kernels[rule] = {"forward": explanation.forward, "backward": explanation.backward, "why": explanation.why}
    return found, kernels


def run(options: Options) -> Iterator[dict[str, Any]]:
    """Time the most important cases in every precision, then FlashRNN, then the other cases as users run them.

    Yields:
        One record per contender, with the times, or ``failed`` or ``not_run``.
    """
    if options.smoke:
        yield from _cases(SMOKE, DTYPES[options.device], options)
        return
    yield from _cases(DECIDING, DTYPES[options.device], options)
    if options.device == "cuda":
        yield from rivals.flashrnn(options)
    yield from _cases(BROAD, USUAL, options)


def _cases(cases: Sequence[Case], dtypes: Sequence[str], options: Options) -> Iterator[dict[str, Any]]:
    for dtype, case in ((dtype, case) for dtype in dtypes for case in cases):
        record: dict[str, Any] = {**case._asdict(), "dtype": dtype, "device": options.device, "repeats": options.rounds}
        if options.time_left() <= 0:
            yield {**record, "not_run": "no time left"}
            continue
        try:
            with applied(SETTINGS[dtype]):
                record["tf32"] = flags()
                timed, kernels = contenders(case, dtype, options.device)
                times = measure(timed, options.rounds, options.device)
        except Exception as error:  # for example out of memory
            yield {**record, "failed": f"{type(error).__name__}: {error}"}
            continue
        for name, found in times.items():
            yield {**record, "contender": name, "kernels": kernels.get(name), **found}
        del timed, times
        gc.collect()
