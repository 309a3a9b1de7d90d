"""Stage "forward": the forward pass in parallel over time against cuDNN's, alone and in whole passes under "dsf"."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import statefeed as sf
from statefeed.bench.gpu.layers import DTYPES, SETTINGS, Case, work
from statefeed.bench.gpu.stage import Options
from statefeed.bench.gpu.timing import measure
from statefeed.bench.measure import applied
from statefeed.bench.precision import flags

TOLERANCES = (1e-3, 1e-4)
# Long sequences of small batches first, where the dependent steps of cuDNN cost the most.
CASES = (
    Case("gru", 4096, 1, 256),
    Case("gru", 1024, 8, 256),
    Case("lstm", 4096, 1, 256),
    Case("gru", 16_384, 1, 256),
    Case("gru", 4096, 8, 512),
    Case("rnn", 4096, 1, 256),
    Case("gru", 256, 8, 256),
    Case("gru", 4096, 1, 128),
    Case("gru", 1024, 1, 1024),
    Case("lstm", 1024, 8, 256),
    Case("gru", 256, 128, 512),
)
SMOKE = (Case("gru", 9, 2, 8), Case("lstm", 9, 2, 8), Case("rnn", 9, 2, 8))


def run(options: Options) -> Iterator[dict[str, Any]]:
    """Time every case in every precision, with random weights.

    Yields:
        One record per contender, with the times, and for a parallel forward pass its iterations and its error, or
        ``failed`` or ``not_run``.
    """
    for case in SMOKE if options.smoke else CASES:
        for dtype in DTYPES[options.device]:
            record: dict[str, Any] = {
                **case._asdict(), "dtype": dtype, "device": options.device, "repeats": options.rounds
            }  # fmt: skip
            if options.time_left() <= 0:
                yield {**record, "not_run": "no time left"}
                continue
            try:
                with applied(SETTINGS[dtype]):
                    record["tf32"] = flags()
                    found = list(compare(case, dtype, options))
            except Exception as error:  # for example out of memory
                yield {**record, "failed": f"{type(error).__name__}: {error}"}
                continue
            for values in found:
                yield {**record, **values}
            gc.collect()


def compare(case: Case, dtype: str, options: Options) -> Iterator[dict[str, Any]]:
    """Times of torch.nn, of "dsf" with cuDNN's forward pass, and of "dsf" with parallel ones."""
    x, grad = case.data(options.device)
    assert isinstance(x, Tensor)
    layers: dict[str, nn.RNNBase] = {"torch.nn": case.layer(nn, options.device)}
    for method in ("sequential", *(sf.Newton(tolerance) for tolerance in TOLERANCES)):
        layer: Any = case.layer(sf, options.device)
        layer.feedback, layer.forward_method = "dsf", method
        layers[f"dsf {method}"] = layer
    parallel = [name for name in layers if "newton" in name]
    errors = {name: _error(layer, x, dtype) for name, layer in layers.items()}
    timed = {n: work(m, list(m.parameters()), x, grad, dtype == "bfloat16") for n, m in layers.items()}
    for name, times in measure(timed, options.rounds, options.device, without_graph=parallel).items():
        layer = layers[name]
        if name in parallel:
            times |= {"iterations": layer.newton_iterations, "sequential_steps": layer.newton_sequential_steps}
        yield {"contender": name, "error": errors[name], **times}


def _error(layer: nn.RNNBase, x: Tensor, dtype: str) -> float:
    """The largest difference of the states from those of torch.nn in float64."""
    plain = copy.deepcopy(layer).double()
    sf.restore(plain)
    with torch.no_grad():
        expected = plain(x.double())[0]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            y = layer(x)[0]
    return float((y.double() - expected).abs().max())
