"""Learning-rate schedule."""

import math

from statefeed.lm.config import Train


def learning_rate(recipe: Train, step: int, steps: int, epoch: int) -> float:
    """The learning rate of one step.

    Args:
        recipe: peak, warmup and schedule.
        step: step number, from 1.
        steps: number of steps of the whole run.
        epoch: epoch of the step, from 0.

    >>> [round(learning_rate(Train(lr=1.0, warmup=2, schedule="linear"), step, 6, 0), 2) for step in range(1, 7)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    >>> halved = Train(lr=1.0, warmup=0, schedule="steps", decay=0.5, decay_after=2, decay_every=1)
    >>> [learning_rate(halved, 1, 9, epoch) for epoch in range(5)]
    [1.0, 1.0, 0.5, 0.25, 0.125]
    """
    warmup = round(recipe.warmup * steps) if recipe.warmup < 1 else int(recipe.warmup)
    if step <= warmup:
        return recipe.lr * step / warmup
    if recipe.schedule == "constant":
        return recipe.lr
    if recipe.schedule == "steps":
        return float(recipe.lr * recipe.decay ** max(0, (epoch - recipe.decay_after) // recipe.decay_every + 1))
    factor = 1 - (step - 1 - warmup) / (steps - warmup)
    if recipe.schedule == "cosine":
        factor = 0.5 - 0.5 * math.cos(math.pi * factor)
    return recipe.lr * (recipe.floor + (1 - recipe.floor) * factor)
