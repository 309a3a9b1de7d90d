"""Errors of the C++ operators: invalid arguments and out of memory raise in Python, and the next call works."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from statefeed import native
from statefeed.backends import cpu
from statefeed.cells import CELLS

pytestmark = pytest.mark.skipif(not native.available(), reason="the kernels cannot be built here")

N, B, I, H, V = 6, 2, 4, 5, 7
G = {"gru": 3, "lstm": 4, "lstm_projected": 4, "rnn_tanh": 1, "rnn_relu": 1, "slstm": 4, "slstm_exp": 4}
S = {
    "lstm": 2,
    "lstm_projected": 2,
    "slstm": 3,
    "slstm_exp": 3,
}  # parts of the state with gradients, where there are several
C = {"lstm": 1, "lstm_projected": 1, "slstm": 3, "slstm_exp": 3}  # parts besides h
AUX = {"gru": 1, "lstm": 1, "lstm_projected": 1, "slstm": 3, "slstm_exp": 2}
P = {"lstm_projected": 2}  # width of a projected h


def forward_arguments(cell: str = "gru") -> dict[str, Any]:
    gates = G[cell]
    return {
        "cell": cell, "bf16": False, "x": torch.zeros(N, I), "w_ih": torch.zeros(gates * H, I),
        "w_hh": torch.zeros(gates * H, P.get(cell, H)), "b_ih": torch.zeros(gates * H),
        "b_hh": torch.zeros(gates * H), "h0": torch.zeros(B, P.get(cell, H)), "batch_sizes": None,
        "gates": torch.zeros(N, gates * H) if gates > 1 else None,
        "aux": torch.zeros(N, AUX[cell] * H) if cell in AUX else None,
        "y": torch.zeros(N, P.get(cell, H)), "h": torch.zeros(B, P.get(cell, H)),
        "c": torch.zeros(B, C[cell] * H) if cell in C else None,
        "c0": torch.zeros(B, C[cell] * H) if cell in C else None,
        "w_hr": torch.zeros(P[cell], H) if cell in P else None,
    }  # fmt: skip


def state_width(cell: str) -> int:
    return P.get(cell, H) + (S.get(cell, 1) - 1) * H


def backward_arguments(cell: str = "gru", rule: str = "stationary", corrections: int = 1) -> dict[str, Any]:
    made, width = forward_arguments(cell), state_width(cell)
    recurrent = (G[cell] * H, P[cell]) if cell in P else (G[cell], H)
    D = {"stationary": (width,), "per_row": (N, width), "jacobian": recurrent}.get(rule)
    shared = {name: made[name] for name in ("x", "w_ih", "w_hh", "gates", "aux", "y", "h0", "w_hr")}
    return {
        "cell": cell, "rule": rule, "corrections": corrections, "bf16": False, **shared, "c0": made["c"],
        "grad_y": torch.zeros_like(made["y"]), "grad_final": torch.zeros(B, width),
        "diagonal": None if D is None else torch.zeros(D), "batch_sizes": None, "carry": torch.zeros(B, width),
        "grad_x": torch.zeros(N, I), "grad_w_ih": torch.zeros_like(made["w_ih"]),
        "grad_w_hh": torch.zeros_like(made["w_hh"]), "grad_b_ih": torch.zeros(G[cell] * H),
        "grad_b_hh": torch.zeros(G[cell] * H),
        "residual": torch.zeros(N, width) if corrections else None,
        "grad_w_hr": torch.zeros_like(made["w_hr"]) if cell in P else None,
    }  # fmt: skip


def jacobian_arguments(cell: str = "gru") -> dict[str, Any]:
    made, of_output = forward_arguments(cell), (G[cell] if cell in P else 1) * H
    return {
        "cell": cell, "gates": made["gates"], "aux": made["aux"], "y": made["y"], "h0": made["h0"], "c0": made["c"],
        "w_hh_diag": None if cell in P else torch.zeros(G[cell], H), "batch_sizes": None,
        "sums": torch.zeros(of_output + (S.get(cell, 1) - 1) * H),
    }  # fmt: skip


def head_arguments() -> dict[str, Any]:
    return {
        "bf16": False, "x": torch.zeros(N, I), "w": torch.zeros(V, I), "bias": torch.zeros(V),
        "targets": torch.zeros(N, dtype=torch.int64), "losses": torch.zeros(N), "grad_x": torch.zeros(N, I),
        "grad_w": torch.zeros(V, I), "grad_bias": torch.zeros(V),
    }  # fmt: skip


OPERATORS: dict[str, Callable[..., dict[str, Any]]] = {
    "layer_forward": forward_arguments,
    "layer_backward": backward_arguments,
    "sum_jacobians": jacobian_arguments,
    "head_loss": head_arguments,
}
# An operator, its arguments without the name (a cell or nothing), and one that is a tensor.
TENSORS = [
    (op, of, name)
    for op, make in OPERATORS.items()
    for of in ([()] if op == "head_loss" else [("gru",), ("slstm",), ("lstm_projected",)])
    for name, v in make(*of).items()
    if isinstance(v, Tensor)
]


def call(op: str, arguments: dict[str, Any]) -> None:
    getattr(torch.ops.statefeed, op)(**arguments)


@pytest.mark.parametrize("cell", G)
def test_right_arguments_are_accepted(cell: str) -> None:
    call("layer_forward", forward_arguments(cell))
    for rule in ("stationary", "per_row", "direct", "jacobian"):
        call("layer_backward", backward_arguments(cell, rule))
    call("layer_backward", backward_arguments(cell, "exact", 0))
    call("sum_jacobians", jacobian_arguments(cell))
    call("head_loss", head_arguments())


@pytest.mark.parametrize(("op", "of", "name"), TENSORS)
def test_a_tensor_of_another_dtype_raises(op: str, of: tuple[str, ...], name: str) -> None:
    arguments = OPERATORS[op](*of)
    arguments[name] = arguments[name].to(torch.bfloat16)
    with pytest.raises(RuntimeError, match=rf"{op}: .*(float32|float64|int64).*got.* bfloat16"):
        call(op, arguments)


@pytest.mark.parametrize(("op", "of", "name"), TENSORS)
def test_a_tensor_of_another_shape_raises(op: str, of: tuple[str, ...], name: str) -> None:
    for change in (lambda t: torch.zeros(1, dtype=t.dtype), lambda t: t[..., :-1].contiguous(), lambda t: t[None]):
        arguments = OPERATORS[op](*of)
        arguments[name] = change(arguments[name])
        with pytest.raises(RuntimeError, match=rf"{op}: .*(shape|dimensions|multiple|add up|at least)"):
            call(op, arguments)


@pytest.mark.parametrize(
    ("op", "of", "name"), [case for case in TENSORS if OPERATORS[case[0]](*case[1])[case[2]].dim() > 1]
)
def test_a_strided_tensor_raises(op: str, of: tuple[str, ...], name: str) -> None:
    arguments = OPERATORS[op](*of)
    arguments[name] = torch.stack([arguments[name]] * 2, -1)[..., 0]
    with pytest.raises(RuntimeError, match=rf"{op}: {name} must be a contiguous .* got a strided"):
        call(op, arguments)


OPTIONAL = [
    ("layer_forward", "aux"), ("layer_forward", "gates"), ("layer_backward", "gates"), ("layer_backward", "aux"),
    ("layer_backward", "diagonal"), ("layer_backward", "residual"), ("sum_jacobians", "aux"), ("head_loss", "grad_x"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "name"), OPTIONAL)
def test_a_missing_tensor_raises(op: str, name: str) -> None:
    arguments = OPERATORS[op]()
    arguments[name] = None
    with pytest.raises(RuntimeError, match=f"{op}: {name} must be given .*, got None"):
        call(op, arguments)


@pytest.mark.parametrize(
    ("make", "changes", "words"),
    [
        (forward_arguments, {"c": torch.zeros(B, H)}, "c must be None except for a cell with several states"),
        (lambda: forward_arguments("lstm"), {"c": None}, "c must be given"),
        (lambda: forward_arguments("slstm"), {"c": torch.zeros(B, H)}, r"c must be .* of shape \(2, 15\)"),
        (lambda: forward_arguments("slstm_exp"), {"aux": torch.zeros(N, 3 * H)}, r"aux must be .* of shape \(6, 10\)"),
        (lambda: forward_arguments("slstm"), {"w_hh": torch.zeros(4 * H, 2)}, r"w_hh must be .* of shape \(20, 5\)"),
        (lambda: forward_arguments("slstm"), {"w_hh": torch.zeros(4 * H, 0)}, r"w_hh must be .* of shape \(20, 5\)"),
        (forward_arguments, {"w_hh": torch.zeros(3 * H, 1)}, r"w_hh must be .* of shape \(15, 5\)"),
        (lambda: backward_arguments("slstm"), {"w_hh": torch.zeros(4 * H, 1)}, r"grad_w_hh must be .* \(20, 1\)"),
        (lambda: backward_arguments("slstm"), {"diagonal": torch.zeros(4 * H)}, r"of shape \(15,\), got .* \(20,\)"),
        (lambda: forward_arguments("rnn_relu"), {"b_hh": None}, "b_hh must be given"),
        (lambda: forward_arguments("rnn_relu"), {"gates": torch.zeros(N, H)}, "gates must be None"),
        (forward_arguments, {"h0": torch.zeros(4, H)}, "multiple of the batch of h0, 4, got 6"),
        (forward_arguments, {"batch_sizes": torch.tensor([2, 3, 1])}, "never grow.* got 3 after 2"),
        (forward_arguments, {"batch_sizes": torch.tensor([2, 2, 2, 0])}, "positive.* got 0 after 2"),
        (forward_arguments, {"batch_sizes": torch.tensor([1, 1, 1, 1, 1, 1])}, "begin with the batch of h0, 2, got 1"),
        (forward_arguments, {"batch_sizes": torch.tensor([2, 2, 1])}, "add up to the rows of the input, 6, got 5"),
        (forward_arguments, {"batch_sizes": torch.tensor([2, 2, 2], dtype=torch.int32)}, "int64.* got a .*int32"),
        (backward_arguments, {"corrections": -1}, "corrections must be at least 0, got -1"),
        (lambda: backward_arguments("gru", "exact", 1), {}, "exact takes no corrections, got 1"),
        (lambda: backward_arguments("gru", "direct"), {"diagonal": torch.zeros(H)}, "diagonal must be None"),
        (backward_arguments, {"diagonal": torch.zeros(1)}, r"of shape \(5,\), got .* of shape \(1,\)"),
        (lambda: backward_arguments("gru", "per_row"), {"diagonal": torch.zeros(H)}, r"of shape \(6, 5\)"),
        (head_arguments, {"grad_w": None}, "grad_w must be given"),
    ],
)  # fmt: skip
def test_contradictory_arguments_raise(make: Callable[[], dict[str, Any]], changes: dict[str, Any], words: str) -> None:
    arguments = make() | changes
    op = next(op for op, of in OPERATORS.items() if of().keys() == arguments.keys())
    with pytest.raises(RuntimeError, match=words):
        call(op, arguments)


@pytest.mark.parametrize("op", ["layer_forward", "layer_backward", "sum_jacobians"])
def test_an_unknown_cell_raises_and_known_names_are_listed(op: str) -> None:
    with pytest.raises(
        RuntimeError, match="the cell 'mgu': expected one of gru, lstm, lstm_projected, rnn_tanh, rnn_relu"
    ):
        call(op, OPERATORS[op]() | {"cell": "mgu"})


def test_an_unknown_rule_raises_and_known_names_are_listed() -> None:
    with pytest.raises(RuntimeError, match=r"the rule 'gate': .* stationary, per_row, direct, jacobian, exact"):
        call("layer_backward", backward_arguments() | {"rule": "gate"})


@pytest.mark.parametrize("wrong", [-1, V, 2**62])
def test_a_target_outside_the_classes_raises(wrong: int) -> None:
    arguments = head_arguments()
    arguments["targets"][3] = wrong
    with pytest.raises(IndexError, match=f"ids of the {V} classes, got {wrong}"):
        call("head_loss", arguments)


def test_a_cell_without_a_kernel_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, tensors = CELLS["gru"], [torch.zeros(1)] * 3
    assert cpu.unsupported_reason(cell, tensors, False) is None
    monkeypatch.setattr(type(cell), "name", "mgu")
    assert cpu.unsupported_reason(cell, tensors, False) == "the fused kernels have no cell 'mgu'"


@pytest.mark.parametrize(
    ("size", "value"), [("gates", 9), ("shared_gates", 9), ("constant_states", ("m",) * 9), ("saved_values", 9)]
)
def test_a_cell_whose_sizes_are_not_those_of_its_kernel_is_an_error(
    size: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(CELLS["gru"]), size, value)
    with pytest.raises(RuntimeError, match=r"'gru' has .*\b9\b.* kernel has \(3, 2, 1, 0, 4\)"):
        cpu.unsupported_reason(CELLS["gru"], [torch.zeros(1)] * 3, False)


# Memory ---------------------------------------------------------------------------------------------------------------

# Common first part of every program in this section.
PROGRAM = """
import ctypes, resource, torch
from statefeed import native
from statefeed.backends import cpu
from statefeed.backends.protocol import Problem, Upstream
from statefeed.cells import CELLS
from statefeed.feedback.protocol import KernelRule
from statefeed.layout import Layout
from statefeed.native import head
assert native.available()

def inputs(T, B, I, H):
    make = torch.Generator().manual_seed(H)
    shapes = [(T * B, I), (B, H), (3 * H, I), (3 * H, H), (T * B, H)]
    return [torch.randn(shape, generator=make) / H**0.5 for shape in shapes]

def layer(T, B, I, H, rule, dtype=torch.bfloat16):
    x, h0, w_ih, w_hh, e = inputs(T, B, I, H)
    problem = Problem(CELLS["gru"], x, (h0,), (w_ih, w_hh), Layout(T, B), False, dtype)
    [done] = cpu.forward([problem], True)
    found = cpu.backward(problem, done, Upstream(e, (h0,)), rule, True)
    return [done.y, found.x, *found.state, *found.weights]

def loss(N, H, V):
    x, _, w, _, _ = inputs(1, N, H, V)
    losses, grads = head.losses_and_gradients(x, w[:V].contiguous(), torch.zeros(V), torch.zeros(N, dtype=torch.int64))
    return [losses, *(g.clone() for g in grads)]

def same(a, b):
    return all(torch.equal(u, v) for u, v in zip(a, b, strict=True))
"""

FAILING_ALLOCATOR = """
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
/* Fails the call of aligned_alloc after `successes` more; with `workers_only`, counts those of other threads alone. */
int successes = -1, workers_only = 0, failures = 0;
void* aligned_alloc(size_t alignment, size_t size) {
  if (successes >= 0 && (!workers_only || syscall(SYS_gettid) != getpid()) && successes-- == 0) {
    ++failures;
    return NULL;
  }
  void* memory = NULL;
  return posix_memalign(&memory, alignment, size) ? NULL : memory;
}
"""

EVERY_ALLOCATION = """
torch.set_num_threads(2)
rule = KernelRule("direct", None, 1)
library = ctypes.CDLL(None)
successes, failures = (ctypes.c_int.in_dll(library, name) for name in ("successes", "failures"))
last, shape, failed = False, 8, 0
while not last:  # larger every time, so that memory is needed
    shape, last = shape + 24, True
    for run in (lambda: layer(5, 9, shape, shape, rule), lambda: loss(2 * shape, shape, 3 * shape)):
        before = failures.value
        successes.value = failed
        try:
            run()
        except MemoryError:
            last = False
            assert failures.value == before + 1
        else:
            assert failures.value == before
        successes.value = -1
        assert same(run(), run())
    failed += 1
print(failures.value)
"""

IN_A_WORKER = """
torch.set_num_threads(2)
library = ctypes.CDLL(None)
successes, workers_only, failures = (ctypes.c_int.in_dll(library, n) for n in ("successes", "workers_only", "failures"))
workers_only.value, successes.value = 1, 0
for attempt in range(500):  # a worker that comes late finds nothing left to do
    try:
        loss(1600, 96, 1031)
    except MemoryError as error:
        assert "cannot allocate" in str(error), error
        break
assert failures.value == 1
assert same(loss(1600, 96, 1031), loss(1600, 96, 1031))
layer(16, 32, 64, 64, KernelRule("exact"))
print("survived")
"""

LIMITED = """
from pathlib import Path
small = layer(3, 2, 8, 8, KernelRule("direct"))
x, h0, w_ih, w_hh, _ = inputs(1, 2, 1536, 1536)
problem = Problem(CELLS["gru"], x, (h0,), (w_ih, w_hh), Layout(1, 2), False, None)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
unlimited = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), unlimited[1]))  # the packed weights take 54 MB
for attempt in range(2):
    try:
        cpu.forward([problem], True)
    except MemoryError as error:
        print(error)
assert same(layer(3, 2, 8, 8, KernelRule("direct")), small)
resource.setrlimit(resource.RLIMIT_AS, unlimited)
assert cpu.forward([problem], True)[0].y.isfinite().all()
"""


@pytest.fixture(scope="session")
def failing_allocator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("needs a C compiler on Linux")
    folder = tmp_path_factory.mktemp("allocator")
    source, library = folder / "allocator.c", folder / "allocator.so"
    source.write_text(FAILING_ALLOCATOR)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", str(source), "-o", str(library)], check=True)
    return library


def output_of(program: str, preload: Path | None = None) -> str:
    command = [sys.executable, "-c", PROGRAM + program]
    if preload is not None:
        command = ["env", f"LD_PRELOAD={preload}", *command]
    found = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_every_allocation_may_fail_and_the_next_call_works(failing_allocator: Path) -> None:
    assert int(output_of(EVERY_ALLOCATION, failing_allocator)) > 15


def test_an_allocation_that_fails_in_a_worker_reaches_python(failing_allocator: Path) -> None:
    assert output_of(IN_A_WORKER, failing_allocator) == "survived\n"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")
def test_a_process_out_of_memory_survives() -> None:
    lines = output_of(LIMITED).splitlines()
    assert len(lines) == 2
    assert all("cannot allocate" in line and "bytes of workspace" in line for line in lines)
