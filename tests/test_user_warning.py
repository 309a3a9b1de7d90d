"""What a user reads: warnings point at the user's line, and a rule in the wrong place is named."""

import inspect
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import statefeed as sf
from statefeed.cells import CELLS


class Cell(sf.CellLayer):
    cell = CELLS["gru"]


def initial_state() -> None:
    state = torch.zeros(1, 2, 3, requires_grad=True)
    nn.Sequential(sf.GRU(3, 3, feedback="dsf"))[0](torch.ones(4, 2, 3), state)


WARNS: dict[str, Callable[[], object]] = {
    "corrections": lambda: sf.Feedback("dsf+1"),
    "corrections of a layer": lambda: sf.GRU(2, 3, feedback="dsf+1"),
    "a diagonal above 1": lambda: sf.LSTM(2, 3, feedback=1.5),
    "a tensor above 1": lambda: sf.Feedback(torch.tensor([0.5, -1.2])),
    "dropout": lambda: Cell(2, 3, dropout=0.5),
    "swap": lambda: sf.swap(nn.Sequential(nn.Linear(2, 3))),
    "initial state": initial_state,
}


@pytest.mark.parametrize("name", WARNS)
def test_a_warning_points_at_the_line_of_the_user(name: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        WARNS[name]()
    lines, first = inspect.getsourcelines(WARNS[name])
    assert [warning.filename for warning in caught] == [__file__]
    assert first <= caught[0].lineno < first + len(lines)


@pytest.mark.parametrize("diagonal", [1.0, -1.0, 0.9, torch.linspace(0, 1, 7), "dsf", "log_spaced(1e6)"])
def test_a_diagonal_up_to_1_does_not_warn(diagonal: object) -> None:
    sf.Feedback(diagonal)  # pytest turns a warning into an error


def test_a_diagonal_above_1_warns_with_its_size() -> None:
    with pytest.warns(UserWarning, match=r'feedback "1\.5" has a fixed diagonal of up to 1\.5: above 1 the gradient'):
        sf.Feedback(1.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 16, "dsf"), r"GRU\(\.\.\., feedback='dsf'\): got it as the positional argument 3$"),
        ((8, 16, "dfs"), r"feedback='dfs'\): got it as the positional argument 3$"),
        ((8, 16, 2, "gate+1"), r"feedback='gate\+1'\): got it as the positional argument 4$"),
        ((8, 16, sf.Feedback("gate")), r"feedback='gate'\): got it as the positional argument 3$"),
    ],
)
def test_feedback_is_keyword_only(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(TypeError, match=message) as raised:
        sf.GRU(*arguments)
    assert str(raised.value).startswith("feedback must be a keyword argument, GRU(")
    with pytest.raises(TypeError, match=message.replace("GRU", "Cell")):
        Cell(*arguments)


@pytest.mark.parametrize("place", range(2, 9))
def test_no_layer_takes_a_rule_for_another_argument(place: int) -> None:
    arguments = [8, 16, 1, True, False, 0.0, False, None, None]
    for kind in (sf.GRU, Cell):
        with pytest.raises(TypeError, match=f"'jacobian'.: got it as the positional argument {place + 1}$"):
            kind(*arguments[:place], "jacobian")


def test_text_that_torch_takes_is_no_rule() -> None:
    assert sf.RNN(2, 3, 1, "relu").nonlinearity == "relu"
