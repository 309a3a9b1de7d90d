"""alignment: cosine, norm ratio and signs against gradients by autograd; the model is not changed."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.fx.immutable_collections import immutable_list

import statefeed as sf

pytestmark = pytest.mark.filterwarnings("ignore:the initial state", "ignore:feedback .* adds corrections")


class Model(nn.Module):
    """Two recurrent layers under two rules, dropout, a batch norm with buffers, a part that the loss never reaches."""

    def __init__(self, first="calibrated", second="dsf", dropout=0.3):
        super().__init__()
        torch.manual_seed(0)
        self.first = sf.GRU(3, 5, num_layers=2, dropout=dropout, feedback=first)
        self.second = sf.LSTM(5, 4, feedback=second)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 1)
        self.idle = sf.RNN(2, 2)
        for weight in (*self.first.parameters(), *self.second.parameters()):
            nn.init.normal_(weight, std=0.5)
        self.double()

    def forward(self, x):
        y, _ = self.second(self.first(x)[0])
        return self.head(self.norm(y.flatten(0, 1)))


def loss(model, x):
    return model(x).square().sum()


@pytest.fixture
def x():
    return torch.randn(8, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(model, x):
    """Gradients by plain autograd, under the rules of a copy of the model."""
    model = copy.deepcopy(model)
    model.zero_grad()
    loss(model, x).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def agreement(ours, exact, names):
    a, b = (torch.cat([side[name].flatten() for name in names]) for side in (ours, exact))
    return float(a @ b / (a.norm() * b.norm())), float(a.norm() / b.norm())


def by_hand(model, x):
    exact = copy.deepcopy(model)
    for layer in (exact.first, exact.second):
        layer.feedback = "torch"
    torch.manual_seed(7)
    ours = gradients(model, x)
    torch.manual_seed(7)
    return ours, gradients(exact, x)


def test_it_measures_what_autograd_gives(x):
    model = Model()
    ours, exact = by_hand(model, x)
    torch.manual_seed(7)
    found = sf.alignment(model, loss, x)
    assert set(found.parameters) == set(ours)
    for name, value in found.parameters.items():
        assert (value.cosine, value.norm_ratio) == pytest.approx(agreement(ours, exact, [name]), abs=1e-12)
    assert set(found.layers) == {"first", "second"}
    for layer, value in found.layers.items():
        names = [name for name in ours if name.startswith(layer)]
        assert (value.cosine, value.norm_ratio) == pytest.approx(agreement(ours, exact, names), abs=1e-12)
    assert (found.total.cosine, found.total.norm_ratio) == pytest.approx(agreement(ours, exact, list(ours)), abs=1e-12)
    assert found.total.cosine < 0.999


@pytest.mark.parametrize("rule", ["torch", "jacobian+8"])
def test_exact_rules_agree_fully(rule, x):
    """Dropout masks are the same in both passes, or the two would differ."""
    found = sf.alignment(Model(rule, rule), loss, x)
    for value in (found.total, *found.parameters.values(), *found.layers.values()):
        assert (value.cosine, value.norm_ratio) == pytest.approx((1, 1), abs=1e-9)


def test_the_model_is_as_it_was(x):
    model = Model("calibrated+1", "gate")
    loss(model, x).backward()
    other = copy.deepcopy(model)
    rules = [layer.feedback for layer in (model.first, model.second, model.idle)]
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    sf.alignment(model, loss, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert [layer.feedback for layer in (model.first, model.second, model.idle)] == rules
    assert model.training
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert (p.grad is None and grads[name] is None) or torch.equal(p.grad, grads[name])
    assert {name for name, _ in model.named_buffers()} == {name for name, _ in other.named_buffers()}
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))
    assert all(torch.equal(t, other.first.learned_tensors()[k]) for k, t in model.first.learned_tensors().items())


def test_the_mode_is_as_it_was_after_a_loss_that_changes_it(x):
    model = Model("dsf", "gate")
    model.idle.eval()

    def evaluated(model, x):
        return loss(model.eval(), x)

    sf.alignment(model, evaluated, x)
    assert (model.training, model.first.training, model.idle.training) == (True, True, False)


@pytest.mark.parametrize(
    ("loss_fn", "error", "match"),
    [
        (nn.MSELoss(), TypeError, "got MSELoss: pass lambda model, batch: criterion"),
        (nn.functional.mse_loss, TypeError, "got mse_loss: pass lambda model, batch: F.mse_loss"),
        (lambda model, x: model(x), ValueError, "must return a scalar tensor, got one of shape"),
        (lambda model, x: model(x).sum().item(), TypeError, "must return a scalar tensor, got float"),
    ],
)
def test_a_loss_of_other_arguments_raises(loss_fn, error, match, x):
    with pytest.raises(error, match=match):
        sf.alignment(Model("dsf", "gate"), loss_fn, x)


def test_it_prints_a_line_in_total_and_one_per_layer(x):
    found = sf.alignment(Model("dsf", "gate"), loss, x)
    total, *layers = str(found).splitlines()
    assert total.split()[0] == "total"
    assert f"cosine {found.total.cosine:.3f}, norm ratio {found.total.norm_ratio:.3f}" in total
    assert [line.split()[1] for line in layers] == list(found.layers)


def test_the_model_is_as_it_was_after_a_loss_that_fails(x):
    model, calls = Model("calibrated", "gate"), []

    def failing(model, x):
        calls.append(model.second.feedback)
        if len(calls) == 2:
            raise ArithmeticError("on purpose")
        return loss(model, x)

    buffers = [b.clone() for b in model.buffers()]
    with pytest.raises(ArithmeticError, match="on purpose"):
        sf.alignment(model, failing, x)
    assert calls == [sf.Feedback("gate"), sf.Feedback("torch")]
    assert model.first.feedback == sf.Feedback("calibrated")
    assert model.second.feedback == sf.Feedback("gate")
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))


def test_it_works_under_no_grad_and_on_a_bare_layer(x):
    layer = sf.GRU(3, 4, feedback="ft-bptt").double()
    with torch.no_grad():
        found = sf.alignment(layer, lambda model, x: model(x)[0].square().sum(), x)
    assert set(found.parameters) == {name for name, _ in layer.named_parameters()}
    assert 0 < found.total.cosine < 1


def test_parameters_that_need_no_gradient_are_left_out(x):
    model = Model()
    model.first.requires_grad_(False)
    found = sf.alignment(model, loss, x)
    assert set(found.layers) == {"second"}
    assert not [name for name in found.parameters if name.startswith("first")]


def test_a_gradient_of_zero_has_no_angle(x):
    layer = sf.GRU(3, 4).double()
    found = sf.alignment(layer, lambda model, x: 0 * model(x)[0].sum(), x)
    assert math.isnan(found.total.cosine)
    assert math.isnan(found.total.norm_ratio)


@pytest.mark.parametrize("model", [nn.Linear(3, 1), nn.GRU(3, 4), sf.GRU(3, 4).requires_grad_(False)])
def test_a_model_without_anything_to_align_raises(model):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        sf.alignment(model, lambda model, x: model(x).sum(), torch.zeros(2, 1, 3))


# Signs ----------------------------------------------------------------------------------------------------------------


def test_sign_agreement_is_the_fraction_of_entries_with_the_correct_sign(x):
    model = Model()
    ours, exact = by_hand(model, x)
    torch.manual_seed(7)
    found = sf.alignment(model, loss, x)
    for name, value in found.parameters.items():
        pairs = list(zip(ours[name].flatten().tolist(), exact[name].flatten().tolist(), strict=True))
        right = sum(a * b > 0 for a, b in pairs)
        assert value.sign_agreement == pytest.approx(right / sum(b != 0 for _, b in pairs), abs=1e-12)
    assert 0.5 < found.total.sign_agreement < 1


# Time lags ------------------------------------------------------------------------------------------------------------


def by_lag(layer, x, v):
    """Gradients of the last output with respect to the input at every lag, by plain autograd."""
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad((layer(leaf)[0][-1] * v).sum(), leaf)
    return list(grad.flip(0))


def outputs(model, x):
    return model(x)[0].square().sum()


@pytest.mark.parametrize("rule", ["dsf", "gate+1", "jacobian"])
@pytest.mark.parametrize("cell", [sf.GRU, sf.LSTM])
def test_lags_are_the_gradients_of_the_last_output(cell, rule, x):
    torch.manual_seed(0)
    layer = cell(3, 5, num_layers=2, feedback=rule).double()
    torch.manual_seed(7)
    lags = sf.alignment(layer, outputs, x).lags[""]
    torch.manual_seed(7)
    v = torch.randn(3, 5, dtype=torch.float64)
    ours = by_lag(layer, x, v)
    layer.feedback = "torch"
    exact = by_lag(layer, x, v)
    assert lags.rule == pytest.approx([float(g.norm()) for g in ours])
    assert lags.exact == pytest.approx([float(g.norm()) for g in exact])
    cosines = [float((g * h).sum() / (g.norm() * h.norm())) for g, h in zip(ours, exact, strict=True)]
    assert [at.cosine for at in lags.agreement] == pytest.approx(cosines)
    signs = [float(((g * h) > 0).double().mean()) for g, h in zip(ours, exact, strict=True)]
    assert [at.sign_agreement for at in lags.agreement] == pytest.approx(signs)


@pytest.mark.parametrize("corrections", [0, 1, 3])
def test_truncation_to_k_steps_is_exact_up_to_lag_k_and_zero_after(corrections, x):
    layer = sf.GRU(3, 5, feedback=f"ft-bptt+{corrections}").double()
    lags = sf.alignment(layer, outputs, x).lags[""]
    assert len(lags.exact) == len(lags.rule) == len(lags.agreement) == 8
    k = corrections + 1
    assert [at.cosine for at in lags.agreement[:k]] == pytest.approx([1.0] * k)
    assert [at.norm_ratio for at in lags.agreement[:k]] == pytest.approx([1.0] * k)
    assert not any(lags.rule[k:])
    assert all(lags.exact)
    assert all(math.isnan(at.cosine) for at in lags.agreement[k:])


def test_every_layer_has_its_lags_under_its_own_rule_and_dropout_masks_are_equal(x):
    found = sf.alignment(Model("jacobian+8", "ft-bptt"), loss, x)
    assert set(found.lags) == {"first", "second"}
    assert [at.cosine for at in found.lags["first"].agreement] == pytest.approx([1.0] * 8)
    assert not any(found.lags["second"].rule[1:])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("form", ["batch first", "packed", "lengths", "unbatched", "keyword", "state"])
def test_lags_of_every_form_of_input(form, bidirectional, x):
    torch.manual_seed(0)
    layer = sf.LSTM(3, 5, batch_first=form == "batch first", bidirectional=bidirectional, feedback="gate").double()
    lengths = torch.tensor([5, 8, 8])
    zeros = torch.zeros(2 if bidirectional else 1, 3, 5, dtype=torch.float64)

    def form_loss(model, x):
        if form == "packed":
            return model(nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False))[0].data.sum()
        arguments = {
            "batch first": (x.transpose(0, 1),),
            "lengths": (x,),
            "unbatched": (x[:, 0],),
            "keyword": (),
            "state": (x, (zeros, zeros)),
        }[form]
        keywords = {"lengths": {"lengths": lengths}, "keyword": {"input": x}}.get(form, {})
        return model(*arguments, **keywords)[0].sum()

    lags = sf.alignment(layer, form_loss, x).lags[""]
    assert len(lags.exact) == 8
    assert lags.agreement[0].cosine == pytest.approx(1)
    assert all(0 < at.cosine < 1 for at in lags.agreement[1:4])


def test_a_custom_cell_is_measured(x):
    layer = sf.Recurrent(nn.GRUCell(3, 5), feedback="calibrated").double()
    found = sf.alignment(layer, outputs, x)
    assert set(found.parameters) == {name for name, _ in layer.named_parameters()}
    assert 0 < found.total.cosine < 1
    assert found.lags[""].agreement[0].cosine == pytest.approx(1)
    assert not layer.diagonal.any()


def test_a_layer_called_twice_shows_its_first_call_and_hooks_of_the_user_see_two_passes(x):
    layer, calls = sf.GRU(3, 3).double(), []
    layer.register_forward_hook(lambda *_: calls.append(1))
    found = sf.alignment(layer, lambda model, x: model(model(x[:5])[0][:2])[0].sum(), x)
    assert len(found.lags[""].exact) == 5
    assert len(calls) == 4
    assert not layer._forward_pre_hooks


def test_the_number_of_lags(x):
    layer = sf.GRU(3, 5, feedback="gate").double()
    assert sf.alignment(layer, outputs, x, lags=0).lags == {}
    torch.manual_seed(7)
    few = sf.alignment(layer, outputs, x, lags=3).lags[""]
    torch.manual_seed(7)
    assert few == sf.alignment(layer, outputs, x[-3:]).lags[""]
    with pytest.raises(ValueError, match=r"^lags must be 0 or more, got -1$"):
        sf.alignment(layer, outputs, x, lags=-1)


# A fitted diagonal, and monitors --------------------------------------------------------------------------------------


def test_a_fitted_layer_is_measured_under_its_diagonal_and_not_by_an_exact_pass(x):
    model = Model("fitted", "fitted+1", dropout=0.0)
    loss(model, x).backward()
    frozen = copy.deepcopy(model)
    frozen.first.feedback = frozen.first.diagonal
    frozen.second.feedback = sf.Feedback(frozen.second.diagonal, 1)
    for layer in (model.first, model.second):
        layer.diagonal_updates.fill_(50)  # the next pass in training would be exact
    torch.manual_seed(7)
    found = sf.alignment(model, loss, x)
    torch.manual_seed(7)
    assert found == sf.alignment(frozen, loss, x)
    assert found.total.cosine < 0.999
    assert [str(layer.feedback) for layer in (model.first, model.second)] == ["fitted", "fitted+1"]


def test_a_monitor_measures_every_so_many_steps_and_gives_numbers_to_log(x):
    model = Model("gate", "dsf", dropout=0.0)
    monitor = sf.Monitor(loss, x, every=3)
    logged = [monitor(model, step) for step in range(7)]
    expected = sf.alignment(model, loss, x, lags=0)
    assert [bool(numbers) for numbers in logged] == [True, False, False] * 2 + [True]
    assert [step for step, _ in monitor.history] == [0, 3, 6]
    assert set(logged[0]) == {
        f"{place}/{what}"
        for place in ("alignment", "alignment/first", "alignment/second")
        for what in ("cosine", "norm_ratio", "sign_agreement")
    }
    assert logged[0]["alignment/cosine"] == expected.total.cosine
    assert logged[6]["alignment/second/norm_ratio"] == expected.layers["second"].norm_ratio
    assert monitor.history[0][1] == expected


def test_a_monitor_measures_nothing_if_every_rule_is_exact_and_raises_on_invalid_arguments(x):
    monitor = sf.Monitor(loss, x, every=1)
    model = Model("torch", "bptt")
    model.idle.feedback = "torch"
    assert monitor(model, 0) == {}
    assert not monitor.history
    with pytest.raises(ValueError, match="alignment needs a model with a statefeed"):
        monitor(nn.Linear(3, 1), 0)
    with pytest.raises(ValueError, match=r"^every must be 1 step or more, got 0$"):
        sf.Monitor(loss, x, every=0)


def test_a_monitor_keeps_credit_by_lag_for_a_figure(x):
    monitor = sf.Monitor(loss, x, every=1, lags=4)
    monitor(Model("gate", "dsf"), 0)
    ((_, measured),) = monitor.history
    assert [len(measured.lags[name].rule) for name in ("first", "second")] == [4, 4]


@pytest.mark.parametrize("lags", [0, 5])
def test_it_costs_one_pass_under_the_rules_one_under_bptt_and_few_rows_for_the_lags(lags):
    """Steps times rows of every layer pass, counted where it runs; a backward belongs to every forward."""
    layer, ran = sf.GRU(3, 5, feedback="gate+1").double(), []
    forward = layer.forward
    layer.forward = lambda x, *rest: (ran.append((str(layer.feedback), x.shape[0] * x.shape[1])), forward(x, *rest))[1]
    sf.alignment(layer, outputs, torch.randn(16, 64, 3, dtype=torch.float64), lags)
    whole, few = 16 * 64, lags * 4
    assert ran == [("gate+1", whole), ("torch", whole), *([("gate+1", few), ("torch", few)] if lags else [])]


def test_the_exact_pass_in_eval_mode_runs_in_training_mode_without_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN has a backward pass only after a forward pass in training mode."""
    layer = sf.GRU(3, 4, 2, dropout=0.5, feedback="dsf").eval()
    modes = []
    path = type(layer)._torch_path
    monkeypatch.setattr(
        type(layer), "_torch_path", lambda self, *a: modes.append((self.training, self.dropout)) or path(self, *a)
    )
    found = sf.alignment(layer, lambda model, x: model(x)[0].sum(), torch.randn(5, 2, 3), lags=0)
    assert modes == [(True, 0.0)]
    assert (layer.training, layer.dropout, str(layer.feedback)) == (False, 0.5, "dsf")
    assert 0 < found.total.cosine < 1


def test_a_model_may_have_collections_that_cannot_be_changed(x):
    class Output(dict):
        """As the outputs of transformers models, and the configurations of diffusers."""

        def update(self, *arguments):
            raise TypeError("an output cannot be updated")

    model = nn.Sequential(sf.GRU(x.shape[-1], 4, feedback="dsf", dtype=x.dtype))
    model.last_output, model.sizes = Output(hidden=x), immutable_list([1, 2])
    sf.alignment(model, lambda model, x: model(x)[0].square().sum(), x)
    assert model.last_output["hidden"] is x
    assert model.sizes == [1, 2]
