"""The weights of a run with the best validation score."""

import dataclasses
import shlex
from pathlib import Path

from statefeed.lm.errors import CorruptFile, UsageError
from statefeed.lm.model import LanguageModel
from statefeed.lm.run import tensor_file
from statefeed.lm.run.distributed import gather_tensors
from statefeed.lm.run.evaluate import Score
from statefeed.lm.run.files import CHECKPOINTS, WEIGHTS
from statefeed.lm.run.next_steps import program


class BestWeights:
    """Saves the weights with the best validation score so far, which are the result of a run.

    Args:
        folder: the run folder; weights in it are the best so far.
        writes: whether this process writes files.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder, self._writes = folder, writes
        self.step, self.epoch = 0, 0
        self.score: Score | None = None
        if (folder / WEIGHTS).exists():
            try:
                _, metadata = tensor_file.read(folder / WEIGHTS)
            except CorruptFile as error:
                raise CorruptFile(f"{error}; remove it to resume without the best weights so far") from error
            self.step, self.epoch, self.score = metadata["step"], metadata["epoch"], Score(**metadata["score"])

    def offer(self, model: LanguageModel, step: int, epoch: int, score: Score) -> None:
        """Save the weights if they are better than the saved ones; called by all processes."""
        if self.score is None or score.loss < self.score.loss:
            weights = gather_tensors(model.state_dict(), self._writes)
            if self._writes:
                metadata = {"step": step, "epoch": epoch, "score": dataclasses.asdict(score)}
                tensor_file.write(self.folder / WEIGHTS, self.folder / CHECKPOINTS, weights, metadata)
            self.step, self.epoch, self.score = step, epoch, score

    def __str__(self) -> str:
        if self.score is None:
            return "no weights, because it ended before the first validation"
        return f"the weights of step {self.step:,}, the best so far (valid perplexity {self.score.perplexity:.2f})"


def load_weights(model: LanguageModel, folder: Path) -> None:
    """Load the weights of a run into a model.

    Raises:
        UsageError: the run has no weights, or they are corrupt or do not match the model.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise UsageError(
            f"{folder} holds no {WEIGHTS}: its training ended before the first validation, or the file was removed; an "
            f"interrupted run is resumed with `{program()} train --resume {shlex.quote(str(folder))}`"
        )
    tensors, _ = tensor_file.read(path)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UsageError(f"{path} does not match the recipe of the run: {' '.join(str(error).split())}") from error
