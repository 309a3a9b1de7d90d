"""The name by which the benchmarks still import statefeed.lm.run.provenance."""

from statefeed.lm.run.provenance import commit, processor
from statefeed.lm.run.provenance import cpuinfo as described

__all__ = ["commit", "described", "processor"]
