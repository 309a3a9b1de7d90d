"""The tables that a user may add to, restored after a test."""

from collections.abc import Iterator
from contextlib import contextmanager

from statefeed.backends import BACKENDS
from statefeed.cells import CELLS
from statefeed.conversions import CONVERSIONS
from statefeed.feedback import DIAGONALS
from statefeed.lm.config import RECURRENT, SECTIONS
from statefeed.lm.model.blocks import BLOCKS, LAYERS
from statefeed.scan import METHODS


@contextmanager
def restored() -> Iterator[None]:
    """After the block the tables have the members, and the order, that they had before it."""
    tables = (CELLS, DIAGONALS, BACKENDS, CONVERSIONS, METHODS, SECTIONS, LAYERS, BLOCKS)
    before, recurrent = [(table, dict(table)) for table in tables], list(RECURRENT)
    try:
        yield
    finally:
        for table, members in before:
            table.clear()
            table.update(members)
        RECURRENT[:] = recurrent


@contextmanager
def only(*backends: str) -> Iterator[None]:
    """Within the block the table of backends has only these, in this order."""
    with restored():
        members = {name: BACKENDS[name] for name in backends}
        BACKENDS.clear()
        BACKENDS.update(members)
        yield
