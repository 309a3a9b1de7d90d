"""``python -m statefeed.bench.custom``: Recurrent against a loop over the same cell under plain autograd."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import statefeed as sf
from statefeed.bench.custom_cells import CELLS
from statefeed.bench.measure import ParityError, Seconds, clock, environment, interleaved, spread
from statefeed.bench.options import FEWEST_REPEATS, PASSES, OptionError, Shape, check_folder, names, shapes
from statefeed.bench.records import written

SHAPES = "64x32x256,512x4x64"
FORMS = ("whole", "split", "compiled")
LOOP = "loop"
_PARITY = 1e-3  # of the gradients' largest value, in float32


class Case(NamedTuple):
    """One comparison; I = H, float32."""

    cell: str
    work: str
    shape: Shape

    def input(self) -> Tensor:
        """Unit normal, (T, B, H)."""
        torch.manual_seed(1)
        return torch.randn(*self.shape, device="cpu", requires_grad=self.work == "training")

    def module(self, form: str) -> nn.Module:
        """The cell, always with the same weights."""
        torch.manual_seed(0)
        forms = CELLS[self.cell]
        made: nn.Module = (forms.whole if form == "whole" else forms.split)(self.shape.H, self.shape.H)
        return made

    def rules(self, rules: Sequence[str]) -> Sequence[str]:
        """The rules to run: all in training; without autograd they do the same."""
        return rules if self.work == "training" else rules[:1]


class Contender(NamedTuple):
    """One way to run the cell over time: the module with the parameters, and x -> y."""

    module: nn.Module
    forward: Callable[[Tensor], Tensor]

    def once(self, case: Case, x: Tensor, grad: Tensor) -> list[Tensor]:
        """One forward pass, and the gradients in training."""
        if case.work == "forward":
            with torch.no_grad():
                return [self.forward(x)]
        y = self.forward(x)
        return [y, *torch.autograd.grad(y, [x, *self.module.parameters()], grad)]


def contenders(case: Case, forms: Sequence[str], rules: Sequence[str]) -> dict[str, Contender]:
    """The loop over the whole cell, and Recurrent in every form under every rule."""
    cell = case.module("whole")
    initial = torch.zeros(case.shape.B, case.shape.H, device="cpu")

    def loop(x: Tensor) -> Tensor:
        h, outputs = initial, []
        for step in x:
            h = cell(step, h)
            outputs.append(h)
        return torch.stack(outputs)

    found = {LOOP: Contender(cell, loop)}
    for form in forms:
        for rule in case.rules(rules):
            layer = sf.Recurrent(case.module(form), rule, compile_step=form == "compiled")
            found[f"{form} {rule}" if case.work == "training" else form] = Contender(layer, _outputs(layer))
    return found


def _outputs(layer: sf.Recurrent) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y: Tensor = layer(x)[0]
        return y

    return forward


def measure(case: Case, rounds: int, forms: Sequence[str], rules: Sequence[str]) -> dict[str, Any]:
    """The record of one case: times, ratios in turns, and the seconds of every first call, which compiles.

    Raises:
        ParityError: outputs, or gradients under an exact rule, differ from the loop's.
    """
    x = case.input()
    found = contenders(case, forms, rules)
    grad = torch.ones(*case.shape, device="cpu")
    expected, first_call = found[LOOP].once(case, x, grad), {}
    for name, contender in found.items():
        start = time.perf_counter()
        results = contender.once(case, x, grad)
        first_call[name] = time.perf_counter() - start
        exact = name == LOOP or case.work == "forward" or sf.Feedback(name.split()[1]).exact
        _check_parity(f"{case.cell} {name}", results if exact else results[:1], expected)

    def runner(contender: Contender) -> Callable[[], Seconds]:
        def run() -> Seconds:
            start = clock("cpu")
            contender.once(case, x, grad)
            return (clock("cpu") - start,)

        return run

    turns = interleaved({name: runner(contender) for name, contender in found.items()}, rounds)
    seconds = {name: [s for (s,) in values] for name, values in turns.items()}
    T, B, H = case.shape
    return {
        "bench": "custom",
        "cell": case.cell,
        "dtype": "float32",
        "pass": case.work,
        "T": T,
        "B": B,
        "H": H,
        "repeats": rounds,
        "ms": {name: spread([1e3 * s for s in values]) for name, values in seconds.items()},
        "times_faster": {
            name: spread([t / s for t, s in zip(seconds[LOOP], values, strict=True)])
            for name, values in seconds.items()
            if name != LOOP
        },
        "first_call_s": {name: s for name, s in first_call.items() if name.startswith("compiled")},
    }


def _check_parity(name: str, results: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for found, right in zip(results, expected, strict=False):
        difference = float((found - right).detach().abs().max())
        allowed = _PARITY * max(float(right.detach().abs().max()), 1e-6)
        if not difference <= allowed:
            raise ParityError(f"{name} must agree with the loop to {allowed:.3g}, got a difference of {difference:.3g}")


def run(
    cases: Sequence[Case], rounds: int, forms: Sequence[str], rules: Sequence[str], output: Path, argv: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Measure the cases and write each record immediately."""
    command = f"python -m statefeed.bench.custom {' '.join(argv)}".rstrip()
    metadata = {**environment(argv, "cpu"), "command": command}
    return written(({**measure(case, rounds, forms, rules), **metadata} for case in cases), output)


def main(argv: Sequence[str]) -> int:
    """Measure, write the records and print one line for each case and contender.

    Returns:
        Exit code: 0; 1 if a contender disagrees with the loop; 2 for invalid flags.
    """
    parser = argparse.ArgumentParser(prog="python -m statefeed.bench.custom", description=__doc__, allow_abbrev=False)
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--forms", default=",".join(FORMS), help="whole, split at the input, split and compiled")
    parser.add_argument("--rules", default="bptt,dsf")
    parser.add_argument("--passes", default=",".join(PASSES))
    parser.add_argument("--shapes", default=SHAPES, help="steps x sequences x width, separated by commas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("custom.jsonl"), help="JSONL file, overwritten")
    flags = parser.parse_args(argv)
    try:
        check_folder(flags.output)
        if flags.repeats < FEWEST_REPEATS or flags.threads < 1:
            raise OptionError(f"repeats must be at least {FEWEST_REPEATS}, and threads at least 1")
        forms, rules = names("forms", flags.forms, FORMS), _rules(flags.rules)
        cases = [
            Case(cell, work, shape)
            for cell in names("cells", flags.cells, tuple(CELLS))
            for shape in shapes(flags.shapes)
            for work in names("passes", flags.passes, PASSES)
        ]
    except OptionError as error:
        parser.error(str(error))
    torch.set_num_threads(flags.threads)
    try:
        for record in run(cases, flags.repeats, forms, rules, flags.output, argv):
            print(f"{record['cell']} {record['T']}x{record['B']}x{record['H']} {record['pass']}", flush=True)
            for name, ms in record["ms"].items():
                ratio = record["times_faster"].get(name, {"median": 1.0})["median"]
                print(f"  {name:16} {ms['median']:8.2f} ms  {ratio:5.2f} times the loop's speed", flush=True)
    except ParityError as error:
        print(f"statefeed.bench.custom: {error}", file=sys.stderr)
        return 1
    print(f"records in {flags.output}")
    return 0


def _rules(text: str) -> list[str]:
    """The rules, "bptt" and others that a custom cell supports.

    Raises:
        OptionError: an invalid spelling.
    """
    rules = [word.strip() for word in text.split(",")]
    try:
        for rule in rules:
            sf.Recurrent(nn.GRUCell(1, 1), rule)
    except ValueError as error:
        raise OptionError(f"rules: {error}") from None
    return rules


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
