"""Stage "preflight": a launch, the kernels, CUDA graphs, synchronizations, warnings, memory errors; on small cases."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import statefeed as sf
from statefeed.bench.gpu.stage import Options
from statefeed.bench.gpu.timing import capture

_RULES = ("bptt", "dsf", "gate", "gate+1", "calibrated", "jacobian")
_SANITIZER, _SANITIZER_SECONDS = "compute-sanitizer", 120
# The case that compute-sanitizer runs in a separate process: the kernels of a GRU and an LSTM, dense.
_CASE = """
import torch, statefeed as sf
for cell in (sf.GRU, sf.LSTM):
    layer = cell(17, 33, feedback="gate+1", device="cuda")
    layer(torch.randn(19, 3, 17, device="cuda"))[0].sum().backward()
torch.cuda.synchronize()
"""


class NotRunError(Exception):
    """The check cannot run on this machine; recorded as not run, not as a failure."""


def launch(device: str) -> str:
    """One launch of a Triton kernel that adds one."""
    from statefeed.bench.gpu.launch import add_one

    x = torch.arange(5.0, device=device)
    y = add_one(x)
    if not torch.equal(y, x + 1):
        raise RuntimeError(f"a Triton kernel that adds one must give {(x + 1).tolist()}, got {y.tolist()}")
    return "adds one"


def kernels(device: str) -> str:
    """The backward pass of statefeed's kernels gives finite gradients."""
    layer, x = _layer(sf.GRU, "dsf", device), _input(device)
    gradients = torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters()))
    if not all(bool(g.isfinite().all()) for g in gradients):
        raise RuntimeError("the gradients of a small GRU must be finite")
    return sf.explain(layer, x).backward


def graphs(device: str) -> str:
    """Forward and backward under every rule, captured and replayed, give the gradients of eager passes."""
    _on_a_gpu(device)
    for cell in (sf.GRU, sf.LSTM):
        for rule in _RULES:
            layer, x = _layer(cell, rule, device).eval(), _input(device)
            if rule == "bptt":
                layer.train()  # cuDNN's backward pass requires training mode
            parameters = list(layer.parameters())
            found: list[Tensor] = []

            def run(layer: Any = layer, x: Tensor = x, parameters: list[Any] = parameters, found: Any = found) -> None:
                found[:] = torch.autograd.grad(layer(x)[0].sum(), parameters)

            run()
            expected = [value.clone() for value in found]
            graph = capture(run)
            for value in found:
                value.zero_()
            graph.replay()
            torch.cuda.synchronize()
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=f"a replayed graph of {cell} under {rule}")
    return f"{', '.join(_RULES)}"


def synchronizations(device: str) -> str:
    """No pass waits for the device."""
    _on_a_gpu(device)
    for cell in (sf.RNN, sf.GRU, sf.LSTM):
        for rule in _RULES:
            if cell is sf.RNN and rule.startswith("gate"):
                continue
            layer, x = _layer(cell, rule, device), _input(device)
            layer(x)[0].sum().backward()  # compiles
            torch.cuda.set_sync_debug_mode("error")
            try:
                layer(x)[0].sum().backward()
            except RuntimeError as error:
                raise RuntimeError(f"{cell.__name__} under {rule}: {error}") from error
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return "none in forward and backward"


def weights(device: str) -> str:
    """cuDNN does not warn that the weights of stacked and bidirectional layers are not one chunk of memory."""
    _on_a_gpu(device)
    for cell in (nn.GRU, sf.GRU, sf.LSTM):
        layer = cell(17, 33, 3, bidirectional=True, device=device)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layer(_input(device))[0].sum().backward()
    return "no warning"


def sanitizer(device: str) -> str:
    """compute-sanitizer finds no memory error in the kernels of a small case."""
    _on_a_gpu(device)
    if shutil.which(_SANITIZER) is None:
        raise NotRunError(f"{_SANITIZER} is not installed")
    command = [_SANITIZER, "--error-exitcode=9", sys.executable, "-c", _CASE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SANITIZER_SECONDS)
    except subprocess.TimeoutExpired:
        raise NotRunError(f"not finished after {_SANITIZER_SECONDS} s") from None
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return done.stdout.strip().splitlines()[-1]


CHECKS: tuple[Callable[[str], str], ...] = (launch, kernels, graphs, synchronizations, weights, sanitizer)


def run(options: Options) -> Iterator[dict[str, Any]]:
    """Run every check; a failed check does not stop the others.

    Yields:
        One record per check, with ``found``, ``failed`` or ``not_run``.
    """
    for check in CHECKS:
        try:
            yield {"check": check.__name__, "found": check(options.device)}
        except NotRunError as error:
            yield {"check": check.__name__, "not_run": str(error)}
        except Exception as error:  # the other checks still run
            yield {"check": check.__name__, "failed": f"{type(error).__name__}: {error}"}


def _layer(cell: type[sf.RNN] | type[sf.GRU] | type[sf.LSTM], rule: str, device: str) -> Any:
    torch.manual_seed(0)
    layer: Any = cell(17, 33, device=device)
    layer.feedback = rule
    return layer


def _input(device: str) -> Tensor:
    return torch.randn(19, 3, 17, device=device, generator=torch.Generator(device).manual_seed(0))


def _on_a_gpu(device: str) -> None:
    if device != "cuda":
        raise NotRunError("needs a GPU")
