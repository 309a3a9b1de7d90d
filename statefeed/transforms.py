"""Error messages of layers under torch's function transforms, and their support of torch.fx.

``"torch"`` is torch.nn's own layer: on a CPU it supports second derivatives and batched gradients; cuDNN supports
neither. ``torch.func.vmap`` fails for torch's RNN, GRU and LSTM too. Of these, only the LSTM supports ``vmap`` of
``grad``, and only the LSTM has no forward-mode derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

from statefeed.cells.protocol import Cell

NO_SECOND_DERIVATIVE = (
    "a feedback rule has no second derivative, and this backward pass has create_graph=True (as for a gradient "
    'penalty): set feedback to "torch", which has a second derivative on a CPU'
)


def no_vmap(cell: Cell) -> str:
    """Why ``vmap`` cannot run a forward pass."""
    remedy = '; for vmap of grad, feedback "torch" works on a CPU' if cell.torch_forward == "lstm" else ""
    return (
        "torch.func.vmap cannot run through a recurrent layer under a feedback rule: move the mapped "
        f"dimension into the batch, or loop over it{remedy}"
    )


def no_batched_gradients(cell: Cell | None) -> str:
    """Why a backward pass does not accept a batch of gradients; the cell is None for ``statefeed.Recurrent``."""
    remedy = ', or set feedback to "torch" on a CPU'
    if cell is None:
        remedy = ', or set feedback to "torch"'
    elif cell.torch_forward is None:
        remedy = ""
    return (
        "the backward pass of a feedback rule takes one gradient and got a batch of them (torch.func.jacrev, "
        f"autograd.functional.jacobian(vectorize=True) or is_grads_batched=True): loop over the outputs{remedy}"
    )


def no_forward_mode(cell: Cell | None) -> str:
    """Why there is no forward-mode derivative; the cell is None for ``statefeed.Recurrent``."""
    remedy = "use reverse mode"
    if cell is None:
        remedy = 'set feedback to "bptt"'
    elif cell.torch_forward not in (None, "lstm"):
        remedy = 'set feedback to "torch" on a CPU'
    return f"a feedback rule has no forward-mode derivative (torch.func.jvp, jacfwd or forward_ad): {remedy}"


NO_EXPANDED_WEIGHTS = (
    "ExpandedWeights (call_for_per_sample_grads) cannot run through a feedback rule: call statefeed.restore(model) "
    "first; on a CPU torch.nn's RNN and GRU with batch_first=True support them"
)

NO_EXPANDED_STEP = (
    "ExpandedWeights (call_for_per_sample_grads) cannot run through statefeed.Recurrent under an approximate rule: set "
    'feedback to "bptt", which takes them where the modules of the cell do'
)

NO_TRANSFORM_OF_A_STEP = (
    'torch.func cannot run through statefeed.Recurrent under an approximate rule: set feedback to "bptt", which is '
    "plain autograd there"
)


def is_expanded(weight: Tensor) -> bool:
    """Whether a weight is one of torch's ExpandedWeights."""
    return type(weight).__name__ == "ExpandedWeight"


def is_batched(tensor: Tensor | None) -> bool:
    """Whether a tensor is a functorch batched tensor, as ``is_grads_batched=True`` passes."""
    return tensor is not None and (
        torch._C._functorch.is_batchedtensor(tensor) or torch._C._functorch.is_legacy_batchedtensor(tensor)
    )


def is_transformed() -> bool:
    """Whether torch.jit.trace, torch.func or forward-mode differentiation looks at every operation."""
    if torch.compiler.is_compiling():
        return False
    return bool(
        torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def traced(proxy: fx.Proxy, layer: nn.Module, base: type[nn.Module], *state: Any, **options: Any) -> Any:
    """Record the call of a layer as one node of the graph of ``torch.fx.symbolic_trace``.

    Args:
        proxy: the input.
        layer: the called layer.
        base: the class whose ``forward`` calls this function.
        state: the initial state.
        options: other arguments; those that are None are left out of the recorded call.

    Returns:
        The proxy of the call.

    Raises:
        RuntimeError: the layer is not a submodule of the traced module, or its class overrides ``forward``.
    """
    name = type(layer).__qualname__
    if type(layer).forward is not base.forward:
        raise RuntimeError(
            f"torch.fx cannot trace {name}, a subclass of a recurrent layer that overrides forward: make it a "
            "leaf, with a Tracer whose is_leaf_module returns True for it"
        )
    path = proxy.tracer.path_of_module(layer)  # type: ignore[attr-defined]
    if not path:
        raise RuntimeError(f"torch.fx traces a module that holds a recurrent layer, not {name} itself")
    arguments = (proxy, *(s for s in state if s is not None))
    keywords = {key: value for key, value in options.items() if value is not None}
    return proxy.tracer.create_proxy("call_module", path, arguments, keywords)
