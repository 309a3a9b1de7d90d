"""``statefeed bench training``: the trainer end to end, against the published procedure and torch.nn in the same loop.

The models are two of the published ones: a GRU of 1x256 with a skip connection on sentences of Penn Treebank words, and
pre-norm blocks with GRUs of 3x512 on blocks of WikiText-103 byte pairs, with synthetic tokens. All contenders have the
same weights and train on the same batches, which are formed again in every repetition.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

import statefeed as sf
from statefeed.bench.measure import (
    NO_ONEDNN,
    ParityError,
    float32_settings,
    interleaved,
    machine_line,
    spread,
    usual,
)
from statefeed.bench.options import TRAINING_DTYPES, names, rules_of
from statefeed.bench.options import TrainingOptions as Options
from statefeed.bench.published import published
from statefeed.bench.training_contenders import (
    RECIPES,
    Contender,
    Recipe,
    Recurrence,
    contenders,
    everywhere,
    model_of,
    rival,
)
from statefeed.bench.training_text import load_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from statefeed.lm.data.batches import Batch

# Allowed errors relative to the largest value, as for one layer; lower precision is compared with float32.
_ALLOWED = {
    "float32": {"loss": 1e-5, "gradient": 1e-3},
    "tf32": {"loss": 1e-3, "gradient": 3e-2},
    "bfloat16": {"loss": 1e-2, "gradient": 1e-1},
}


def run(options: Options) -> Iterator[dict[str, Any]]:
    """Measure every contender in every dtype.

    Args:
        options: checked options.

    Yields:
        One record per contender and dtype, after the parity check of all of them.

    Raises:
        ParityError: a contender is wrong; nothing was timed.
        OptionError: ``data`` does not contain the corpus.
    """
    recipe = RECIPES[options.recipe]
    if options.smoke:
        recipe = recipe._replace(width=16, batch=8)
    source, vocabulary, corpus = load_text(options, recipe)
    tried = {}
    for dtype in names("dtypes", options.dtypes, TRAINING_DTYPES[options.device]):
        own = [usual(options.device, dtype)]
        if dtype == "float32":  # a GRU does not use oneDNN
            own = [setting for setting in float32_settings(options.device) if setting != NO_ONEDNN]
        tried[dtype] = own
    entries = contenders(recipe, vocabulary, rules_of("gru", options.rules), tried, options.device)
    (batch,) = itertools.islice(source.epoch(0), 1)
    check_parity(recipe, entries, batch)
    steps = min(options.steps, len(source))
    seconds = interleaved(
        {entry.name: lambda entry=entry: entry.train(source, steps) for entry in entries},  # type: ignore[misc]
        options.rounds,
    )
    tokens = [
        sum(int((batch.targets >= 0).sum()) for batch in itertools.islice(source.epoch(epoch), steps))
        for epoch in range(1, options.rounds + 1)  # epoch 0 is the warm-up
    ]
    total = {name: [sum(phases) for phases in repetitions] for name, repetitions in seconds.items()}
    for entry in entries:
        times = total[entry.name]
        baselines = _baselines(entries, total, entry.dtype)
        yield {
            "bench": "training",
            "recipe": options.recipe,
            "implementation": entry.implementation,
            "variant": entry.variant,
            "dtype": entry.dtype,
            "kernels": _kernels(entry, batch),
            **corpus,
            "cell": "gru",
            "layers": recipe.layers,
            "width": recipe.width,
            "batch": len(batch.inputs[0]),
            "context": recipe.context,
            "device": options.device,
            "repeats": options.rounds,
            "steps": steps,
            "tokens": spread(tokens),
            "tokens_per_s": spread([count / s for count, s in zip(tokens, times, strict=True)]),
            "step_ms": spread([1e3 * s / steps for s in times]),
            "times_faster_than": {
                label: spread([other / s for other, s in zip(total[name], times, strict=True)])
                for label, name in baselines.items()
            },
        }


def _baselines(entries: Sequence[Contender], total: dict[str, list[float]], dtype: str) -> dict[str, str]:
    """The baselines: the published procedure in float32 and in the dtype, and torch.nn in the dtype."""
    rivals = [e.name for e in entries if e.implementation == "torch.nn" and e.dtype == dtype]
    best = min(rivals, key=lambda name: spread(total[name])["median"])
    found = {"published float32": "published dsf float32", f"published {dtype}": f"published dsf {dtype}"}
    known = {label: name for label, name in found.items() if name in total}
    return {**known, "torch.nn as shipped": rivals[0], "torch.nn at its best": best}


def check_parity(recipe: Recipe, entries: Sequence[Contender], batch: Batch) -> None:
    """Compare losses with torch.nn, and the gradients of exact rules and of dsf with a reference, on one batch.

    Args:
        recipe: recipe of the model.
        entries: all contenders.
        batch: a batch of the training text.

    Raises:
        ParityError: an error is above the allowed one.
    """
    weight = entries[0].model.embedding.weight
    device, vocabulary = weight.device.type, len(weight)
    ways: dict[str, Recurrence] = {"bptt": lambda gru, x: gru(x), "dsf": published}
    truth = {}
    for rule, way in ways.items():
        model = rival(model_of(recipe, vocabulary, "bptt"), way).to(device)
        setting = usual(device, "float32")
        truth[rule] = Contender("truth", rule, "float32", model, everywhere, setting, recipe).gradients(batch)
    for entry in entries:
        found = entry.gradients(batch)
        rule = "bptt" if entry.implementation == "torch.nn" or sf.Feedback(entry.variant).exact else entry.variant
        for name, value in truth.get(rule, {"loss": truth["bptt"]["loss"]}).items():
            error = float((found[name] - value).abs().max() / value.abs().max())
            what = "loss" if name == "loss" else "gradient"
            if not error <= (allowed := _ALLOWED[entry.dtype][what]):
                raise ParityError(
                    f"the {what} {name} of {entry.name} must agree with torch's within {allowed:.0e} of its largest "
                    f"value, got {error:.1e}; nothing was timed"
                )


def _kernels(entry: Contender, batch: Batch) -> dict[str, str] | None:
    """The kernels of a statefeed layer and the reason for them; None for other layers."""
    layer = next((module for module in entry.model.modules() if isinstance(module, sf.GRU)), None)
    if layer is None:
        return None
    device = entry.model.head.weight.device
    with torch.autocast(device.type, torch.bfloat16, enabled=entry.dtype == "bfloat16"):
        explanation = sf.explain(layer, torch.zeros(*batch.inputs.shape, layer.input_size, device=device))
    return {"forward": explanation.forward, "backward": explanation.backward, "why": explanation.why}


def table(records: Sequence[dict[str, Any]]) -> Table:
    """One row per record."""
    from rich.table import Table

    result = Table(
        title="training end to end: median of the repetitions (min-max)",
        caption="x: times faster than (below 1: slower), per repetition",
    )
    for heading in ("dtype", "what"):
        result.add_column(heading, no_wrap=True)
    for heading in ("tokens/s", "ms per step", "x published float32", "x published", "x nn shipped", "x nn best"):
        result.add_column(heading, justify="right", no_wrap=True)
    for r in records:
        speed, ratios = r["tokens_per_s"], r["times_faster_than"]
        labels = ("published float32", f"published {r['dtype']}", "torch.nn as shipped", "torch.nn at its best")
        result.add_row(
            r["dtype"],
            f"{r['implementation']} {r['variant']}",
            f"{speed['median']:,.0f} ({speed['min']:,.0f} to {speed['max']:,.0f})",
            f"{r['step_ms']['median']:.0f}",
            *(f"{ratios[label]['median']:.2f}" if label in ratios else "-" for label in labels),
        )
    return result


def figure(records: Sequence[dict[str, Any]]) -> Figure:
    """Tokens per second, one bar per record."""
    from matplotlib.figure import Figure

    result = Figure(figsize=(8, 1 + 0.4 * len(records)), layout="constrained")
    axes = result.add_subplot(xlabel="tokens per second")
    speeds = [r["tokens_per_s"] for r in records]
    reach = [[s["median"] - s["min"] for s in speeds], [s["max"] - s["median"] for s in speeds]]
    colors = ["C0" if r["implementation"] == "statefeed" else "0.6" for r in records]
    axes.barh(range(len(records)), [s["median"] for s in speeds], xerr=reach, color=colors)
    axes.set_yticks(range(len(records)), [f"{r['implementation']} {r['variant']}, {r['dtype']}" for r in records])
    axes.invert_yaxis()
    axes.set_title(f"{machine_line(records)}\nmedians of the repetitions; error bars: minimum to maximum", fontsize=9)
    return result
