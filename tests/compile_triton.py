"""Script that compiles every launch of the GPU kernels for A100 and H100, without a GPU, and prints each."""

import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from statefeed.backends.triton import host
from statefeed.backends.triton.cells import CELLS
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
whole, GATES = chunks.steps, {name: cell.gates for name, cell in CELLS.items()}


def backward(cell, rule, dtype, corrections=0, packed=True, chunked=True, H=16, reverse=False, heads=2):
    """One backward pass on small tensors; only torch's products are computed."""
    chunks.steps = (lambda *_: 2) if chunked else whole
    T, B, P = 4, 2, H // 2 if cell == "lstm_projected" else H
    widths = (P, *(H,) * (CELLS[cell].states - 1))
    columns = H // heads if CELLS[cell].from_states else P
    sizes = torch.tensor([2, 2, 1, 1]) if packed else None
    x, y, e = (torch.zeros(6 if packed else T * B, width, dtype=dtype) for width in (H, P, P))
    state = tuple(torch.zeros(B, width, dtype=dtype) for width in widths)
    weights = [torch.zeros(GATES[cell] * H, *rest, dtype=dtype) for rest in ((H,), (columns,), (), ())]
    weights += [torch.zeros(P, H, dtype=dtype)] if P < H else []
    offsets = None if sizes is None else torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    saved = host.recomputed(cell, x, y, state, weights, offsets, reverse, "ieee")
    if rule == "jacobian":
        operators.triton_mean_jacobian(cell, *saved, y, weights[1], B, offsets)
    S = sum(widths)
    D = {"stationary": torch.zeros(S), "per_row": torch.zeros(saved[0].shape[0], S)}.get(rule)
    operators.triton_backward(
        cell, rule, *saved, x, y, state, weights, [e, *state], D, offsets, corrections, reverse, True, "ieee"
    )


for cell in GATES:
    for rule in RULES if GATES[cell] > 1 else ("stationary", "jacobian"):
        backward(cell, rule, torch.float32, reverse=rule == "per_row")
for cell in ("rnn_tanh", "gru", "lstm", "lstm_projected", "slstm"):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        backward(cell, "jacobian", dtype)
    backward(cell, "jacobian", torch.bfloat16, packed=False, chunked=False, H=3, heads=1)
    backward(cell, "stationary", torch.bfloat16, packed=False, H=26)
for cell in ("gru", "lstm", "lstm_projected", "slstm", "slstm_exp"):
    backward(cell, "direct", torch.float32, corrections=2, packed=False)
for dtype in (torch.float32, torch.float64):
    chunks.steps = lambda *_: 2
    x = torch.zeros(4, 2, 16, dtype=dtype)
    scan(x, x, x[0], True)
    scan(x, x[0, 0], None, False)
