"""The tables of cells, rules, backends, conversions and recipe sections, restored after a test that adds to them."""

from collections.abc import Iterator
from contextlib import contextmanager

from statefeed.backends import BACKENDS
from statefeed.cells import CELLS
from statefeed.conversions import CONVERSIONS
from statefeed.feedback import DIAGONALS
from statefeed.lm.config import SECTIONS


@contextmanager
def restored() -> Iterator[None]:
    """After the block the tables have the members, and the order, that they had before it."""
    before = [(table, dict(table)) for table in (CELLS, DIAGONALS, BACKENDS, CONVERSIONS, SECTIONS)]
    try:
        yield
    finally:
        for table, members in before:
            table.clear()
            table.update(members)


@contextmanager
def only(*backends: str) -> Iterator[None]:
    """Within the block the table of backends has only these, in this order."""
    with restored():
        members = {name: BACKENDS[name] for name in backends}
        BACKENDS.clear()
        BACKENDS.update(members)
        yield
