"""Script that compiles every launch of the GPU kernels for A100 and H100, without a GPU, and prints each."""

import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import statefeed.backends.triton.operators  # noqa: F401
from statefeed.backends.triton.rules import RULES
from statefeed.scan import chunks
from statefeed.scan.triton import scan

assert isinstance(chunks.row_at, JITFunction), "the interpreter is on"
TARGETS = [GPUTarget("cuda", arch, 32) for arch in (80, 90)]
done = set()


def tensors(args):
    return (a for a in args if isinstance(a, torch.Tensor))


def compiled(kernel, *args, grid, warmup, **constants):
    """Replacement of a launch: compile Triton's specialization for these arguments to a binary."""
    for target in TARGETS:
        backend = make_backend(target)
        bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
            *args, **constants
        )
        options, signature, constants_of, attributes = kernel._pack_args(
            backend, constants, bound, specialization, options
        )
        key = (kernel.__name__, target.arch, str(signature), str(constants_of), str(attributes))
        if key not in done:
            done.add(key)
            binary = compile(ASTSource(kernel, signature, constants_of, attributes), target, options.__dict__)
            assert binary.asm["cubin"]
            # Half precision with an even H: loads of four bytes, which can be issued ahead.
            if (
                constants.get("PAIRS")
                and "LOCAL" in constants
                and any(t.dtype == torch.bfloat16 for t in tensors(args))
            ):
                assert "async_copy" in binary.asm["ttgir"], kernel.__name__
            print(f"{kernel.__name__}:sm_{target.arch}")


JITFunction.run = compiled
operators = torch.ops.statefeed
whole, GATES = chunks.steps, {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}


def backward(cell, rule, dtype, corrections=0, packed=True, chunked=True, H=16, reverse=False):
    """One backward pass on small tensors; only torch's products are computed."""
    chunks.steps = (lambda *_: 2) if chunked else whole
    T, B, states = 4, 2, 2 if cell == "lstm" else 1
    sizes = torch.tensor([2, 2, 1, 1]) if packed else None
    x, y, e = (torch.zeros(6 if packed else T * B, H, dtype=dtype) for _ in range(3))
    state = tuple(torch.zeros(B, H, dtype=dtype) for _ in range(states))
    weights = [torch.zeros(GATES[cell] * H, *rest, dtype=dtype) for rest in ((H,), (H,), (), ())]
    offsets = None if sizes is None else torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    saved = operators.triton_recompute(cell, x, y, state, weights, offsets, reverse, "ieee")
    if rule == "jacobian":
        operators.triton_mean_jacobian(cell, *saved, y, weights[1], B, offsets)
    D = {"stationary": torch.zeros(states * H), "per_row": torch.zeros(saved[0].shape[0], states * H)}.get(rule)
    operators.triton_backward(
        cell, rule, *saved, x, y, state, weights, [e, *state], D, offsets, corrections, reverse, True, "ieee"
    )


for cell in GATES:
    for rule in RULES if cell in ("gru", "lstm") else ("stationary", "jacobian"):
        backward(cell, rule, torch.float32, reverse=rule == "per_row")
for cell in ("rnn_tanh", "gru", "lstm"):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        backward(cell, "jacobian", dtype)
    backward(cell, "jacobian", torch.bfloat16, packed=False, chunked=False, H=3)
    backward(cell, "stationary", torch.bfloat16, packed=False, H=26)
for cell in ("gru", "lstm"):
    backward(cell, "direct", torch.float32, corrections=2, packed=False)
for dtype in (torch.float32, torch.float64):
    chunks.steps = lambda *_: 2
    x = torch.zeros(4, 2, 16, dtype=dtype)
    scan(x, x, x[0], True)
    scan(x, x[0, 0], None, False)
