"""``python -m statefeed.bench.paths``: where ``"bptt"`` is slower than torch.nn, and what its table of paths costs."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import statefeed as sf
from statefeed.bench.measure import (
    NO_ONEDNN,
    SHIPPED,
    Seconds,
    Setting,
    applied,
    clock,
    environment,
    float32_settings,
    interleaved,
    spread,
)
from statefeed.bench.options import FEWEST_REPEATS, OptionError, Shape, check_folder, check_projection, names, shapes
from statefeed.bench.records import written

CELLS = ("rnn", "gru", "lstm")
DTYPES = ("float32", "bfloat16", "float64")
FORMS = ("padded", "packed", "bidirectional", "stacked")
PASSES = ("training", "no_grad")
# Common shapes of recurrent networks, then the borders of the table.
SHAPES = (
    "64x32x256,64x128x256,512x4x256,1024x1x128,32x256x128,50x64x1024,2000x2x32,500x1x64,16x16x64,4x16x64,1x1x256,"
    "1x64x256,1x1x64,2x1x64,2x16x64,3x16x64,4x1x64,8x1x64,8x16x64,16x1x64,32x16x64,48x16x128,100x16x64,100x32x64,"
    "4x64x256,16x64x256,40x32x256"
)
# A case is slower where it has less than this part of torch.nn's speed and takes so many more microseconds a call,
# both with torch's settings that suit them best.
ENOUGH, FEW_MICROSECONDS = 0.98, 5.0
SECONDS = 5e-3  # of one measurement: short calls are repeated
AGAIN = 4  # times as many rounds for a case that seems slower: among hundreds of equal cases a few do, by chance


class Case(NamedTuple):
    """One comparison; I = H."""

    cell: str
    dtype: str
    form: str
    work: str
    shape: Shape
    projection: int = 0

    def input(self) -> Tensor | PackedSequence:
        """Unit normal; lengths of a packed batch fall from T to T / 2."""
        torch.manual_seed(1)
        T, B, H = self.shape
        x = torch.randn(T, B, H, dtype=self.parameters, device="cpu")
        if self.form != "packed":
            return x
        return pack_padded_sequence(x, torch.linspace(T, (T + 1) // 2, B, device="cpu").long())

    @property
    def parameters(self) -> torch.dtype:
        """dtype of the parameters."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    def layer(self, kind: Any) -> nn.RNNBase:
        """A layer of some class, always with the same weights."""
        torch.manual_seed(0)
        layers, both = 2 if self.form == "stacked" else 1, self.form == "bidirectional"
        H, projection = self.shape.H, {"proj_size": self.projection} if self.projection else {}
        made: nn.RNNBase = kind(H, H, layers, bidirectional=both, dtype=self.parameters, **projection)
        return made


def contenders(case: Case) -> dict[str, Callable[[], Seconds]]:
    """torch.nn under every setting of the same precision, the exact rule, and the kernels whatever the table says.

    The settings are global to torch. Where the exact rule runs torch's own path, it has the choice of them too.
    """
    name = case.cell.upper()
    plain, ours = getattr(nn, name), getattr(sf, name)
    kernels = type(f"Kernels{name}", (ours,), {"is_faster_in_torch": lambda self, input: False})
    settings = float32_settings("cpu") if case.dtype == "float32" else [SHIPPED]
    tried = [s for s in settings if s != NO_ONEDNN or (case.cell == "lstm" and not case.projection)]
    x = case.input()
    found = {f"torch.nn {s.name}": _runner(case, case.layer(plain), x, s) for s in tried}
    others = [s for s in tried if s != SHIPPED] if "torch.nn" in explained(case).forward else []
    return {
        **found,
        "bptt": _runner(case, case.layer(ours), x, SHIPPED),
        **{f"bptt {s.name}": _runner(case, case.layer(ours), x, s) for s in others},
        "kernels": _runner(case, case.layer(kernels), x, SHIPPED),
    }


def explained(case: Case) -> sf.Explanation:
    """What the exact rule does in a case."""
    with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bfloat16"):
        return sf.explain(case.layer(getattr(sf, case.cell.upper())), case.input())


def _runner(case: Case, layer: nn.RNNBase, x: Tensor | PackedSequence, setting: Setting) -> Callable[[], Seconds]:
    data = x.data if isinstance(x, PackedSequence) else x
    leaf = data.clone().requires_grad_(case.work == "training")
    given = x._replace(data=leaf) if isinstance(x, PackedSequence) else leaf

    def outputs() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bfloat16"):
            y: Tensor | PackedSequence = layer(given)[0]
        return y.data if isinstance(y, PackedSequence) else y

    grad = torch.ones_like(outputs())

    def once() -> None:
        if case.work == "training":
            torch.autograd.grad(outputs(), [leaf, *layer.parameters()], grad)
        else:
            with torch.no_grad():
                outputs()

    def run() -> Seconds:
        with applied(setting):
            once()
            start = clock("cpu")
            once()
            took = clock("cpu") - start
            repeats = max(1, min(1000, int(SECONDS / max(took, 1e-6))))
            start = clock("cpu")
            for _ in range(repeats):
                once()
            return ((clock("cpu") - start) / repeats,)

    return run


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """The record of one case; of a second, longer measurement where ``"bptt"`` is slower in the first."""
    record = measure_once(case, rounds)
    return measure_once(case, AGAIN * rounds) if record["slower"] else record


def measure_once(case: Case, rounds: int) -> dict[str, Any]:
    """Times, ratios in turns, the table's path, and whether ``"bptt"`` is slower."""
    seconds = {name: [s for (s,) in turns] for name, turns in interleaved(contenders(case), rounds).items()}

    def fastest(kind: str) -> str:
        return min((n for n in seconds if n.startswith(kind)), key=lambda n: statistics.median(seconds[n]))

    best, ours = fastest("torch.nn"), fastest("bptt")
    rows = {"bptt": ours, "bptt as shipped": "bptt", "kernels": "kernels"}
    ratios = {n: spread([t / s for t, s in zip(seconds[best], seconds[of], strict=True)]) for n, of in rows.items()}
    extra = spread([1e6 * (s - t) for t, s in zip(seconds[best], seconds[ours], strict=True)])
    found = explained(case)
    T, B, H = case.shape
    return {
        "bench": "paths",
        "cell": case.cell,
        "dtype": case.dtype,
        "form": case.form,
        "pass": case.work,
        "T": T,
        "B": B,
        "H": H,
        "projection": case.projection,
        "repeats": rounds,
        "path": found.forward,
        "why": found.why,
        "ms": {name: spread([1e3 * s for s in values]) for name, values in seconds.items()},
        "torch_nn_best": best.removeprefix("torch.nn "),
        "bptt_best": ours.removeprefix("bptt").strip() or SHIPPED.name,
        "times_faster": ratios,
        "extra_us": extra,
        "slower": ratios["bptt"]["median"] < ENOUGH and extra["median"] > FEW_MICROSECONDS,
    }


def run(cases: Sequence[Case], rounds: int, output: Path, argv: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measure the cases and write each record immediately."""
    command = f"python -m statefeed.bench.paths {' '.join(argv)}".rstrip()
    metadata = {**environment(argv, "cpu"), "command": command}
    return written(({**measure(case, rounds), **metadata} for case in cases), output)


def main(argv: Sequence[str]) -> int:
    """Measure, write the records and print one line for each case.

    Returns:
        Exit code: 0; 1 if ``"bptt"`` is slower than torch.nn anywhere; 2 for invalid flags.
    """
    parser = argparse.ArgumentParser(prog="python -m statefeed.bench.paths", description=__doc__, allow_abbrev=False)
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--dtypes", default="float32,bfloat16", help=", ".join(DTYPES))
    parser.add_argument("--forms", default="padded", help=", ".join(FORMS))
    parser.add_argument("--passes", default=",".join(PASSES))
    parser.add_argument("--shapes", default=SHAPES, help="steps x sequences x width, separated by commas")
    parser.add_argument("--projection", type=int, default=0, help="proj_size, with --cells=lstm; 0: no projection")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("paths.jsonl"), help="JSONL file, overwritten")
    flags = parser.parse_args(argv)
    try:
        check_folder(flags.output)
        if flags.repeats < FEWEST_REPEATS or flags.threads < 1:
            raise OptionError(f"repeats must be at least {FEWEST_REPEATS}, and threads at least 1")
        check_projection(flags.projection, flags.cells, shapes(flags.shapes))
        cases = [
            Case(cell, dtype, form, work, shape, flags.projection)
            for cell in names("cells", flags.cells, CELLS)
            for dtype in names("dtypes", flags.dtypes, DTYPES)
            for form in names("forms", flags.forms, FORMS)
            for work in names("passes", flags.passes, PASSES)
            for shape in shapes(flags.shapes)
        ]
    except OptionError as error:
        parser.error(str(error))
    torch.set_num_threads(flags.threads)
    slower = 0
    for record in run(cases, flags.repeats, flags.output, argv):
        slower += record["slower"]
        ratios, shape = record["times_faster"], f"{record['T']}x{record['B']}x{record['H']}"
        print(
            f"{record['cell']:4} {record['dtype']:8} {record['form']:6} {record['pass']:8} {shape:12} "
            f"bptt {ratios['bptt']['median']:.2f} kernels {ratios['kernels']['median']:.2f} "
            f"{record['extra_us']['median']:+.0f} us{'  SLOWER' if record['slower'] else ''}",
            flush=True,
        )
    print(f"{slower} of {len(cases)} cases are slower than torch.nn; records in {flags.output}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
