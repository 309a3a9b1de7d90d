"""Stage "training": steps of the recipe wikitext103-gru-3x512 on synthetic tokens, under every rule.

The model is that of the recipe, in plain torch: embedding, three pre-norm blocks around a GRU, head over
16,000 byte pairs, Adam, 128 sequences of 256 tokens. Its loss is torch's, so that the records show the
speed-up of a rule in a training loop, not that of the trainer. Each step is timed in eager mode, and as a CUDA graph of
the whole step, which removes the time that the host needs to launch kernels.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import statefeed as sf
from statefeed.bench.gpu.layers import DTYPES, RULES, SETTINGS
from statefeed.bench.gpu.stage import Options
from statefeed.bench.gpu.timing import capture, peak_bytes, replays
from statefeed.bench.measure import Seconds, applied, clock, interleaved, spread
from statefeed.bench.precision import flags


class Sizes(NamedTuple):
    """Sizes of the recipe: L blocks of H units, V token types, B sequences of T tokens."""

    layers: int = 3
    width: int = 512
    vocabulary: int = 16_000
    batch: int = 128
    context: int = 256


_SMOKE = Sizes(2, 8, 50, 3, 5)
_LR = 1e-3


class Block(nn.Module):
    """x + linear(rnn(norm(x))), then x + mlp(norm(x)).

    Args:
        width: H.
        rule: rule of the GRU; None for torch.nn's GRU.
    """

    def __init__(self, width: int, rule: str | None) -> None:
        super().__init__()
        self.rnn_norm = nn.LayerNorm(width)
        self.rnn = nn.GRU(width, width) if rule is None else sf.GRU(width, width, feedback=rule)
        self.linear = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.linear(self.rnn(self.rnn_norm(x))[0])
        y: Tensor = x + self.narrow(F.gelu(self.widen(self.mlp_norm(x))))
        return y


class Model(nn.Module):
    """Ids (T, B) to logits (T, B, V); parameters have the names of the trainer's model."""

    def __init__(self, sizes: Sizes, rule: str | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.blocks = nn.ModuleList([Block(sizes.width, rule) for _ in range(sizes.layers)])
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.vocabulary)
        for module in (self.embedding, self.head):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Contender:
    """A model under a rule, and its optimizer.

    Args:
        sizes: sizes of the model.
        rule: rule of its GRUs; None for torch.nn's GRU.
        dtype: a key of ``layers.SETTINGS``.
        device: cpu or cuda.
    """

    def __init__(self, sizes: Sizes, rule: str | None, dtype: str, device: str) -> None:
        torch.manual_seed(0)
        self.model, self.device, self.bfloat16 = Model(sizes, rule).to(device), device, dtype == "bfloat16"
        graphs = device == "cuda"  # capturable: the step count is on the device, as a CUDA graph needs it
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=_LR, fused=True, capturable=graphs)
        self.loss = torch.zeros((), device=device)

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """One training step, without waiting for the device."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16):
            loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.loss = loss.detach()

    def steps(self, batch: tuple[Tensor, Tensor], count: int) -> tuple[float, ...]:
        """Seconds of some training steps, queued consecutively."""
        start = clock(self.device)
        for _ in range(count):
            self.step(*batch)
        return (clock(self.device) - start,)


def tokens(sizes: Sizes, device: str) -> tuple[Tensor, Tensor]:
    """Inputs and targets (T, B) that follow Zipf's law."""
    weights = 1 / (np.arange(sizes.vocabulary) + 2.7)
    shape = (sizes.context + 1, sizes.batch)
    ids = np.random.default_rng(0).choice(sizes.vocabulary, shape, p=weights / weights.sum())
    text = torch.from_numpy(ids).to(device)
    return text[:-1].contiguous(), text[1:].contiguous()


def run(options: Options) -> Iterator[dict[str, Any]]:
    """Time training steps in every precision.

    Yields:
        One record per contender, with tokens per second, or ``failed`` or ``not_run``.
    """
    sizes = _SMOKE if options.smoke else Sizes()
    batch = tokens(sizes, options.device)
    for dtype in DTYPES[options.device]:
        record = {**sizes._asdict(), "cell": "gru", "dtype": dtype, "device": options.device, "repeats": options.rounds}
        if options.time_left() <= 0:
            yield {**record, "not_run": "no time left"}
            continue
        with applied(SETTINGS[dtype]):
            record["tf32"] = flags()
            for name, found in _compare(sizes, batch, dtype, options).items():
                yield {**record, "contender": name, **found}
        gc.collect()


def _compare(sizes: Sizes, batch: tuple[Tensor, Tensor], dtype: str, options: Options) -> dict[str, dict[str, Any]]:
    """Times and peak memory of every contender's steps, measured alternately, or its failure."""
    entries: dict[str, Contender] = {}
    found: dict[str, dict[str, Any]] = {}
    for name in ("torch.nn", *RULES):
        try:
            entry = Contender(sizes, None if name == "torch.nn" else name, dtype, options.device)
            entry.step(*batch)  # warm-up: compiles and loads the kernels
            found[name] = {"peak_bytes": peak_bytes(lambda entry=entry: entry.step(*batch), options.device)}  # type: ignore[misc]
            if not bool(entry.loss.isfinite()):
                raise RuntimeError(f"the loss must be finite, got {float(entry.loss)}")
        except Exception as error:  # for example out of memory
            found[name] = {"failed": f"{type(error).__name__}: {error}"}
            continue
        entries[name] = entry
    count = 1 if options.smoke else 3
    seconds = interleaved({n: lambda e=e: e.steps(batch, count) for n, e in entries.items()}, options.rounds)  # type: ignore[misc]
    _add_times(found, seconds, count, "step_ms", "times_faster_than")
    for name, entry in entries.items():
        found[name]["tokens_per_s"] = spread([batch[0].numel() * count / s for (s,) in seconds[name]])
        found[name]["loss"] = float(entry.loss)
    if options.device == "cuda":
        graphs: dict[str, torch.cuda.CUDAGraph] = {}
        for name, entry in entries.items():
            try:
                graphs[name] = capture(lambda entry=entry: entry.step(*batch))  # type: ignore[misc]
            except Exception as error:
                found[name]["graph_failed"] = f"{type(error).__name__}: {error}"
        replayed = interleaved({n: lambda g=g: replays(g, count) for n, g in graphs.items()}, options.rounds)  # type: ignore[misc]
        _add_times(found, replayed, 1, "graph_step_ms", "graph_times_faster_than")
    return found


def _add_times(
    found: dict[str, dict[str, Any]], seconds: dict[str, list[Seconds]], count: int, name: str, ratio: str
) -> None:
    """Add the time of one of ``count`` steps, and the ratio to torch.nn's, to every contender's record."""
    for contender, turns in seconds.items():
        step_seconds = [s for (s,) in turns]
        found[contender][name] = spread([1e3 * s / count for s in step_seconds])
        if baseline := seconds.get("torch.nn"):
            ratios = [b / s for (b,), s in zip(baseline, step_seconds, strict=True)]
            found[contender][ratio] = {"torch.nn": spread(ratios)}
