"""The check of a cell's formulas: it passes every cell of the package, and names each function that is wrong."""

import pytest
import torch

from statefeed.cells import CELLS, check_cell


@pytest.mark.parametrize("name", CELLS)
def test_every_cell_passes(name):
    check_cell(CELLS[name])
    check_cell(CELLS[name], hidden_size=3)


def scaled(part):
    """Parts of the state times 1.01; None stays."""
    return None if part is None else 1.01 * part


# The cell, the function or attribute that is changed, how, and what the message names.
PLANTED = [
    ("gru", "step", lambda right: lambda *a: tuple(map(scaled, right(*a))), "local_gradient at inputs"),
    ("gru", "local_gradient", lambda right: lambda *a: (1.01 * right(*a)[0], right(*a)[1]), "local_gradient at inputs"),
    ("gru", "local_gradient", lambda right: lambda *a: (right(*a)[0], 1.01 * right(*a)[1]), "local_gradient at hidden"),
    ("gru", "direct_path", lambda right: lambda *a: tuple(map(scaled, right(*a))), "direct_path of h"),
    ("lstm", "direct_path", lambda right: lambda *a: tuple(map(scaled, right(*a))), "direct_path of c"),
    ("lstm", "direct_path", lambda right: lambda *a: (None, None), "direct_path of c"),
    ("lstm", "same_step", lambda right: lambda *a: tuple(map(scaled, right(*a))), "local_gradient at inputs"),
    ("slstm", "jacobian_diagonal", lambda right: lambda *a: (*right(*a)[:2], right(*a)[2] + 1e-6), "diagonal of n"),
    ("rnn_tanh", "jacobian_diagonal", lambda right: lambda *a: tuple(map(scaled, right(*a))), "diagonal of h"),
    ("lstm_projected", "jacobian_diagonal", lambda right: lambda *a: tuple(map(scaled, right(*a))), "diagonal of h"),
    ("gru", "shared_gates", lambda right: 3, "shared_gates"),
    ("rnn_relu", "has_direct_path", lambda right: True, "has_direct_path must be False"),
    ("gru", "weight_shapes", lambda right: lambda *a: {**right(*a), "weight_p": (5,)}, "out of .* got weight_p: run"),
    ("gru", "step", lambda right: lambda *a: right(*a)[0], r"step must return a tuple .* \[\(6, 5\)\], got Tensor"),
    ("gru", "direct_path", lambda right: lambda *a: right(*a)[0], "direct_path must return a tuple"),
    ("gru", "jacobian_diagonal", lambda right: lambda *a: (None,), r"jacobian_diagonal must .*, got \[None\]"),
    ("gru", "linearize", lambda right: lambda *a: tuple(right(*a)), "linearize must return saved_type, got tuple"),
]


@pytest.mark.parametrize(("name", "attribute", "change", "message"), PLANTED)
def test_a_wrong_function_is_named(name, attribute, change, message):
    kind = type(CELLS[name])
    wrong = type("Wrong", (kind,), {attribute: change(getattr(kind, attribute))})()
    with pytest.raises(ValueError, match=rf"^cell '{name}': .*{message}"):
        check_cell(wrong)


def test_the_state_of_the_random_numbers_stays():
    before = torch.get_rng_state()
    check_cell(CELLS["gru"])
    assert torch.equal(torch.get_rng_state(), before)
