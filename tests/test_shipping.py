"""Uses of a model: restored and exported, streamed, compiled, checkpointed, trained in half precision."""

import copy
import multiprocessing
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import statefeed as sf

CELLS = {"rnn": sf.RNN, "gru": sf.GRU, "lstm": sf.LSTM}
RULES = ["dsf", "ft-bptt", 0.5, "calibrated", "calibrated+1", "gate+1", "jacobian", "jacobian+2"]


class Model(nn.Module):
    """One layer of every cell and a head; x (B, T, 3) -> (B, T, 2)."""

    def __init__(self, rule="dsf", bidirectional=False, rnn=True, dropout=0.1):
        super().__init__()
        torch.manual_seed(0)
        layers = 2 if dropout else 1
        self.gru = nn.GRU(3, 6, layers, batch_first=True, dropout=dropout, bidirectional=bidirectional)
        self.lstm = nn.LSTM(12 if bidirectional else 6, 5, batch_first=True)
        self.rnn = nn.RNN(5, 4, batch_first=True) if rnn else None
        self.head = nn.Linear(4 if rnn else 5, 2)
        sf.swap(self, feedback=rule)

    def forward(self, x):
        for layer in (self.gru, self.lstm, self.rnn):
            x = x if layer is None else layer(x)[0]
        return self.head(x)


def stored(model):
    """The tensors of learned rules in a model."""
    return [t for m in model.modules() if hasattr(m, "learned_tensors") for t in m.learned_tensors().values()]


@pytest.fixture
def x():
    return torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(1))


def trained(x, bidirectional=True):
    """A model after a few training steps, and its outputs, computed with autograd."""
    model = Model("calibrated+1", bidirectional)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) - x[..., :2]).square().mean().backward()
        optimizer.step()
    model.eval()
    outputs = model(x)
    assert outputs.requires_grad
    return model, outputs.detach()


# Exported -------------------------------------------------------------------------------------------------------------

# torch warns of the list of parameters of its own layers, which is not a buffer.
exporting = pytest.mark.filterwarnings("ignore:The tensor attributes? self:UserWarning")


@exporting
@pytest.mark.parametrize("restored", [True, False])
def test_an_exported_model_has_the_outputs_of_training_for_any_batch(x, restored):
    model, outputs = trained(x)
    if restored:
        sf.restore(model)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    assert "statefeed" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), outputs)
    for B in (1, 9):
        other = torch.randn(B, 7, 3)
        torch.testing.assert_close(program.module()(other), model(other))


@exporting
@pytest.mark.parametrize("cell", CELLS)
def test_an_exported_step_runs_a_sequence(cell, x):
    torch.manual_seed(0)
    layer = CELLS[cell](3, 5, num_layers=2, batch_first=True)
    y, _ = layer(x)
    assert y.requires_grad
    sf.restore(layer)
    state = torch.zeros(2, 4, 5)
    if cell == "lstm":
        state = (state, state.clone())  # two tensors: export treats the same tensor twice as one input
    step = torch.export.export(layer, (x[:, :1], state)).module()
    for t in range(7):
        y_t, state = step(x[:, t : t + 1], state)
        torch.testing.assert_close(y_t[:, 0], y[:, t])


def run_onnx(path, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(outputs)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_onnx_has_the_outputs_of_training_for_any_batch_and_length(x, bidirectional, tmp_path):
    """The exporter that is not based on torch.export supports dynamic batch and time axes."""
    pytest.importorskip("onnx", reason="the extra statefeed[onnx] is not installed")
    pytest.importorskip("onnxruntime", reason="the extra statefeed[onnx] is not installed")
    model, outputs = trained(x, bidirectional)
    sf.restore(model)
    path, axes = tmp_path / "model.onnx", {0: "batch", 1: "time"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in torch, and about batches of another size than the example's
        torch.onnx.export(
            model, (x,), path, dynamo=False, input_names=["x"], output_names=["y"], dynamic_axes={"x": axes, "y": axes}
        )
    torch.testing.assert_close(run_onnx(path, x), outputs, rtol=1e-4, atol=1e-5)
    for B, T in ((1, 1), (9, 7), (2, 40)):
        other = torch.randn(B, T, 3)
        torch.testing.assert_close(run_onnx(path, other), model(other).detach(), rtol=1e-4, atol=1e-5)


def test_onnx_through_torch_export_leaves_the_batch_free(x, tmp_path):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason="the extra statefeed[onnx] is not installed")
    layer = sf.GRU(3, 5, batch_first=True)
    outputs, _ = layer(x)
    assert outputs.requires_grad
    model = OutputsOnly(sf.restore(layer))
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about optional packages of torch that are not installed
        torch.onnx.export(
            model, (x,), path, dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
        )
    torch.testing.assert_close(run_onnx(path, x), outputs.detach(), rtol=1e-4, atol=1e-5)
    other = torch.randn(9, 7, 3)
    torch.testing.assert_close(run_onnx(path, other), model(other).detach(), rtol=1e-4, atol=1e-5)


class OutputsOnly(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("convert", [torch.jit.script, lambda model: torch.jit.trace(model, torch.zeros(4, 7, 3))])
def test_torchscript_raises_until_the_model_is_restored(convert, x):
    model = Model(rnn=False)
    model.forward = None if convert is torch.jit.script else model.forward
    with pytest.raises(RuntimeError, match=r"^TorchScript cannot hold a feedback rule: .*restore\(model\)[^\n]*$"):
        convert(model.gru if convert is torch.jit.script else model)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("cell", CELLS)
def test_an_exact_rule_is_traced_in_a_new_process(cell, tmp_path):
    torch.manual_seed(0)
    layer = CELLS[cell](3, 5)
    torch.save((layer.state_dict(), torch.randn(4, 7, 3)), tmp_path / "layer.pt")
    code = f"""
import torch, statefeed as sf
weights, x = torch.load({str(tmp_path / "layer.pt")!r})
layer = sf.{cell.upper()}(3, 5)
layer.load_state_dict(weights)
traced = torch.jit.trace(layer, x)
layer.feedback = "dsf"
try:
    torch.jit.trace(layer, x)
except RuntimeError as error:
    assert "TorchScript cannot hold a feedback rule" in str(error), error
else:
    raise AssertionError("a trace of an approximate rule")
y = traced(x)[0]
y.sum().backward()
torch.save((y.detach(), [p.grad for p in traced.parameters()]), {str(tmp_path / "result.pt")!r})
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    y, grads = torch.load(tmp_path / "result.pt")
    _, x = torch.load(tmp_path / "layer.pt")
    plain = sf.restore(layer)
    expected = plain(x)[0]
    torch.testing.assert_close(y, expected.detach())
    torch.testing.assert_close(grads, list(torch.autograd.grad(expected.sum(), list(plain.parameters()))))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_restored_model_is_scripted_and_traced(x):
    layer = sf.GRU(3, 5, batch_first=True)
    y, _ = layer(x)
    model = OutputsOnly(sf.restore(layer))
    for converted in (torch.jit.script(model), torch.jit.trace(model, x)):
        torch.testing.assert_close(converted(x), y)


# Streamed -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_steps_equal_one_call_on_the_sequence(cell, batch_first):
    torch.manual_seed(0)
    layer = CELLS[cell](3, 5, num_layers=2, batch_first=batch_first)
    x = torch.randn(9, 4, 3)
    y, final = layer(x.transpose(0, 1) if batch_first else x)
    y = y.transpose(0, 1) if batch_first else y
    state = None
    for t in range(9):
        y_t, state = layer.step(x[t], state)
        assert not y_t.requires_grad
        torch.testing.assert_close(y_t, y[t])
    torch.testing.assert_close(state, final)


def test_a_step_continues_a_sequence_with_the_current_weights():
    layer, x = sf.LSTM(3, 5), torch.randn(6, 2, 3)
    _, state = layer(x[:5])
    y, _ = layer.step(x[5], state)
    torch.testing.assert_close(y, layer(x)[0][-1])
    with torch.no_grad():
        layer.weight_hh_l0.zero_()
    assert not torch.allclose(layer.step(x[5], state)[0], y)


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (sf.GRU(3, 5, bidirectional=True), (2, 3), "a bidirectional layer has no step"),
        (sf.GRU(3, 5), (1, 2, 3), r"x must have the shape \(B, I\)"),
        (sf.GRU(3, 5), (3,), r"x must have the shape \(B, I\)"),
    ],
)
def test_invalid_steps_raise(layer, shape, message):
    with pytest.raises(ValueError, match=rf"^{message}[^\n]*$"):
        layer.step(torch.zeros(shape))


# Compiled -------------------------------------------------------------------------------------------------------------


def compiled_and_eager(model, x, backend):
    """(outputs, gradients, learned tensors) of the compiled model, which is one graph, and of the eager model."""
    other = copy.deepcopy(model)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        results = []
        for call, module in ((torch.compile(model, backend=backend, fullgraph=True), model), (other, other)):
            leaf = x.clone().requires_grad_()
            y = call(leaf)
            y.square().sum().backward()
            results.append([y.detach(), leaf.grad, *(p.grad for p in module.parameters()), *stored(module)])
    return results


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # a warning of torch while it traces
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.compiles
def test_a_compiled_model_is_one_graph_and_has_the_gradients_of_its_rule(rule, x):
    model = Model(rule, rnn=rule != "gate+1", dropout=0.0).double()
    ours, eager = compiled_and_eager(model, x.double(), "aot_eager")
    torch.testing.assert_close(ours, eager)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.compiles
def test_a_compiled_model_follows_a_rule_that_changes(x):
    model = Model("dsf", rnn=False, dropout=0.0)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for rule in ("dsf", "gate+1"):
            for layer in (model.gru, model.lstm):
                layer.feedback = rule
            found, expected = (
                torch.autograd.grad(m(x).square().sum(), list(model.parameters())) for m in (compiled, model)
            )
            torch.testing.assert_close(found, expected)


# Warnings of torch while it traces, and at graph breaks.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning", "ignore:The .grad attribute")
@pytest.mark.compiles
def test_a_fitted_rule_is_compiled_around_its_exact_passes(x):
    model = Model("fitted", rnn=False, dropout=0.0).double()
    other = copy.deepcopy(model)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(2):  # the first is exact
            found, expected = (
                torch.autograd.grad(call(x.double()).square().sum(), list(module.parameters()))
                for call, module in ((compiled, model), (other, other))
            )
            torch.testing.assert_close(found, expected)
    torch.testing.assert_close(stored(model), stored(other))
    assert model.gru.diagonal.any()


@pytest.mark.slow
@pytest.mark.filterwarnings(
    *(f"ignore::{kind}Warning" for kind in ("Deprecation", "Future", "User"))
)  # warnings of inductor
@pytest.mark.compiles
def test_inductor_compiles_the_same(x):
    model = Model("calibrated+1", bidirectional=True, dropout=0.0)
    ours, eager = compiled_and_eager(model, x, "inductor")
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


# Trained in other ways ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["dsf", "calibrated+1", "gate+1"])
def test_a_model_learns_under_autocast(rule):
    torch.manual_seed(0)
    model = Model(rule, rnn=False, dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    losses = []
    x = torch.randn(8, 6, 3)
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        loss = (y.float() - x.cumsum(1)[..., :2].tanh()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("rule", ["dsf", "calibrated+1", "gate+1"])
def test_a_checkpointed_model_has_the_same_gradients(rule, x):
    model = Model(rule, rnn=False)
    other = copy.deepcopy(model)
    torch.manual_seed(3)
    model(x).square().sum().backward()
    torch.manual_seed(3)
    checkpoint(other, x, use_reentrant=False).square().sum().backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    torch.testing.assert_close(stored(model), stored(other))


@pytest.mark.parametrize("rule", ["dsf", "calibrated"])
def test_gradients_flow_in_evaluation_and_a_calibrated_diagonal_stays(rule, x):
    model = Model(rule)
    model(x).sum().backward()
    model.zero_grad()
    model.eval()
    before = [t.clone() for t in stored(model)]
    leaf = x.clone().requires_grad_()
    model(leaf).sum().backward()
    assert leaf.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    assert len(before) == (6 if rule == "calibrated" else 0)
    assert all(torch.equal(a, b) for a, b in zip(stored(model), before, strict=True))


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("layer", [sf.GRU(3, 5), sf.Recurrent(nn.GRUCell(3, 5))], ids=["layer", "custom cell"])
def test_a_second_derivative_raises(layer, power):
    """Also if the incoming gradient is a constant, for which ``once_differentiable`` would return a detached result."""
    x = torch.randn(4, 2, 3, requires_grad=True)
    layer.feedback = "dsf"
    y, _ = layer(x)
    with pytest.raises(RuntimeError, match=r"^a feedback rule has no second derivative[^\n]+$"):
        torch.autograd.grad((y**power).sum(), x, create_graph=True)[0].square().sum().backward()
    layer.feedback = "torch"
    (first,) = torch.autograd.grad((layer(x)[0] ** power).sum(), x, create_graph=True)
    first.square().sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["dsf", "calibrated+1", "gate+1", "jacobian", "fitted"])
@pytest.mark.parametrize("cell", CELLS)
def test_torch_func_computes_the_gradient_of_the_rule(cell, rule, dtype):
    """bfloat16 runs through PyTorch, float32 through the fused kernels if available."""
    torch.manual_seed(0)
    layer = CELLS[cell](3, 5, 2, bidirectional=True, feedback="dsf" if cell == "rnn" and rule == "gate+1" else rule)
    layer = layer.to(dtype)
    x, other = torch.randn(6, 2, 3, dtype=dtype), copy.deepcopy(layer)

    def loss(parameters, x):
        y, final = torch.func.functional_call(layer, parameters, (x,))
        return y.square().sum() + (final[-1] if cell == "lstm" else final).sum()

    parameters = dict(layer.named_parameters())
    found, d_x = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    leaf = x.clone().requires_grad_()
    y, final = other(leaf)
    (y.square().sum() + (final[-1] if cell == "lstm" else final).sum()).backward()
    expected = {name: p.grad for name, p in other.named_parameters()}
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(d_x, leaf.grad)
    torch.testing.assert_close(layer.learned_tensors(), other.learned_tensors())
    assert all(p.grad is None for p in layer.parameters())


def test_torch_func_raises_for_a_second_derivative_and_a_map_over_samples():
    layer, x = sf.GRU(3, 5, feedback="dsf"), torch.randn(4, 2, 3)

    def loss(x):
        return layer(x)[0].square().sum()

    with pytest.raises(RuntimeError, match=r"^a feedback rule has no second derivative[^\n]+$"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum())(x)
    with pytest.raises(RuntimeError, match=r"^torch.func.vmap cannot run through a recurrent layer[^\n]+$"):
        torch.func.vmap(torch.func.grad(loss))(x[None])
    with pytest.raises(RuntimeError, match=r"^the backward pass of a feedback rule takes one gradient[^\n]+$"):
        torch.func.jacrev(loss)(x)


class Streams(torch.utils.data.Dataset):
    """Items that a layer computes, as in an augmentation or a frozen front end."""

    def __init__(self):
        self.layer = sf.GRU(3, 5)

    def __len__(self):
        return 4

    def __getitem__(self, k):
        y, _ = self.layer(torch.full((50, 8, 3), float(k)))
        y.square().sum().backward()
        return y.detach()


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on one core
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
def test_a_forked_worker_can_run_a_layer():
    """Also if the parent process has started its threads."""
    data = Streams()
    expected = [data[k] for k in range(4)]
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for found, item in zip(loader, expected, strict=True):
        torch.testing.assert_close(found, item)
