"""``statefeed bench layers``: a stack of layers, in training or forward alone, against torch.nn or other rivals."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import statefeed as sf
from statefeed.bench.case import PADDED, Case, Contender, Input, contenders, settings_for
from statefeed.bench.layers_output import figure, narrow_table, table
from statefeed.bench.measure import float32_settings, interleaved, matmul_rates, spread
from statefeed.bench.options import DTYPES, LAYER_GATES, PASSES, Shape, names, rules_of, shapes
from statefeed.bench.options import LayerOptions as Options
from statefeed.bench.parity import check_parity
from statefeed.bench.slstm_rivals import missing_package
from statefeed.busy import OtherLoad

__all__ = ["Case", "Options", "check_parity", "compare", "contenders", "figure", "narrow_table", "run", "table"]


def run(options: Options) -> Iterator[dict[str, Any]]:
    """Measure all contenders of all cases.

    Args:
        options: checked options.

    Yields:
        One record per contender and case, after the parity check of all of them.

    Raises:
        ParityError: a contender is wrong; nothing was timed.
    """
    sizes = [Shape(5, 2, 16), Shape(7, 1, 8)] if options.smoke else shapes(options.shape_list)
    cases = [
        Case(
            cell,
            shape,
            dtype,
            options.device,
            options.layers,
            options.bidirectional,
            options.packed,
            kind == "training",
            options.projection,
        )
        for kind in names("pass", options.pass_, PASSES)
        for cell in names("cells", options.cells, tuple(LAYER_GATES))
        for dtype in names("dtypes", options.dtypes, DTYPES[options.device])
        for shape in sizes
    ]
    if any(case.cell == "slstm" for case in cases) and (reason := missing_package()):
        print(f"layers: no rows of the xlstm package: {reason}", file=sys.stderr)
    settings = float32_settings(options.device)
    plans = [(case, contenders(case, rules_for(case, options.rules), settings_for(case, settings))) for case in cases]
    count = sum(len(entries) for _, entries in plans)
    print(f"layers: checking {count} contenders against float64 before the first is timed", file=sys.stderr)
    parity = [check_parity(case, entries) for case, entries in plans]
    rates = matmul_rates(options.device, options.smoke)
    for (case, entries), errors in zip(plans, parity, strict=True):
        for record in compare(case, entries, options.rounds, rates):
            yield {**record, "parity": errors[f"{record['implementation']} {record['variant']}"]}


def rules_for(case: Case, rules: str) -> list[str]:
    """The rules of a case: the forward pass is the same under all, so that the first exact one stands for them."""
    found = rules_of(case.cell, rules)
    return found if case.training else [next((rule for rule in found if sf.Feedback(rule).exact), found[0])]


def kernels(entry: Contender, data: Input) -> dict[str, str] | None:
    """The kernels of a statefeed layer and the reason for them; None for other layers."""
    if not isinstance(entry.layer, sf.FeedbackLayer):
        return None
    with (
        torch.autocast(data.x.device.type, torch.bfloat16, enabled=entry.autocast),
        torch.set_grad_enabled(entry.training),
    ):
        explanation = sf.explain(entry.layer, data.argument())
    return {"forward": explanation.forward, "backward": explanation.backward, "why": explanation.why}


def compare(
    case: Case, entries: Sequence[Contender], rounds: int, rates: dict[str, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Time the contenders of a case alternately and yield one record each.

    Args:
        case: the comparison.
        entries: its contenders, torch.nn as shipped first if the cell is one of torch's.
        rounds: repetitions.
        rates: product rates of this machine, from ``matmul_rates``.
    """
    load = OtherLoad()
    inputs = {padded: case.data(padded=padded) for padded in {entry.padded for entry in entries}}
    seconds = interleaved(
        {entry.name: lambda entry=entry: entry.once(inputs[entry.padded]) for entry in entries},  # type: ignore[misc]
        rounds,
    )
    others = load.processors()
    total = {name: [1e3 * sum(phases) for phases in turns] for name, turns in seconds.items()}

    def best_of(implementation: str) -> str:
        own = (entry.name for entry in entries if entry.implementation == implementation)
        return min(own, key=lambda name: spread(total[name])["median"])

    present = {entry.implementation for entry in entries}
    best, baselines = None, {}
    if "torch.nn" in present:
        best = best_of("torch.nn")
        baselines = {"torch.nn as shipped": entries[0].name, "torch.nn at its best": best}
    baselines |= {name: best_of(name) for name in ("torch.compile", "xlstm") if name in present}
    if PADDED in present:
        baselines[PADDED] = best_of(PADDED)
    if "published" in present:
        baselines["published"] = "published dsf"
    T, B, H = case.shape
    rate = rates[case.dtype]
    limit = 1e3 * case.flops / (1e9 * rate["gflops"])
    for entry in entries:
        times = total[entry.name]
        phases = {
            f"{phase}_ms": spread([1e3 * s for s in of])
            for phase, of in zip(("forward", "backward"), zip(*seconds[entry.name], strict=True), strict=False)
        }
        if case.training:
            phases["backward_us_per_step"] = spread([1e6 * phase[1] / T for phase in seconds[entry.name]])
        yield {
            "bench": "layers",
            "implementation": entry.implementation,
            "variant": entry.variant,
            "kernels": kernels(entry, inputs[entry.padded]),
            "cell": case.cell,
            "T": T,
            "B": B,
            "I": H,
            "H": H,
            "dtype": case.dtype,
            "device": case.device,
            "pass": "training" if case.training else "forward",
            "layers": case.layers,
            "bidirectional": case.bidirectional,
            "projection": case.projection,
            "packed": case.packed,
            "rows": case.rows,
            "repeats": rounds,
            "ms": spread(times),
            **phases,
            "times_faster_than": {
                label: spread([b / m for b, m in zip(total[name], times, strict=True)])
                for label, name in baselines.items()
            },
            "torch_nn_best": best and best.removeprefix("torch.nn "),
            "limit_ms": limit,
            "part_of_limit": limit / spread(times)["median"],
            "matmul": rate,
            "other_load": others,
        }
