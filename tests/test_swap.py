"""swap and restore on user-defined models: same parameters, same outputs, plain torch.nn afterwards."""

import copy
import functools
import pickle
import warnings
from abc import ABC
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import _VF, nn
from torch.nn.utils import parametrize

import statefeed as sf


class Tagger(nn.Module):
    """Two recurrent layers, one of them used twice, weights of the head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.encoder = nn.GRU(6, 6, num_layers=2, batch_first=True, dropout=0.2)
        self.again = self.encoder
        self.decoder = nn.LSTM(6, 6, batch_first=True)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, _ = self.encoder(self.embed(tokens))
        x, _ = self.again(x)
        x, _ = self.decoder(x)
        return self.head(x)


@pytest.fixture
def model() -> Tagger:
    torch.manual_seed(0)
    return Tagger()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 11, (3, 9), generator=torch.Generator().manual_seed(1))


def test_swap_keeps_parameters_sharing_names_and_outputs(model: Tagger, tokens: torch.Tensor) -> None:
    parameters = list(model.parameters())
    keys = list(model.state_dict())
    model.eval()
    before = model(tokens)
    report = sf.swap(model, feedback="gate+1")
    assert isinstance(model.encoder, sf.GRU)
    assert isinstance(model.decoder, sf.LSTM)
    assert model.again is model.encoder
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert not model.encoder.training
    assert set(report.swapped) == {"encoder", "decoder"}
    assert not report.kept
    torch.testing.assert_close(model(tokens), before)


def test_an_existing_optimizer_works_under_the_new_rule(model: Tagger, tokens: torch.Tensor) -> None:
    model.eval()
    exact = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sf.swap(model, feedback="dsf")
    for m in (model, exact):
        m(tokens).square().sum().backward()
    assert not torch.allclose(model.decoder.weight_hh_l0.grad, exact.decoder.weight_hh_l0.grad, rtol=0.01)
    before = model.decoder.weight_hh_l0.detach().clone()
    optimizer.step()
    torch.testing.assert_close(model.decoder.weight_hh_l0, before - model.decoder.weight_hh_l0.grad)


def test_restore_gives_plain_torch_nn(model: Tagger, tokens: torch.Tensor) -> None:
    plain = copy.deepcopy(model)
    sf.swap(model, feedback="calibrated")
    model(tokens).sum().backward()
    assert model.encoder.diagonal.any()
    model.zero_grad(set_to_none=True)
    assert sf.restore(model) is model
    for ours, torchs in zip(model.modules(), plain.modules(), strict=True):
        assert type(ours) is type(torchs)
        assert set(vars(ours)) == set(vars(torchs))
        assert set(ours._buffers) == set(torchs._buffers)
    assert b"statefeed" not in pickle.dumps(model.encoder)
    torch.manual_seed(2)
    ours = model(tokens)
    torch.manual_seed(2)
    torch.testing.assert_close(ours, plain(tokens))


def test_hooks_still_fire(model: Tagger, tokens: torch.Tensor) -> None:
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    sf.swap(model)
    model(tokens)
    assert len(calls) == 2


def test_include_exclude_and_dry_run(model: Tagger) -> None:
    report = sf.swap(model, include=["enc*"], dry_run=True)
    assert type(model.encoder) is nn.GRU
    assert list(report.swapped) == ["encoder"]
    assert report.kept == {"decoder": "not included"}
    report = sf.swap(model, exclude=["decoder"])
    assert type(model.decoder) is nn.LSTM
    assert report.kept == {"decoder": "excluded"}
    assert str(report).splitlines()[0].startswith("swapped  encoder: GRU(6, 6, num_layers=2")


def test_a_string_is_one_pattern(model: Tagger) -> None:
    assert list(sf.swap(model, include="enc*", dry_run=True).swapped) == ["encoder"]
    assert sf.swap(model, exclude="decoder").kept == {"decoder": "excluded"}
    assert type(model.decoder) is nn.LSTM


def test_a_layer_that_does_not_support_the_rule_is_left_unchanged_with_the_reason() -> None:
    model = nn.ModuleList([nn.RNN(2, 3), nn.LSTM(2, 4, proj_size=2), nn.GRU(2, 3)])
    report = sf.swap(model, feedback="gate")
    assert list(report.swapped) == ["1", "2"]
    assert "the cell 'rnn_tanh' has none" in report.kept["0"]
    assert [type(m) for m in model] == [nn.RNN, sf.LSTM, sf.GRU]


def test_an_invalid_rule_leaves_the_model_unchanged(model: Tagger) -> None:
    with pytest.raises(ValueError, match="feedback must be"):
        sf.swap(model, feedback="dfs")
    assert type(model.encoder) is nn.GRU


def test_swap_sets_the_rule_of_a_statefeed_layer_which_may_be_the_model() -> None:
    layer = sf.GRU(2, 3, feedback="dsf")
    report = sf.swap(layer, feedback="jacobian")
    assert str(layer.feedback) == "jacobian"
    assert "(the model)" in str(report)
    assert type(sf.restore(layer)) is nn.GRU


# Subclasses -----------------------------------------------------------------------------------------------------------


class Inherits(nn.GRU):
    """Adds a method and nothing else, as pytorch-forecasting's layers do."""

    def zeros(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(self.num_layers, x.shape[1], self.hidden_size)


class Wraps(nn.LSTM):
    """Works before and after torch's forward."""

    def __init__(self, *args: Any, scale: float = 2.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = scale

    def forward(self, input: torch.Tensor, hx: Any = None, **kwargs: Any) -> Any:
        y, state = super().forward(self.scale * input, hx, **kwargs)
        return self.scale * y, state


class Mixin(ABC, nn.RNNBase):
    """A base beside torch's own, with a metaclass."""


class Mixed(Mixin, nn.RNN):
    pass


SUBCLASSES = [Inherits, Wraps, Mixed]


def gradients(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))


@pytest.mark.parametrize("kind", SUBCLASSES)
def test_a_swapped_subclass_runs_under_the_rule_and_is_restored(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    layer, x = kind(3, 4, num_layers=2), torch.randn(6, 2, 3)
    plain, exact, before = copy.deepcopy(layer), gradients(layer, x), layer(x)[0]
    report = sf.swap(layer)
    assert list(report.swapped) == [""]
    assert isinstance(layer, kind)
    assert str(layer).startswith(f"{kind.__name__}(3, 4, num_layers=2, feedback='bptt'")
    torch.testing.assert_close(layer(x)[0], before)
    torch.testing.assert_close(gradients(layer, x), exact)
    # That another rule gives other gradients shows that ours runs at all.
    sf.swap(layer, feedback="ft-bptt")
    torch.testing.assert_close(layer(x)[0], before)
    assert not torch.allclose(gradients(layer, x)[1], exact[1], rtol=0.01)
    sf.restore(layer)
    assert type(layer) is kind
    assert set(vars(layer)) == set(vars(plain))
    torch.testing.assert_close(gradients(layer, x), exact)


@pytest.mark.parametrize("kind", SUBCLASSES)
def test_a_swapped_subclass_has_one_type_and_pickles_and_copies_with_its_rule(kind: type[nn.RNNBase]) -> None:
    first, second = kind(3, 4), kind(3, 4)
    sf.swap(nn.ModuleList([first, second]), feedback="jacobian")
    assert type(first) is type(second)
    x = torch.randn(6, 2, 3)
    pickles = [pickle.loads(pickle.dumps(first, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for layer in (copy.copy(first), copy.deepcopy(first), *pickles):
        assert type(layer) is type(first)
        assert str(layer.feedback) == "jacobian"
        torch.testing.assert_close(gradients(layer, x), gradients(first, x))
        assert type(sf.restore(copy.deepcopy(layer))) is kind


def test_a_subclass_that_wraps_forward_does_its_work_once_when_given_lengths() -> None:
    layer = Wraps(3, 4)
    x, lengths = torch.randn(6, 2, 3), torch.tensor([6, 6])
    expected = layer(x)[0]
    sf.swap(layer)
    torch.testing.assert_close(layer(x, lengths=lengths)[0], expected)


class CallsVF(nn.GRU):
    def forward(self, input: torch.Tensor, hx: Any = None) -> Any:
        if hx is not None:
            return super().forward(input, hx)
        state = input.new_zeros(1, input.shape[1], self.hidden_size)
        return torch._VF.gru(input, state, self._flat_weights, True, 1, 0.0, self.training, False, False)


class CallsImportedVF(nn.GRU):
    def run(self, input: torch.Tensor) -> Any:
        state = input.new_zeros(1, input.shape[1], self.hidden_size)
        return _VF.gru(input, state, self._flat_weights, True, 1, 0.0, self.training, False, False)

    def forward(self, input: torch.Tensor, hx: Any = None) -> Any:
        return self.run(input) if hx is None else super().forward(input, hx)


class CallsByName(nn.GRU):
    def forward(self, input: torch.Tensor, hx: Any = None) -> Any:
        return (lambda: nn.GRU.forward(self, input, hx))()


class OwnLoop(nn.GRU):
    def forward(self, input: torch.Tensor, hx: Any = None) -> Any:
        return torch.tanh(input @ self.weight_ih_l0.T), None


class OwnAttribute(nn.GRU):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.feedback = "a tensor that this class feeds back"


class OwnReduce(nn.GRU):
    def __reduce__(self) -> tuple[Any, ...]:
        return OwnReduce, (self.input_size, self.hidden_size)


class OwnCopy(nn.GRU):
    def __deepcopy__(self, memo: dict[int, Any]) -> nn.GRU:
        return type(self)(self.input_size, self.hidden_size)


class Names:
    """A base after torch's, which statefeed's class would be before."""

    feedback = "an attribute of a base after torch's"


class AttributeOfALaterBase(nn.GRU, Names):
    pass


class NotOfACell(nn.RNNBase):
    pass


class Counts(type):
    """A metaclass that allows each name once."""

    names: ClassVar[set[str]] = set()

    def __new__(cls, name: str, *arguments: Any) -> Any:
        if name in cls.names:
            raise LookupError(f"{name} exists already")
        cls.names.add(name)
        return super().__new__(cls, name, *arguments)


class OfAMetaclass(nn.GRU, metaclass=Counts):
    pass


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: CallsVF(3, 4), "CallsVF.forward calls torch._VF.gru by name"),
        (lambda: CallsImportedVF(3, 4), "CallsImportedVF.run calls _VF.gru by name"),
        (lambda: CallsByName(3, 4), "CallsByName.forward calls nn.GRU.forward by name"),
        (lambda: OwnLoop(3, 4), "OwnLoop overrides forward"),
        (lambda: OwnAttribute(3, 4), "OwnAttribute defines an attribute 'feedback'"),
        (lambda: AttributeOfALaterBase(3, 4), "AttributeOfALaterBase defines an attribute 'feedback'"),
        (lambda: OwnReduce(3, 4), "OwnReduce defines __reduce__"),
        (lambda: OwnCopy(3, 4), "OwnCopy defines __deepcopy__"),
        (lambda: OfAMetaclass(3, 4), "OfAMetaclass cannot be joined with statefeed's class: OfAMetaclass exists"),
        (lambda: NotOfACell("GRU", 3, 4), "NotOfACell is a subclass of torch.nn.RNNBase"),
    ],
    ids=[
        "torch._VF",
        "_VF",
        "GRU.forward",
        "loop",
        "attribute",
        "later base",
        "reduce",
        "copy",
        "metaclass",
        "RNNBase",
    ],
)
def test_a_subclass_that_bypasses_the_layer_is_left_unchanged(make: Callable[[], nn.RNNBase], reason: str) -> None:
    model = nn.ModuleList([make(), nn.GRU(3, 4)])
    kind = type(model[0])
    report = sf.swap(model)
    assert reason in report.kept["0"]
    assert type(model[0]) is kind
    assert list(report.swapped) == ["1"]


class Frozen(nn.GRU):
    """Allows no attribute to be set or deleted after its construction."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.frozen = True

    def __setattr__(self, name: str, value: Any) -> None:
        if "frozen" in vars(self) and vars(self)["frozen"]:
            raise AttributeError(f"{name} is frozen")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if vars(self)["frozen"]:
            raise AttributeError(f"{name} is frozen")
        super().__delattr__(name)


def test_swap_and_restore_change_all_layers_or_none() -> None:
    model = nn.ModuleList([nn.GRU(3, 4), sf.GRU(4, 4, feedback="calibrated"), Frozen(4, 4)])

    def state() -> list[Any]:
        return [[type(m), sorted(vars(m)), len(m._forward_pre_hooks), str(getattr(m, "feedback", None))] for m in model]

    before = state()
    with pytest.raises(RuntimeError, match="swap left the model unchanged, because the layer 2 raised AttributeError"):
        sf.swap(model, "fitted")
    assert state() == before
    assert list(model[1].learned_by_rule()) == ["calibrated"]
    vars(model[2])["frozen"] = False
    sf.swap(model, "fitted")
    vars(model[2])["frozen"] = True
    before = state()
    with pytest.raises(RuntimeError, match="restore left the model unchanged, because the layer 2 raised AttributeE"):
        sf.restore(model)
    assert state() == before
    x = torch.randn(6, 2, 4)
    model[2](x)[0].sum().backward()
    vars(model[2])["frozen"] = False
    assert [type(m) for m in sf.restore(model)] == [nn.GRU, nn.GRU, Frozen]


def test_a_registry_of_subclasses_has_the_class_of_the_user() -> None:
    registry: list[type] = []

    class Registered:
        def __init_subclass__(cls, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            registry.append(cls)

    class Layer(Registered, nn.GRU):
        pass

    layer = Layer(3, 4)
    sf.swap(layer, dry_run=True)
    sf.swap(layer)
    assert isinstance(layer, sf.GRU)
    assert registry == [Layer]


class Lazy(nn.modules.lazy.LazyModuleMixin, nn.GRU):
    """Finds its input size, and becomes a plain GRU, in its first call."""

    cls_to_become = nn.GRU

    def __init__(self, hidden_size: int) -> None:
        super().__init__(1, hidden_size)
        self.weight_ih_l0 = nn.UninitializedParameter()

    def initialize_parameters(self, x: torch.Tensor) -> None:
        self.input_size = x.shape[-1]
        self.weight_ih_l0.materialize((3 * self.hidden_size, self.input_size))
        nn.init.normal_(self.weight_ih_l0)


def test_an_uninitialized_layer_is_swapped_after_its_first_call() -> None:
    model, x = nn.ModuleList([Lazy(4), nn.GRU(3, 4)]), torch.randn(6, 2, 3)
    assert "after the first call" in sf.swap(model, "dsf").kept["0"]
    model[0](x)
    assert list(sf.swap(model, "dsf").swapped) == ["0", "1"]
    model[0](x)[0].sum().backward()
    assert type(model[0]) is sf.GRU


@pytest.mark.parametrize("names", [None, [0], nn.GRU, [nn.GRU]])
@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_is_no_string_is_an_error(option: str, names: Any) -> None:
    with pytest.raises(TypeError, match=f"{option} must be a shell pattern of layer names, or several, got"):
        sf.swap(nn.GRU(3, 4), **{option: names})


# Layers that others have changed --------------------------------------------------------------------------------------


def hooked(layer: nn.Module) -> None:
    """Replace forward on the object, as accelerate.hooks.add_hook_to_module does."""
    forward = layer.forward
    layer.forward = functools.update_wrapper(functools.partial(lambda self, *a, **k: forward(*a, **k), layer), forward)


def parametrized(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight_hh_l0", nn.Identity())


def sharded(layer: nn.Module) -> None:
    """What fully_shard does to the class; to the weights it needs a process group."""
    from torch.distributed.fsdp import FSDPModule

    layer.__class__ = type(f"FSDP{type(layer).__name__}", (FSDPModule, type(layer)), {})


CHANGES = {hooked: "replaced on the object", parametrized: "before you parametrize", sharded: "before you parametrize"}


@pytest.mark.parametrize(("change", "reason"), CHANGES.items(), ids=[c.__name__ for c in CHANGES])
def test_swap_and_restore_leave_a_modified_layer_unchanged(change: Callable[[nn.Module], None], reason: str) -> None:
    model = nn.Sequential(nn.GRU(3, 4))
    change(model[0])
    kind = type(model[0])
    with pytest.warns(UserWarning, match="swap changed nothing"):
        report = sf.swap(model)
    assert reason in report.kept["0"]
    assert type(model[0]) is kind
    model = nn.Sequential(sf.GRU(3, 4, feedback="dsf"), sf.GRU(3, 4))
    change(model[0])
    kind = type(model[0])
    with pytest.warns(UserWarning, match="restore left 0: .*restore before"):
        assert sf.restore(model) is model
    assert [type(m) for m in model] == [kind, nn.GRU]
    assert str(model[0].feedback) == "dsf"


def test_a_class_forward_that_a_removed_hook_left_on_the_object_is_ignored() -> None:
    layer, x = nn.GRU(3, 4), torch.randn(6, 2, 3)
    exact = gradients(layer, x)
    layer.forward = layer.forward
    sf.swap(layer, feedback="ft-bptt")
    assert not torch.allclose(gradients(layer, x)[1], exact[1], rtol=0.01)
    layer.forward = layer.forward
    sf.restore(layer)
    torch.testing.assert_close(gradients(layer, x), exact)


def test_restore_names_a_layer_that_torch_lacks() -> None:
    model = nn.ModuleDict({"own": sf.Recurrent(nn.RNNCell(2, 3)), "layer": sf.GRU(2, 3)})
    with pytest.warns(UserWarning, match="restore left own: "):
        sf.restore(model)
    assert isinstance(model["own"], sf.Recurrent)
    assert type(model["layer"]) is nn.GRU


# The report -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_no_layer_is_an_error_and_changes_nothing(model: Tagger, option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}='deocder' must match.*'encoder', 'decoder'"):
        sf.swap(model, **{option: ["encoder", "deocder"]})
    assert type(model.encoder) is nn.GRU


def test_a_model_without_a_layer_warns_and_a_second_swap_does_not() -> None:
    with pytest.warns(UserWarning, match="no torch.nn.RNN, GRU or LSTM"):
        sf.swap(nn.Linear(2, 3))
    model = nn.Sequential(nn.GRU(2, 3))
    sf.swap(model)
    report = sf.swap(model)
    assert "already" in report.kept["0"]
    assert not sf.swap(nn.Linear(2, 3), dry_run=True).swapped


def test_the_report_names_cells_and_recurrent_code_of_packages() -> None:
    class Scan(nn.Module):
        """As torchrl's LSTMModule with a backend of its own."""

        def __init__(self, backend: str) -> None:
            super().__init__()
            self.lstm, self.recurrent_backend = nn.LSTM(2, 3), backend

    class Loss(nn.Module):
        """As a loss that does not register its network."""

        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.__dict__["network"] = network
            self.networks = [nn.Linear(2, 3), network]

    model = nn.ModuleDict(
        {"cell": nn.LSTMCell(2, 3), "scan": Scan("scan"), "pad": Scan("pad"), "loss": Loss(nn.Sequential(nn.GRU(2, 3)))}
    )
    report = sf.swap(model)
    assert set(report.outside) == {"cell", "scan", "loss.network", "loss.networks"}
    assert report.outside["cell"] == "LSTMCell is called in a loop: use statefeed.LSTM over the whole sequence"
    gru = sf.swap(nn.ModuleList([nn.GRUCell(2, 3), nn.GRU(2, 3)])).outside["0"]
    assert gru.endswith("use statefeed.GRU over the whole sequence, or statefeed.Recurrent")
    assert "recurrent_backend" in report.outside["scan"]
    assert "outside  loss.network: Sequential is not among the model's modules" in str(report)
    # What the model registers as well is no news.
    shared = nn.Sequential(nn.GRU(2, 3))
    assert not sf.swap(nn.ModuleList([shared, Loss(shared)])).outside


def test_the_report_has_which_layers_ran(model: Tagger, tokens: torch.Tensor) -> None:
    model.unused = nn.GRU(2, 3)
    report = sf.swap(model)
    assert report.ran() == {"encoder": False, "decoder": False, "unused": False}
    # A package that trains a copy, or pickles the model before its first step.
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    copied(tokens)
    assert not any(report.ran().values())
    copy.deepcopy(model)(tokens)
    assert report.ran() == {"encoder": True, "decoder": True, "unused": False}
    model(tokens)
    sf.restore(model)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_second_report_has_the_layers_that_were_swapped_before(model: Tagger, tokens: torch.Tensor) -> None:
    first = sf.swap(model)
    second = sf.swap(model)
    assert not second.swapped
    assert second.ran() == first.ran() == {"encoder": False, "decoder": False}
    model(tokens)
    assert second.ran() == first.ran() == {"encoder": True, "decoder": True}


def test_swap_warns_where_torchs_layers_remain_beside_ours() -> None:
    model = nn.Sequential(sf.GRU(2, 3), nn.LSTM(3, 3))
    with pytest.warns(UserWarning, match="swap changed nothing"):
        sf.swap(model, exclude="1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sf.swap(model)
        sf.swap(model)


def test_an_excluded_statefeed_layer_is_unchanged() -> None:
    model = nn.Sequential(sf.GRU(2, 3), nn.LSTM(3, 3))
    report = sf.swap(model, exclude="0")
    assert report.ran() == {"1": False}
    assert not model[0]._forward_pre_hooks
    assert model[1]._forward_pre_hooks


def test_the_report_names_the_layer_for_a_subclass_of_a_cell_and_scripted_layers() -> None:
    class Cell(nn.GRUCell):
        pass

    report = sf.swap(nn.ModuleDict({"cell": Cell(2, 3), "gru": nn.GRU(2, 3)}))
    assert "statefeed.GRU over" in report.outside["cell"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.GRU(2, 3))
    report = sf.swap(nn.ModuleDict({"scripted": scripted, "gru": nn.GRU(2, 3)}))
    assert report.outside == {"scripted": "GRU is scripted: swap the model that was scripted, and use that one"}


def test_whether_a_layer_ran_costs_one_call(model: Tagger, tokens: torch.Tensor) -> None:
    sf.swap(model)
    model(tokens)
    assert not model.encoder._forward_pre_hooks


def test_swap_sets_the_rule_of_every_statefeed_layer() -> None:
    model = nn.ModuleList([nn.GRU(2, 3), sf.Recurrent(nn.RNNCell(2, 3)), sf.LSTM(2, 3, feedback="dsf")])
    assert list(sf.swap(model).swapped) == ["0"]
    report = sf.swap(model, feedback="jacobian")
    assert [str(m.feedback) for m in model] == ["jacobian"] * 3
    assert len(report.swapped) == 3
