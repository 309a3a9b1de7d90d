"""The tensors of learned rules in a model: their diagonals and numbers of updates."""

from torch import Tensor, nn

import statefeed as sf


def learned_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that learned rules update in training, by name; writing into them changes the rules.

    Names are those in checkpoints, and in the same order under every rule of a schedule. They contain the rule if a
    layer has stored tensors of several.
    Floating-point tensors are running means, which the processes of a job average; the others are counts, equal in all
    processes.
    """
    found: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        stored = layer.learned_by_rule() if isinstance(layer, sf.FeedbackLayer) else {}
        for rule, tensors in stored.items():
            place = [name] if len(stored) == 1 else [name, rule]
            found |= {".".join(filter(None, [*place, part])): tensor for part, tensor in tensors.items()}
    return found
