"""Compiles what the launchers of the GPU kernels would launch, for architectures that are not there; prints each."""

import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from statefeed.backends.triton import layer
from statefeed.scan import chunks
from statefeed.scan.triton import scan

assert isinstance(chunks.row_at, JITFunction), "the interpreter is on"
TARGETS = [GPUTarget("cuda", arch, 32) for arch in (80, 90)]
done = set()


def compiled(kernel, *args, grid, warmup, **constants):
    """In place of a launch: the specialisation that Triton makes of these arguments, through to the binary."""
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
            print(f"{kernel.__name__}:sm_{target.arch}")


JITFunction.run = compiled
whole, GATES = chunks.steps, {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}


def backward(cell, rule, dtype, corrections=0, packed=True, cut=True, H=16):
    """One backward pass on small tensors; nothing is computed but torch's products."""
    chunks.steps = (lambda *_: 2) if cut else whole
    T, B, states = 4, 2, 2 if cell == "lstm" else 1
    sizes = torch.tensor([2, 2, 1, 1]) if packed else None
    shape = (6,) if packed else (T, B)
    x, y, e = (torch.zeros(*shape, H, dtype=dtype) for _ in range(3))
    state = tuple(torch.zeros(B, H, dtype=dtype) for _ in range(states))
    weights = [torch.zeros(GATES[cell] * H, *rest, dtype=dtype) for rest in ((H,), (H,), (), ())]
    tape = layer.tape(cell, x, y, state, weights, sizes)
    if rule == "jacobian":
        layer.mean_jacobian(cell, tape, y, weights[1])
    D = torch.zeros(states * H) if rule == "stationary" else rule
    layer.backward(cell, tape, x, y, state, weights, (e, *state), D, corrections)


for cell in GATES:
    for rule in ("stationary", "gate", "jacobian")[:: 1 if cell in ("gru", "lstm") else 2]:
        backward(cell, rule, torch.float32)
for cell in ("rnn_tanh", "gru", "lstm"):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        backward(cell, "jacobian", dtype)
    backward(cell, "jacobian", torch.bfloat16, packed=False, cut=False, H=3)
for cell in ("gru", "lstm"):
    backward(cell, "gate", torch.float32, corrections=2, packed=False)
for dtype in (torch.float32, torch.float64):
    chunks.steps = lambda *_: 2
    x = torch.zeros(4, 2, 16, dtype=dtype)
    scan(x, x, x[0], True)
    scan(x, x[0, 0], None, False)
