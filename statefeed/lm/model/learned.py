"""The state that learned rules keep in the layers of a model: their diagonals and the number of their updates."""

from torch import Tensor, nn

import statefeed as sf


def learned_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that learned rules update while training, by name; writing into them changes the rules.

    This is the only place of the application that knows where layers keep them. The names are those in checkpoints.
    Floating-point tensors are running means, which the processes of a job average; the others are counts, equal in all
    processes.
    """
    return {
        f"{name}.{part}" if name else part: tensor
        for name, layer in model.named_modules()
        if isinstance(layer, sf.FeedbackLayer)
        for part, tensor in layer.learned_tensors().items()
    }
