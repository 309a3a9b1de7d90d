"""cuDNN's weight layout and the opaque forward operator, with stubs of torch's cuDNN functions on a CPU."""

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_kernels_layer import GATES
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

pytest.importorskip("triton", reason="Triton is not installed")

import statefeed as sf
from statefeed import layers, stack
from statefeed.backends import BACKENDS
from statefeed.backends.triton import cudnn

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="cuDNN's functions are replaced")
CELLS = ["rnn_tanh", "rnn_relu", "gru", "lstm"]


class Stub:
    """cuDNN as far as its weights go: ``calls`` holds, for every call, whether their layout was what cuDNN reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[bool] = []
        self.train: list[bool] = []
        self.flattened = 0
        monkeypatch.setattr(cudnn, "uses_cudnn", lambda _: True)
        monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", self.flatten)
        for cell in CELLS:
            monkeypatch.setattr(torch._VF, cell, self.recorded(getattr(torch._VF, cell)))

    def recorded(self, run: Any) -> Any:
        def call(*args: Any) -> Any:
            packed = isinstance(args[1], Tensor) and args[1].dtype == torch.int64  # batch_sizes before the state
            weights, biased = args[2 + packed], args[3 + packed]
            self.calls.append(self.layout(weights, biased))
            self.train.append(args[6 + packed])
            return run(*args)

        return call

    @staticmethod
    def places(weights: Sequence[Tensor], biased: bool) -> list[int]:
        """Where cuDNN looks for every weight, in elements from the beginning of the buffer, and its end."""
        per = 4 if biased else 2
        firsts = range(0, len(weights), per)
        order = [i + k for i in firsts for k in (0, 1)] + [i + k for i in firsts for k in (2, 3)[: per - 2]]
        at, places = 0, {}
        for k in order:
            places[k] = at
            at += weights[k].numel()
        end = at if biased else at + 2 * len(firsts) * len(weights[0])
        return [places[k] for k in range(len(weights))] + [end]

    def layout(self, weights: Sequence[Tensor], biased: bool) -> bool:
        *places, end = self.places(weights, biased)
        storage = weights[0].untyped_storage()
        base, itemsize = storage.data_ptr(), weights[0].element_size()
        return storage.nbytes() >= end * itemsize and all(
            w.data_ptr() == base + at * itemsize and w.is_contiguous() for w, at in zip(weights, places, strict=True)
        )

    def flatten(
        self, weights: list[Tensor], per: int, I: int, mode: int, H: int, P: int, layers: int, batch_first: bool,
        bidirectional: bool,
    ) -> Tensor:  # fmt: skip
        assert per == len(weights) // (2 if bidirectional else 1)
        assert (I, H, P, layers, batch_first) == (weights[0].shape[1], weights[1].shape[1], 0, 1, False)
        assert len(weights[1]) // H == {0: 1, 1: 1, 2: 4, 3: 3}[mode]
        assert len({w.dtype for w in weights}) == 1
        *places, end = self.places(weights, per == 4)
        buffer = weights[0].new_zeros(end)
        for w, at in zip(weights, places, strict=True):
            w.view(-1)  # as torch does, which raises if the weight is not contiguous
            new = buffer[at : at + w.numel()].view(w.shape)
            new.copy_(w)
            w.set_(new)
        self.flattened += 1
        return buffer


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    return Stub(monkeypatch)


def module(cell: str, layers: int = 1, bidirectional: bool = True, bias: bool = True) -> nn.RNNBase:
    torch.manual_seed(0)
    kind = {"gru": nn.GRU, "lstm": nn.LSTM}.get(cell, nn.RNN)
    extra = {"nonlinearity": cell[4:]} if kind is nn.RNN else {}
    return kind(3, 4, layers, bidirectional=bidirectional, bias=bias, **extra)


def weights_of(rnn: nn.RNNBase, layer: int = 0) -> list[Tensor]:
    per = len(rnn._flat_weights) // rnn.num_layers
    return rnn._flat_weights[layer * per : (layer + 1) * per]


def run(rnn: nn.RNNBase, cell: str, x: Tensor, batch_sizes: Tensor | None = None, call: Any = None) -> Tensor:
    """All layers, one call each."""
    directions = 2 if rnn.bidirectional else 1
    B = x.shape[1] if batch_sizes is None else int(batch_sizes[0])
    zeros = [torch.zeros(directions, B, 4, dtype=x.dtype) for _ in range(2 if cell == "lstm" else 1)]
    for k in range(rnn.num_layers):
        x, _ = (call or cudnn.layer)(cell, x, batch_sizes, zeros, weights_of(rnn, k), directions)
    return x


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_weights_are_in_one_buffer_at_every_call(cell: str, bias: bool, bidirectional: bool, stub: Stub) -> None:
    rnn, x = module(cell, 2, bidirectional, bias), torch.randn(5, 2, 3)
    expected = rnn(x)[0]
    assert not any(stub.calls), "torch's layers on a CPU do not flatten: the stub tells layouts apart"
    stub.calls.clear()
    pointers = [w.data_ptr() for w in rnn.parameters()]
    torch.testing.assert_close(run(rnn, cell, x), expected)
    with torch.no_grad():
        torch.testing.assert_close(run(rnn, cell, x), expected)
    assert stub.calls == [True] * 4
    assert stub.flattened == 4, "weights in another layout are packed at every call"
    assert pointers == [w.data_ptr() for w in rnn.parameters()], "and the parameters stay where they are"

    for k in range(2):
        cudnn.flatten(cell, weights_of(rnn, k), 2 if bidirectional else 1)
    names = dict(rnn.named_parameters())
    assert all(names[name] is w for name, w in zip(rnn._flat_weights_names, rnn._flat_weights, strict=True))
    torch.testing.assert_close(run(rnn, cell, x), expected)
    assert stub.calls == [True] * 6
    assert stub.flattened == 6, "flattened once, nothing is packed"


def test_weights_that_were_replaced_are_packed_for_the_call(stub: Stub) -> None:
    rnn, x = module("gru"), torch.randn(5, 2, 3)
    cudnn.flatten("gru", weights_of(rnn), 2)
    expected = run(rnn, "gru", x)
    # As FSDP does: the parameters become views of one buffer, in the order of parameters() and not at its beginning.
    gathered = torch.cat([torch.zeros(3), *(p.detach().flatten() for p in rnn.parameters())])
    at = 3
    for p in rnn.parameters():
        p.data = gathered[at : at + p.numel()].view(p.shape)
        at += p.numel()
    stub.calls.clear()
    found, versions = run(rnn, "gru", x), [p._version for p in rnn.parameters()]
    torch.testing.assert_close(found, expected)
    run(rnn, "gru", x)
    assert stub.calls == [True, True]
    assert versions == [p._version for p in rnn.parameters()], "packing is no change of a parameter"


def test_weights_that_are_not_contiguous_are_packed_for_the_call(stub: Stub) -> None:
    rnn, x = module("lstm"), torch.randn(5, 2, 3)
    expected = rnn(x)[0]
    for p in rnn.parameters():
        if p.dim() == 2:
            p.data = p.data.T.contiguous().T
    assert not any(w.is_contiguous() for w in rnn.parameters() if w.dim() == 2)
    cudnn.flatten("lstm", weights_of(rnn), 2)
    stub.calls.clear()
    torch.testing.assert_close(run(rnn, "lstm", x), expected)
    assert stub.calls == [True]


@pytest.mark.parametrize("cell", CELLS)
def test_packed_rows_and_states(cell: str, stub: Stub) -> None:
    rnn = module(cell)
    packed = pack_sequence([torch.randn(5, 3), torch.randn(2, 3)])
    expected = rnn(packed)[0].data
    torch.testing.assert_close(run(rnn, cell, packed.data, packed.batch_sizes), expected)
    assert stub.calls[-1]
    hx = [torch.randn(2, 2, 4) for _ in range(2 if cell == "lstm" else 1)]
    x = torch.randn(5, 2, 3)
    y, final = rnn(x, tuple(hx) if len(hx) > 1 else hx[0])
    found, found_final = cudnn.layer(cell, x, None, hx, weights_of(rnn), 2)
    torch.testing.assert_close(found, y)
    torch.testing.assert_close(found_final, final if len(hx) > 1 else (final,))


def test_under_autocast_the_layer_runs_in_its_dtype(stub: Stub) -> None:
    rnn, x = module("lstm"), torch.randn(5, 2, 3)
    call = functools.partial(cudnn.layer, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = run(rnn, "lstm", x, call=call)
    assert y.dtype == torch.bfloat16
    assert stub.calls == [True]
    torch.testing.assert_close(y.float(), rnn(x)[0], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_weights_in_one_buffer_are_cast_in_one_copy(bias: bool, bidirectional: bool, stub: Stub) -> None:
    rnn, directions = module("gru", 1, bidirectional, bias), 2 if bidirectional else 1
    separate = cudnn.cast_weights(weights_of(rnn), directions, torch.bfloat16)
    assert len({w.untyped_storage().data_ptr() for w in separate}) == len(separate)
    cudnn.flatten("gru", weights_of(rnn), directions)
    with torch.no_grad():
        cast = cudnn.cast_weights(weights_of(rnn), directions, torch.bfloat16)
    assert stub.layout(cast, bias)
    for a, b, w in zip(cast, separate, weights_of(rnn), strict=True):
        assert torch.equal(a, w.to(torch.bfloat16))
        assert torch.equal(b, a)
    for dtype in (None, torch.float32):
        assert cudnn.cast_weights(weights_of(rnn), directions, dtype) == weights_of(rnn)


def test_another_dtype_raises() -> None:
    with pytest.raises(ValueError, match=r"dtype of the weights, torch.float32, got torch.float64"):
        run(module("gru"), "gru", torch.randn(5, 2, 3, dtype=torch.float64))


@pytest.mark.parametrize("packed", [False, True])
def test_the_graph_of_a_compiled_layer_does_not_depend_on_the_length(packed: bool) -> None:
    """Without the stub: what counts is the operator."""
    rnn, sizes = module("gru"), []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        sizes.append(len(graph.graph.nodes))
        return graph

    for T in (2, 3, 40):
        x, batch_sizes = torch.randn(T, 2, 3), None
        expected = rnn(x)[0]
        if packed:
            x, batch_sizes = x.flatten(0, 1), torch.full((T,), 2)
            expected = expected.flatten(0, 1)
        torch.compiler.reset()
        compiled = torch.compile(cudnn.layer, backend=count, fullgraph=True, dynamic=False)
        with torch.no_grad():
            found = compiled("gru", x, batch_sizes, [torch.zeros(2, 2, 4)], weights_of(rnn), 2)[0]
        torch.testing.assert_close(found, expected)
    assert len(sizes) == 3
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("cell", CELLS)
def test_the_operator_passes_opcheck(cell: str) -> None:
    rnn = module(cell)
    state = [torch.zeros(2, 2, 4) for _ in range(2 if cell == "lstm" else 1)]
    weights = [w.detach() for w in weights_of(rnn)]
    for x, batch_sizes in ((torch.randn(5, 2, 3), None), (torch.randn(3, 3), torch.tensor([2, 1]))):
        torch.library.opcheck(torch.ops.statefeed.cudnn_layer.default, (cell, x, batch_sizes, state, weights, 2))
    assert GATES.get(cell, 1) * 4 == len(weights[0])


def test_a_layer_flattens_its_weights_as_its_rule_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One buffer per layer under a rule, all layers in one under an exact rule and after restore."""
    calls: list[object] = []
    on_gpu = property(lambda self: "_feedback" in self.__dict__ and not self._feedback.exact)
    monkeypatch.setattr(layers.RecurrentLayer, "_layer_by_layer", on_gpu)
    monkeypatch.setattr(layers, "flatten_weights", lambda cell, w, directions: calls.append((len(w), directions)))
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", lambda self: calls.append("torch"))

    def new() -> list[object]:
        made, calls[:] = list(calls), []
        return made

    layer = sf.LSTM(3, 4, 2, bidirectional=True, feedback="dsf")
    assert new()[-2:] == [(8, 2), (8, 2)]
    layer.feedback = "torch"
    assert new() == ["torch"]
    layer.double()
    assert new() == ["torch"]
    layer.feedback = "gate+1"
    assert new() == [(8, 2), (8, 2)]
    layer.float()
    assert new() == [(8, 2), (8, 2)]
    sf.restore(layer)
    assert new() == ["torch"]


def test_a_layer_on_a_gpu_runs_layer_by_layer_without_autograd_too(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x = sf.GRU(3, 4, 2, bidirectional=True, dtype=torch.float64, feedback="dsf"), torch.randn(5, 2, 3).double()
    with torch.no_grad():
        expected = nn.GRU.forward(layer, x)
    monkeypatch.setattr(layers.RecurrentLayer, "_layer_by_layer", property(lambda self: True))
    monkeypatch.setattr(stack, "choose", lambda *_: BACKENDS["reference"])
    calls = []
    gru = torch._VF.gru
    monkeypatch.setattr(torch._VF, "gru", lambda *a: calls.append(a) or gru(*a), raising=False)
    with torch.no_grad():
        found = layer(x)
    assert len(calls) == 4
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
