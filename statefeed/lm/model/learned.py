"""The tensors of learned rules in a model: their diagonals and numbers of updates."""

from torch import Tensor, nn

import statefeed as sf


def learned_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that learned rules update in training, by name; writing into them changes the rules.

    Names are those in checkpoints.
    Floating-point tensors are running means, which the processes of a job average; the others are counts, equal in all
    processes.
    """
    return {
        f"{name}.{part}" if name else part: tensor
        for name, layer in model.named_modules()
        if isinstance(layer, sf.FeedbackLayer)
        for part, tensor in layer.learned_tensors().items()
    }
