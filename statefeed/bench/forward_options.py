"""Options of ``statefeed bench forward``."""

from __future__ import annotations

from dataclasses import dataclass

from statefeed.bench.options import TRAINING_DTYPES, Options, names, numbers, option


@dataclass(frozen=True)
class ForwardOptions(Options):
    """The forward pass in parallel over time: iterations, and with --timed its time against torch.nn's."""

    cells: str = option("rnn,gru,lstm", "cells with random weights, among rnn (tanh), gru and lstm; none for none")
    scales: str = option("1", "factors of torch's random W_hh, whole numbers separated by commas")
    runs: str = option("", "folders of trained language models, separated by commas; their layers read their own text")
    steps: str = option("64,256,1024,4096", "values of T, separated by commas")
    batches: str = option("1", "values of B, separated by commas")
    widths: str = option("256", "values of H for random weights, separated by commas")
    tolerances: str = option("1e-3,1e-4,1e-5,1e-6", "largest defects of a step, separated by commas")
    max_iterations: int = option(100, "iterations after which the remaining steps run sequentially")
    dtype: str = option("float32", "float32 or, on a GPU, tf32, or bfloat16 (autocast)")
    timed: bool = option(False, "also measure the time, and that of torch.nn's forward pass")
    output: str = option("forward.jsonl", "JSONL file of the records, overwritten; the figure is written next to it")

    def __post_init__(self) -> None:
        super().__post_init__()
        names("dtype", self.dtype, TRAINING_DTYPES[self.device])
        for flag in ("scales", "steps", "batches", "widths"):
            numbers(flag, getattr(self, flag))
        from statefeed.bench import forward  # here, so that help and other errors are answered without torch

        forward.check(self)
