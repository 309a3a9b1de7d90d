"""The name by which the benchmarks still import statefeed.lm.data.batches."""

from statefeed.lm.data.batches import Batch, Source, training

__all__ = ["Batch", "Source", "training"]
