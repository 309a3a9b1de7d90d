"""The name by which the benchmarks still import statefeed.lm.data.tokens."""

from statefeed.lm.data.tokens import train

__all__ = ["train"]
