"""``statefeed bench layers``: one layer forward and backward, against torch.nn and the published procedure."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

import statefeed as sf
from statefeed.bench.measure import (
    NO_ONEDNN,
    ONEDNN_MATMUL,
    SHIPPED,
    ParityError,
    Seconds,
    Setting,
    applied,
    clock,
    float32_settings,
    interleaved,
    matmul_rates,
    spread,
    usual,
)
from statefeed.bench.options import OptionError, Shape, names, option, shapes
from statefeed.bench.options import Options as Common
from statefeed.bench.published import published

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

GATES = {"rnn": 1, "gru": 3, "lstm": 4}
# By device; tf32 is float32 with products in TF32 (10 bits of mantissa) by cuBLAS and cuDNN.
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "tf32", "bfloat16")}
# Products of T*B rows with (H, G*H) that every method needs: forward x W_ih and h W_hh, backward dW_ih, dW_hh and dx.
UNITS = 5

_PARITY_STEPS = 16
# A rule with k = T - 1 corrections is exact in x and the parameters (the initial state needs one more), but only by
# cancellation of terms that grow like binom(T, k), so few steps are used.
_CORRECTED_STEPS = 3
# Allowed errors relative to the largest value: some hundred roundings; a wrong sign or step gives 0.1 or more.
_ALLOWED = {
    "float32": {"output": 2e-5, "gradient": 2e-4},
    "tf32": {"output": 1e-2, "gradient": 3e-2},
    "bfloat16": {"output": 4e-2, "gradient": 1e-1},
}


@dataclass(frozen=True)
class Options(Common):
    """One layer, forward and backward: cell by rule by shape by dtype."""

    cells: str = option("rnn,gru,lstm", "among rnn (tanh), gru and lstm, separated by commas")
    rules: str = option(
        "bptt,dsf,gate,jacobian,gate+1",
        "feedback rules, separated by commas; gate is skipped for an rnn, which has no gate",
    )
    shapes: str = option(
        "64x32x256,64x128x256,512x4x256,1024x1x128",
        "steps x sequences x width, separated by commas; input and state have the same width",
    )
    dtypes: str = option(
        "float32,bfloat16", "among float32, bfloat16 (autocast) and, on a GPU, tf32, separated by commas"
    )
    output: str = option("layers.jsonl", "JSONL file of the records, overwritten; the figure is written next to it")

    def __post_init__(self) -> None:
        super().__post_init__()
        shapes(self.shapes)
        names("dtypes", self.dtypes, DTYPES[self.device])
        for cell in names("cells", self.cells, tuple(GATES)):
            if not rules_of(cell, self.rules):
                raise OptionError(f"rules must include one that an {cell} supports, got {self.rules!r}: it has no gate")


def rules_of(cell: str, rules: str) -> list[str]:
    """The rules that a cell supports.

    Raises:
        OptionError: an invalid spelling.

    Example:
        >>> rules_of("rnn", "dsf,gate+1")
        ['dsf']
    """
    result = []
    for rule in (word.strip() for word in rules.split(",")):
        try:
            feedback = sf.Feedback(rule)
        except ValueError as error:
            raise OptionError(f"rules: {error}") from None
        if not (cell == "rnn" and str(feedback.diagonal) == "gate") and rule not in result:
            result.append(rule)
    return result


class Case(NamedTuple):
    """One comparison; I = H."""

    cell: str
    shape: Shape
    dtype: str
    device: str

    def __str__(self) -> str:
        return f"{self.cell} {self.shape} {self.dtype}"

    def data(self, steps: int | None = None) -> tuple[Tensor, Tensor]:
        """An input that requires grad and the gradient of the outputs, both (T, B, H), unit normal, float32."""
        torch.manual_seed(1)
        T, B, H = self.shape
        x, grad = torch.randn(2, steps or T, B, H, device=self.device)
        return x.requires_grad_(), grad

    def layer(self, package: Any, **feedback: str) -> nn.RNNBase:
        """The cell's layer of torch.nn or statefeed, always with the same weights."""
        torch.manual_seed(0)
        kind = getattr(package, self.cell.upper())
        layer: nn.RNNBase = kind(self.shape.H, self.shape.H, device=self.device, **feedback)
        return layer


class Contender(NamedTuple):
    """One way to run a layer forward and backward.

    Attributes:
        implementation: ``"torch.nn"``, ``"published"`` or ``"statefeed"``.
        variant: torch.nn's setting, or the rule.
        layer: the module with the parameters.
        forward: x -> outputs and final state.
        setting: torch setting during the run.
        autocast: whether the forward pass runs under bfloat16 autocast.
    """

    implementation: str
    variant: str
    layer: nn.RNNBase
    forward: Callable[[Tensor], tuple[Tensor, Any]]
    setting: Setting
    autocast: bool

    @property
    def name(self) -> str:
        return f"{self.implementation} {self.variant}"

    def outputs(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            return self.forward(x)[0]

    def gradients(self, x: Tensor, y: Tensor, grad: Tensor) -> dict[str, Tensor]:
        """The gradients of the input and of every parameter."""
        named = {"x": x, **dict(self.layer.named_parameters())}
        return dict(zip(named, torch.autograd.grad(y, list(named.values()), grad), strict=True))

    def once(self, x: Tensor, grad: Tensor) -> Seconds:
        """Seconds of one forward and one backward pass."""
        device = x.device.type
        with applied(self.setting):
            start = clock(device)
            y = self.outputs(x)
            forward = clock(device) - start
            grad = grad.to(y.dtype)
            start = clock(device)
            self.gradients(x, y, grad)
            return forward, clock(device) - start


def contenders(case: Case, rules: Sequence[str], tried: Sequence[Setting]) -> list[Contender]:
    """torch.nn under every setting, and the published procedure and statefeed's rules under the first setting.

    For bfloat16, torch.nn runs under autocast and also in float32 under every setting.

    Args:
        case: the comparison.
        rules: rules of statefeed.
        tried: settings of torch, the common one first.
    """
    plain, first = case.layer(nn), tried[0]
    autocast = case.dtype == "bfloat16"
    result = [Contender("torch.nn", first.name, plain, plain, first, autocast)]
    for setting in tried:
        if setting == NO_ONEDNN and case.cell != "lstm":
            continue  # torch.nn's RNN and GRU do not use oneDNN
        if autocast:
            result.append(Contender("torch.nn", f"float32 {setting.name}", plain, plain, setting, False))
        elif setting != first:
            result.append(Contender("torch.nn", setting.name, plain, plain, setting, False))
    result.append(Contender("published", "dsf", plain, lambda x: published(plain, x), first, autocast))
    for rule in rules:
        layer = case.layer(sf, feedback=rule)
        result.append(Contender("statefeed", rule, layer, layer, first, autocast))
    return result


def check_parity(case: Case, entries: Sequence[Contender]) -> dict[str, dict[str, float]]:
    """Compare every contender with float64, at the case's batch and width and a few steps.

    Outputs are compared with torch.nn, ``"dsf"`` with the published procedure, and every rule of statefeed, with enough
    corrections to be exact, with backpropagation through time.

    Args:
        case: the comparison.
        entries: its contenders.

    Returns:
        name -> the largest error of each check, relative to the largest value.

    Raises:
        ParityError: an error is above the allowed one.
    """
    exact = case.layer(nn).double()
    truth = {
        "bptt": Contender("torch.nn", "float64", exact, exact, SHIPPED, False),
        "dsf": Contender("published", "float64", exact, lambda x: published(exact, x), SHIPPED, False),
    }
    found: dict[str, dict[str, float]] = {}
    for entry in entries:
        errors = found[entry.name] = {}
        with applied(entry.setting):
            x, grad = case.data(min(case.shape.T, _PARITY_STEPS))
            y = entry.outputs(x)
            errors["output"] = _hold(case, entry, "output", {"y": y}, {"y": truth["bptt"].outputs(x.double())})
            if entry.variant == "dsf":
                errors["dsf"] = _hold_gradients(case, entry, truth["dsf"], x, grad)
            if entry.implementation == "statefeed":
                x, grad = case.data(min(case.shape.T, _CORRECTED_STEPS))
                errors["corrected"] = _hold_gradients(case, _corrected(entry, len(x) - 1), truth["bptt"], x, grad)
    return found


def _corrected(entry: Contender, corrections: int) -> Contender:
    """The same layer under its rule with enough corrections to be exact."""
    rule = sf.Feedback(entry.variant)
    if rule.exact:
        return entry
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some rules diverge with many steps, none with so few
        complete = sf.Feedback(rule.diagonal, corrections=corrections)

    def forward(x: Tensor) -> tuple[Tensor, Any]:
        entry.layer.feedback = complete
        try:
            return entry.forward(x)
        finally:
            entry.layer.feedback = rule

    return entry._replace(forward=forward)


def _hold_gradients(case: Case, entry: Contender, truth: Contender, x: Tensor, grad: Tensor) -> float:
    y = entry.outputs(x)
    exact_x = x.detach().double().requires_grad_()
    expected = truth.gradients(exact_x, truth.outputs(exact_x), grad.double())
    return _hold(case, entry, "gradient", entry.gradients(x, y, grad.to(y.dtype)), expected)


@torch.no_grad()
def _hold(case: Case, entry: Contender, what: str, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    allowed, largest = _ALLOWED[case.dtype][what], 0.0
    for name, value in expected.items():
        error = float((actual[name].double() - value).abs().max() / value.abs().max())
        if not error <= allowed:
            raise ParityError(
                f"{case}: the {what} {name} of {entry.name} must agree with float64 within {allowed:.0e} of its "
                f"largest value, got {error:.1e}; nothing was timed"
            )
        largest = max(largest, error)
    return largest


def kernels(entry: Contender, x: Tensor) -> dict[str, str] | None:
    """The kernels of a statefeed layer and the reason for them; None for other layers."""
    if not isinstance(entry.layer, sf.FeedbackLayer):
        return None
    with torch.autocast(x.device.type, torch.bfloat16, enabled=entry.autocast):
        explanation = sf.explain(entry.layer, x)
    return {"forward": explanation.forward, "backward": explanation.backward, "why": explanation.why}


def run(options: Options) -> Iterator[dict[str, Any]]:
    """Measure all contenders of all cases.

    Args:
        options: checked options.

    Yields:
        One record per contender and case, after the parity check of all of them.

    Raises:
        ParityError: a contender is wrong; nothing was timed.
    """
    rates = matmul_rates(options.device, options.smoke)
    sizes = [Shape(5, 2, 16), Shape(7, 1, 8)] if options.smoke else shapes(options.shapes)
    cases = [
        Case(cell, shape, dtype, options.device)
        for cell in names("cells", options.cells, tuple(GATES))
        for dtype in names("dtypes", options.dtypes, DTYPES[options.device])
        for shape in sizes
    ]
    settings = float32_settings(options.device)
    plans = [
        (case, contenders(case, rules_of(case.cell, options.rules), torch_settings(case, settings))) for case in cases
    ]
    parity = [check_parity(case, entries) for case, entries in plans]
    for (case, entries), errors in zip(plans, parity, strict=True):
        for record in compare(case, entries, options.rounds, rates):
            yield {**record, "parity": errors[f"{record['implementation']} {record['variant']}"]}


def torch_settings(case: Case, settings: list[Setting]) -> list[Setting]:
    """torch.nn's settings for a case; for bfloat16 they include oneDNN products, which may compute in bfloat16."""
    if case.device != "cpu":
        return [usual(case.device, case.dtype)]
    if case.dtype == "float32" or ONEDNN_MATMUL in settings:
        return settings
    return [*settings, ONEDNN_MATMUL]


def compare(
    case: Case, entries: Sequence[Contender], rounds: int, rates: dict[str, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Time the contenders of a case alternately and yield one record each.

    Args:
        case: the comparison.
        entries: its contenders, torch.nn as shipped first.
        rounds: repetitions.
        rates: product rates of this machine, from ``matmul_rates``.
    """
    x, grad = case.data()
    seconds = interleaved({entry.name: lambda entry=entry: entry.once(x, grad) for entry in entries}, rounds)  # type: ignore[misc]
    total = {name: [1e3 * sum(phases) for phases in turns] for name, turns in seconds.items()}
    shipped = entries[0].name
    best = min((e.name for e in entries if e.implementation == "torch.nn"), key=lambda n: spread(total[n])["median"])
    baselines = {"torch.nn as shipped": shipped, "torch.nn at its best": best, "published": "published dsf"}
    T, B, H = case.shape
    rate = rates[case.dtype]
    limit = 1e3 * UNITS * 2 * T * B * H * GATES[case.cell] * H / (1e9 * rate["gflops"])
    for entry in entries:
        forward, backward = zip(*seconds[entry.name], strict=True)
        times = total[entry.name]
        yield {
            "bench": "layers",
            "implementation": entry.implementation,
            "variant": entry.variant,
            "kernels": kernels(entry, x),
            "cell": case.cell,
            "T": T,
            "B": B,
            "I": H,
            "H": H,
            "dtype": case.dtype,
            "device": case.device,
            "repeats": rounds,
            "ms": spread(times),
            "forward_ms": spread([1e3 * s for s in forward]),
            "backward_ms": spread([1e3 * s for s in backward]),
            "backward_us_per_step": spread([1e6 * s / T for s in backward]),
            "times_faster_than": {
                label: spread([b / m for b, m in zip(total[name], times, strict=True)])
                for label, name in baselines.items()
            },
            "torch_nn_best": best.removeprefix("torch.nn "),
            "limit_ms": limit,
            "part_of_limit": limit / spread(times)["median"],
            "matmul": rate,
        }


def table(records: Sequence[dict[str, Any]]) -> Table:
    """One row per record."""
    from rich.table import Table

    result = Table(
        title="forward + backward of one layer: median of the repetitions (min-max)",
        caption="x: times faster than (below 1: slower), per repetition; *: torch.nn at its best; limit: five products "
        "at this machine's best rate",
    )
    for heading in ("cell", "T x B x H", "dtype", "what"):
        result.add_column(heading, no_wrap=True)
    for heading in ("forward ms", "backward ms", "ms", "x nn shipped", "x nn best", "x published", "of limit"):
        result.add_column(heading, justify="right", no_wrap=True)
    before = None
    for r in records:
        case = (r["cell"], f"{r['T']}x{r['B']}x{r['H']}", r["dtype"])
        if before not in (None, case):
            result.add_section()
        is_best = r["implementation"] == "torch.nn" and r["variant"] == r["torch_nn_best"]
        result.add_row(
            *(case if case != before else ("", "", "")),
            f"{r['implementation']} {r['variant']}" + (" *" if is_best else ""),
            f"{r['forward_ms']['median']:.2f}",
            f"{r['backward_ms']['median']:.2f}",
            f"{r['ms']['median']:.2f} ({r['ms']['min']:.2f} to {r['ms']['max']:.2f})",
            *(f"{ratio['median']:.2f}" for ratio in r["times_faster_than"].values()),
            f"{r['part_of_limit']:.0%}",
        )
        before = case
    return result


def figure(records: Sequence[dict[str, Any]]) -> Figure:
    """For every cell: how many times faster than torch.nn at its best, and the backward pass per step."""
    from matplotlib.figure import Figure

    cells = list(dict.fromkeys(r["cell"] for r in records))
    result = Figure(figsize=(13, 4 * len(cells)), layout="constrained")
    axes = result.subplots(len(cells), 2, squeeze=False)
    for (left, right), cell in zip(axes, cells, strict=True):
        rows = [r for r in records if r["cell"] == cell]
        places = list(dict.fromkeys((r["T"], r["B"], r["H"], r["dtype"]) for r in rows))
        series: dict[str, dict[int, dict[str, Any]]] = {}
        for r in rows:
            if r["implementation"] != "torch.nn" or r["variant"] == r["torch_nn_best"]:
                name = "torch.nn at its best" if r["implementation"] == "torch.nn" else r["variant"]
                name = "published procedure" if r["implementation"] == "published" else name
                series.setdefault(name, {})[places.index((r["T"], r["B"], r["H"], r["dtype"]))] = r
        width = 0.8 / len(series)
        for k, (name, found) in enumerate(series.items()):
            ratio = [r["times_faster_than"]["torch.nn at its best"] for r in found.values()]
            middle = [v["median"] for v in ratio]
            reach = [[v["median"] - v["min"] for v in ratio], [v["max"] - v["median"] for v in ratio]]
            left.bar([p + (k + 0.5) * width - 0.4 for p in found], middle, width, yerr=reach, label=name)
            for dtype in dict.fromkeys(r["dtype"] for r in found.values()):
                steps = {p: r["backward_us_per_step"]["median"] for p, r in found.items() if r["dtype"] == dtype}
                right.plot(list(steps), list(steps.values()), marker="o", color=f"C{k}")
        left.axhline(1, color="black", linewidth=0.8)
        left.set(ylabel="times faster than torch.nn at its best", yscale="log", title=f"{cell}: forward + backward")
        right.set(ylabel="microseconds per step", yscale="log", title=f"{cell}: backward")
        labels = [f"{T}x{B}x{H}\n{dtype}" for T, B, H, dtype in places]
        for panel in (left, right):
            panel.set_xticks(range(len(places)), labels, fontsize=7)
        left.legend(fontsize=7)
    return result
