"""Which kernels run the recurrent layers in a training step, for the record of a run."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import statefeed as sf
from statefeed.lm.config import Config
from statefeed.lm.data.batches import Batch
from statefeed.lm.model import LanguageModel
from statefeed.lm.run.device import autocast_context
from statefeed.lm.run.distributed import Group, shard_batch


def kernel_paths(model: LanguageModel, config: Config, batch: Batch, group: Group) -> list[dict[str, Any]]:
    """The path of every recurrent layer under every rule of the schedule, as `sf.explain` states it.

    Args:
        model: on its device; its rules are restored.
        config: the recipe.
        batch: the first batch of training, whose first part gives the shape; later batches may have other shapes.
        group: the processes of the job.

    Returns:
        One entry per layer and rule: layer, rule, forward, backward and why. Empty for a model without recurrent
        layers.
    """
    modules = model.named_modules()
    layers: dict[str, Any] = {name: module for name, module in modules if isinstance(module, sf.FeedbackLayer)}
    if not layers:
        return []
    part = group.columns(batch.inputs.shape[1], config.train.accumulate)[0]
    part_batch = shard_batch(batch, part)
    rules, found = sf.Schedule(config.model.feedback), list[dict[str, Any]]()
    starts = (0.0, *(until for until, _ in rules.stages[:-1]))
    with autocast_context(config.train.precision, group.device):
        for start in starts:
            rules.apply(model, start)
            for name, layer in layers.items():
                path = sf.explain(layer, _input(part_batch, layer.input_size, group.device))
                words = {"forward": path.forward, "backward": path.backward, "why": path.why}
                found.append({"layer": name, "rule": path.rule, **words})
    rules.apply(model, 0.0)
    return found


def _input(batch: Batch, width: int, device: torch.device) -> Tensor | PackedSequence:
    """An input of a layer with the shape that it has in a training step; only its shape and device are looked at."""
    x = torch.zeros(*batch.inputs.shape, width, device=device)
    return x if batch.lengths is None else pack_padded_sequence(x, batch.lengths, enforce_sorted=False)
