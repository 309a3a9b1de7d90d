"""The name by which the benchmarks still import statefeed.lm.data.corpora."""

from statefeed.lm.data.corpora import read

__all__ = ["read"]
