"""Errors of layers and rules: one sentence that is true, where the user can act on it."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_sequence

import statefeed as sf
from statefeed.cell_layer import CellLayer
from statefeed.cells import CELLS
from statefeed.feedback import DIAGONALS, Stationary, TimeVarying

LAYERS = [lambda: sf.GRU(3, 4), lambda: sf.SLSTM(3, 4), lambda: sf.Recurrent(nn.GRUCell(3, 4))]


@pytest.mark.parametrize("make", LAYERS)
def test_a_parameter_is_a_fixed_diagonal_and_a_module_is_no_rule(make):
    layer = make()
    width = 12 if isinstance(layer, sf.SLSTM) else 4
    layer.feedback = nn.Parameter(torch.full((width,), 0.5))
    assert layer.feedback == sf.Feedback(torch.full((width,), 0.5))
    parameters, modules = len(list(layer.parameters())), len(list(layer.modules()))
    with pytest.raises(TypeError, match=r"^feedback must be .*, got Linear$"):
        layer.feedback = nn.Linear(2, 3)
    with pytest.raises(TypeError, match=r"^forward_method must be .*, got Linear"):
        layer.forward_method = nn.Linear(2, 3)
    assert (len(list(layer.parameters())), len(list(layer.modules()))) == (parameters, modules)


@pytest.fixture
def table(monkeypatch):
    """The table of rules, which a test may change."""
    changed = dict(DIAGONALS)
    monkeypatch.setattr("statefeed.feedback.spelling.DIAGONALS", changed)
    return changed


@dataclass(frozen=True)
class Halves(Stationary):
    value: float

    def __post_init__(self):
        if self.value == 7:
            raise TypeError("seven is not supported")

    def vector(self, size, dtype, device):
        return torch.full((size,), self.value, dtype=dtype, device=device)

    def __str__(self):
        return f"halves({self.value})"


def test_messages_list_the_rules_of_the_table(table):
    table["halves"] = Halves
    table["doubled"] = lambda value=2.0: Halves(value)
    with pytest.raises(ValueError, match=r'"jacobian", "halves\(value\)", "doubled", a number, or'):
        sf.Feedback("unknown rule")
    with pytest.raises(TypeError, match=r'"ramp\(cap\)", .*"halves\(value\)", .*, got list$'):
        sf.Feedback([])


def test_an_error_of_a_rule_is_not_a_missing_number(table):
    table["halves"] = Halves
    with pytest.raises(TypeError, match="seven is not supported"):
        sf.Feedback("halves(7)")
    with pytest.raises(ValueError, match=r'^feedback "halves" needs a number in parentheses, got \'halves\+1\'$'):
        sf.Feedback("halves+1")
    with pytest.raises(ValueError, match=r'^feedback "gate" takes no number, got \'gate\(2\)\'$'):
        sf.Feedback("gate(2)")
    with pytest.raises(ValueError, match="feedback must be"):
        sf.Feedback("Halves(7)")  # the suggestion would raise


def test_gate_names_the_cell_without_a_direct_path():
    class Plain(type(CELLS["rnn_tanh"])):
        name = "plain"

    class Layer(CellLayer):
        cell = Plain()

    with pytest.raises(ValueError, match="and the cell 'plain' has none: use \"jacobian\""):
        Layer(3, 4, feedback="gate")
    with pytest.raises(ValueError, match="and the cell 'rnn_tanh' has none: use"):
        sf.RNN(3, 4, feedback="gate+1")


def test_a_time_varying_rule_raises_where_it_is_set_on_a_recurrent():
    @dataclass(frozen=True)
    class Damped(TimeVarying):
        def rows(self, at):
            return [0.9 * part for part in at.cell.jacobian_diagonal(at.at, at.w_hh)]

        def __str__(self):
            return "damped"

    for rule in (Damped(), "gate", "gate+1"):
        with pytest.raises(ValueError, match=r"needs the formulas of a cell, which statefeed.Recurrent does not have"):
            sf.Recurrent(nn.GRUCell(3, 4), rule)
    sf.Recurrent(nn.GRUCell(3, 4), "jacobian+1")
    sf.GRU(3, 4, feedback=Damped())


@pytest.mark.parametrize("method", ["__call__", "check"])
def test_a_recurrent_takes_no_packed_sequence(method):
    packed = pack_sequence([torch.zeros(3, 3), torch.zeros(2, 3)])
    with pytest.raises(TypeError, match=r"^x must be a tensor of shape \(T, B, I\), .*, got PackedSequence: [^\n]+$"):
        getattr(sf.Recurrent(nn.GRUCell(3, 4)), method)(packed)


@pytest.mark.parametrize(
    "options", [{}, {"resets": torch.zeros(0, 2, dtype=torch.bool)}, {"lengths": torch.ones(2).long()}]
)
def test_a_sequence_without_steps_has_the_message_of_torch(options):
    x = torch.zeros(0, 2, 3)
    with pytest.raises(RuntimeError) as expected:
        nn.GRU(3, 4)(x)
    for layer in (sf.GRU(3, 4), sf.GRU(3, 4, feedback="dsf"), sf.SLSTM(3, 4)):
        with pytest.raises(RuntimeError, match=f"^{expected.value}$"):
            layer(x, **options)


torchs = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own in forward mode


def scan_under(transform):
    x, a = torch.ones(4, 2), torch.tensor([0.5, 0.2])
    if transform == "forward_ad":
        with forward_ad.dual_level():
            return sf.diagonal_scan(x, forward_ad.make_dual(a, a))
    if transform == "jvp":
        return torch.func.jvp(lambda a: sf.diagonal_scan(x, a), (a,), (a,))
    if transform == "vmap":
        return torch.func.vmap(lambda x: sf.diagonal_scan(x, a))(x.expand(3, 4, 2))
    return getattr(torch.func, transform)(lambda a: sf.diagonal_scan(x, a).sum())(a)


@torchs
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "jacrev", "jacfwd", "hessian", "forward_ad"])
def test_transforms_through_a_scan_raise(transform):
    with pytest.raises(RuntimeError, match=r"^statefeed.diagonal_scan supports neither torch.func [^\n]+autograd.grad"):
        scan_under(transform)


@torchs
def test_a_scan_of_other_tensors_runs_in_forward_mode():
    x, a = torch.ones(4, 2), torch.tensor([0.5, 0.2])
    with forward_ad.dual_level():
        forward_ad.make_dual(x, x)
        torch.testing.assert_close(sf.diagonal_scan(x, a), sf.diagonal_scan(x, a, method="sequential"))


def test_what_a_user_adds_is_checked_where_it_is_made():
    class Unnamed(Stationary):
        def vector(self, size, dtype, device):
            return torch.zeros(size)

    class NoCell(CellLayer):
        pass

    class TwoParts(CellLayer):
        cell = CELLS["lstm"]

    with pytest.raises(TypeError, match=r"abstract method '?__str__"):
        Unnamed()
    with pytest.raises(TypeError, match=r"^feedback must be .*, got ABCMeta: give an instance, Halves\(\.\.\.\)$"):
        sf.GRU(3, 4, feedback=Halves)
    with pytest.raises(TypeError, match=r"^NoCell must set the class attribute cell, "):
        NoCell(3, 4)
    with pytest.raises(TypeError, match=r"^hx of TwoParts must be a pair \(h, c\), got one tensor"):
        TwoParts(3, 4)(torch.zeros(2, 1, 3), torch.zeros(1, 1, 4))
    with pytest.raises(ValueError, match=r", 8 here \(h, c joined\), "):
        TwoParts(3, 4, feedback=torch.zeros(4))
