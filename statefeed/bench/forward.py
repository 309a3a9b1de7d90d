"""``statefeed bench forward``: iterations of the forward pass in parallel over time, random and trained layers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

import statefeed as sf
from statefeed.bench.forward_options import ForwardOptions as Options
from statefeed.bench.measure import ParityError, Seconds, applied, clock, interleaved, machine_line, spread, usual
from statefeed.bench.options import GATES, OptionError, names, numbers
from statefeed.lm.config import UsageError
from statefeed.lm.data import cache, corpora
from statefeed.lm.run import folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

_PARITY = 1e-9


def cells_of(options: Options) -> list[str]:
    """The cells with random weights."""
    return [cell for cell in names("cells", options.cells, (*GATES, "none")) if cell != "none"]


def methods(options: Options) -> dict[str, sf.Newton]:
    """The forward method of every tolerance, by its spelling."""
    try:
        found = [sf.Newton(float(word), options.max_iterations) for word in options.tolerances.split(",")]
    except ValueError as error:
        raise OptionError(f"tolerances and max_iterations: {error}") from None
    return {str(method): method for method in found}


def check(options: Options) -> None:
    """Check what needs torch.

    Raises:
        OptionError: for a value that no run can have.
    """
    cells_of(options)
    methods(options)
    for path in run_folders(options):
        if not path.is_dir():
            raise OptionError(f"runs must be folders of trained models, got {str(path)!r}")


def run_folders(options: Options) -> list[Path]:
    return [Path(word.strip()) for word in options.runs.split(",") if word.strip()]


class Subject(NamedTuple):
    """One layer and its input (T, B, I); ``variant`` is what it was trained by, ``layer`` its position in the model."""

    cell: str
    variant: str
    layer: int
    module: Any
    x: Tensor


def random_subjects(options: Options, T: int, B: int, widths: Sequence[int]) -> Iterator[Subject]:
    """Layers with torch's random weights, W_hh scaled, on unit normal inputs."""
    for cell, H, scale in itertools.product(cells_of(options), widths, numbers("scales", options.scales)):
        torch.manual_seed(0)
        module = getattr(sf, cell.upper())(H, H)
        with torch.no_grad():
            module.weight_hh_l0.mul_(scale)
        x = torch.randn(T, B, H, device="cpu")
        yield Subject(cell, f"random x{scale}", 0, module.to(options.device), x.to(options.device))


def trained_subjects(path: Path, T: int, B: int, device: str) -> list[Subject]:
    """The recurrent layers of a trained model on B columns of T validation tokens; none where the text is shorter.

    Raises:
        OptionError: the folder holds no trained model.
    """
    try:
        found = folder.load(path)
        tokens = cache.encode(found.tokenizer, corpora.read(found.config.data).splits["valid"])
    except UsageError as error:
        raise OptionError(f"runs: {error}") from None
    if len(tokens) // B < T:
        return []
    columns = torch.as_tensor(tokens.astype("int64"), device="cpu")[: len(tokens) // B * B].view(B, -1)[:, :T].T
    layers = [m for m in found.model.modules() if isinstance(m, nn.RNNBase)]
    inputs: list[Tensor] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        found.model(columns)
    recipe = found.config.model
    return [
        Subject(recipe.cell, str(recipe.feedback), k, _without_hooks(layer).to(device), x.to(device))
        for k, (layer, x) in enumerate(zip(layers, inputs, strict=True))
    ]


def _without_hooks(layer: nn.Module) -> nn.Module:
    layer = copy.deepcopy(layer)
    layer._forward_pre_hooks.clear()
    return layer


def run(options: Options) -> Iterator[dict[str, Any]]:
    """Every layer, length, batch and tolerance.

    Args:
        options: checked options.

    Yields:
        One record each.

    Raises:
        ParityError: in float64 the states differ from the sequential ones; nothing was measured.
    """
    lengths = [8] if options.smoke else numbers("steps", options.steps)
    widths = [4] if options.smoke else numbers("widths", options.widths)
    check_parity(options)
    for B, T in itertools.product(numbers("batches", options.batches), lengths):
        for subject in random_subjects(options, T, B, widths):
            yield from measure(subject, options)
        for path in run_folders(options):
            for subject in trained_subjects(path, T, B, options.device):
                yield from measure(subject, options)


def check_parity(options: Options) -> None:
    """Compare the states with the sequential ones in float64, over 67 steps.

    Raises:
        ParityError: they differ.
    """
    for subject in random_subjects(options, 67, 3, [5]):
        layer, x = subject.module.double(), subject.x.double()
        with torch.no_grad():
            expected, _ = layer(x)
            layer.forward_method = sf.Newton(1e-12)
            y, _ = layer(x)
        error = float((y - expected).abs().max())
        if not error <= _PARITY:
            raise ParityError(
                f"{subject.cell} by newton must agree with the sequential states in float64 within {_PARITY:.0e}, got "
                f"{error:.1e}; nothing was measured"
            )


def measure(subject: Subject, options: Options) -> Iterator[dict[str, Any]]:
    """One record per tolerance: iterations, error, and with ``timed`` milliseconds."""
    sequential = torch_layer(subject)
    contenders = {}
    for name, method in methods(options).items():
        contenders[name] = copy.deepcopy(subject.module)
        contenders[name].forward_method = method

    def forward(layer: nn.Module) -> Tensor:
        with torch.no_grad(), torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            y: Tensor = layer(subject.x)[0]
            return y

    def once(layer: nn.Module) -> Seconds:
        start = clock(options.device)
        forward(layer)
        return (clock(options.device) - start,)

    with applied(usual(options.device, options.dtype)):
        expected = forward(sequential).float()
        errors = {name: float((forward(layer).float() - expected).abs().max()) for name, layer in contenders.items()}
        every = {"sequential": sequential, **contenders}
        seconds = (
            interleaved({name: lambda layer=layer: once(layer) for name, layer in every.items()}, options.rounds)  # type: ignore[misc]
            if options.timed
            else {}
        )
    T, B, H = expected.shape
    for name, layer in contenders.items():
        record = {
            "bench": "forward",
            "cell": subject.cell,
            "variant": subject.variant,
            "layer": subject.layer,
            "method": name,
            "T": T,
            "B": B,
            "H": H,
            "dtype": options.dtype,
            "device": options.device,
            "repeats": options.rounds,
            "iterations": layer.newton_iterations[0],
            "sequential_steps": layer.newton_sequential_steps[0],
            "error": errors[name],
        }
        if seconds:
            record["ms"] = spread([1e3 * s for (s,) in seconds[name]])
            record["sequential_ms"] = spread([1e3 * s for (s,) in seconds["sequential"]])
            pairs = zip(seconds["sequential"], seconds[name], strict=True)
            record["speedup"] = spread([theirs / ours for (theirs,), (ours,) in pairs])
        yield record


def torch_layer(subject: Subject) -> nn.Module:
    """torch.nn's layer with the same weights, which on a GPU runs through cuDNN."""
    return sf.restore(copy.deepcopy(subject.module))


def table(records: Sequence[dict[str, Any]]) -> Table:
    """One row per record."""
    from rich.table import Table

    result = Table(
        title="forward pass in parallel over time: iterations of one product over all steps and one scan",
        caption="sequential: steps that did not converge and ran sequentially; error: largest difference from "
        "torch.nn's states; a speed-up above 1 is faster than torch.nn",
    )
    for heading in ("cell", "weights", "layer", "T", "B", "method"):
        result.add_column(heading, no_wrap=True)
    for heading in ("iterations", "sequential", "error", "ms", "torch.nn ms", "speed-up"):
        result.add_column(heading, justify="right", no_wrap=True)
    for r in records:
        times = [f"{r[key]['median']:.3g}" if key in r else "" for key in ("ms", "sequential_ms", "speedup")]
        result.add_row(
            *(str(r[key]) for key in ("cell", "variant", "layer", "T", "B", "method", "iterations")),
            *(str(r["sequential_steps"]), f"{r['error']:.1e}", *times),
        )
    return result


def figure(records: Sequence[dict[str, Any]]) -> Figure:
    """Iterations over T for every cell, one line per layer; the tightest tolerance dashed, the loosest solid."""
    from matplotlib.figure import Figure

    cells = list(dict.fromkeys(r["cell"] for r in records))
    tried = list(dict.fromkeys(r["method"] for r in records))
    result = Figure(figsize=(5 * len(cells), 4), layout="constrained")
    axes = result.subplots(1, len(cells), squeeze=False)[0]
    for ax, cell in zip(axes, cells, strict=True):
        rows = [r for r in records if r["cell"] == cell and r["B"] == records[0]["B"]]
        layers = list(dict.fromkeys((r["variant"], r["layer"], r["H"]) for r in rows))
        for k, layer in enumerate(layers):
            for method, style in {tried[-1]: "--", tried[0]: "-"}.items():
                line = [r for r in rows if (r["variant"], r["layer"], r["H"]) == layer and r["method"] == method]
                T = [r["T"] for r in line]
                label = f"{layer[0]}, layer {layer[1]}, {method}"
                ax.plot(T, [r["iterations"] for r in line], style, color=f"C{k}", marker="o", label=label)
        ax.set(title=cell, xlabel="T", ylabel="iterations", xscale="log", ylim=(0, None))
        ax.legend(fontsize=6)
    result.suptitle(f"{machine_line(records)}; iterations of one call", fontsize=9)
    return result
