"""The contenders of ``statefeed bench training``: the trainer's model, torch.nn in its place, the published procedure.

The baselines are plain torch code: the recurrence over padding too, and logits at all positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statefeed.bench.measure import Seconds, Setting, applied, clock
from statefeed.bench.published import published

if TYPE_CHECKING:
    from statefeed.lm.data.batches import Batch, Source
    from statefeed.lm.model import LanguageModel


class Recipe(NamedTuple):
    """Settings of the published recipe with the same name."""

    layers: int
    width: int
    block: Literal["plain", "prenorm"]
    batches: Literal["sentences", "blocks"]
    context: int
    weight_decay: float
    batch: int = 128
    lr: float = 1e-3


RECIPES = {
    "ptb-gru-1x256": Recipe(1, 256, "plain", "sentences", context=64, weight_decay=1e-4),
    "wikitext103-gru-3x512": Recipe(3, 512, "prenorm", "blocks", context=256, weight_decay=0.0),
}

Recurrence = Callable[[nn.GRU, Tensor], tuple[Tensor, Any]]


class Plain(nn.Module):
    """torch's layer with the call of statefeed's.

    Args:
        layer: the statefeed layer whose weights are copied.
        recurrence: (torch.nn.GRU, inputs) -> outputs at all positions and state.
    """

    def __init__(self, layer: nn.GRU, recurrence: Recurrence) -> None:
        super().__init__()
        self.gru, self.recurrence = nn.GRU(layer.input_size, layer.hidden_size), recurrence
        self.gru.load_state_dict(layer.state_dict())

    def forward(self, x: Tensor, state: None) -> tuple[Tensor, Any]:
        """Outputs at all positions and the final state, from a zero state."""
        return self.recurrence(self.gru, x)


def rival(model: LanguageModel, recurrence: Recurrence) -> LanguageModel:
    """The model with torch's layers instead of statefeed's."""
    for block in model.blocks:
        block.rnn = Plain(block.rnn, recurrence)  # type: ignore[arg-type]
    return model


def everywhere(model: LanguageModel, batch: Batch) -> Tensor:
    """Mean cross-entropy over the valid targets, from logits at all positions."""
    device = model.head.weight.device
    logits, _ = model(batch.inputs.to(device))
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten().to(device))


def counted(model: LanguageModel, batch: Batch) -> Tensor:
    """Mean cross-entropy as the trainer computes it."""
    return model.loss(batch).mean


def layer_name(name: str) -> str:
    """The name of a parameter in statefeed's model, from its name in the baseline."""
    return name.replace(".rnn.gru.", ".rnn.")


class Contender:
    """One way to train.

    Args:
        implementation: ``"torch.nn"``, ``"published"`` or ``"statefeed"``.
        variant: torch.nn's setting, or the rule.
        dtype: bfloat16 runs the forward pass under autocast.
        model: the model, with the common weights.
        loss: (model, batch) -> mean loss.
        setting: torch setting during the run.
        recipe: recipe with the optimizer's values.
    """

    def __init__(
        self,
        implementation: str,
        variant: str,
        dtype: str,
        model: LanguageModel,
        loss: Callable[[LanguageModel, Batch], Tensor],
        setting: Setting,
        recipe: Recipe,
    ) -> None:
        self.implementation, self.variant, self.dtype = implementation, variant, dtype
        self.model, self.setting = model, setting
        self._loss, self._device = loss, model.head.weight.device.type
        rates: dict[str, Any] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
        self._optimizer = torch.optim.Adam(model.parameters(), fused=True, **rates)
        self._epochs = itertools.count()

    @property
    def name(self) -> str:
        return f"{self.implementation} {self.variant} {self.dtype}"

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of a batch."""
        with torch.autocast(self._device, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            return self._loss(self.model, batch)

    def gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Loss and gradient of every parameter, by the parameter names of statefeed's model."""
        with applied(self.setting):
            loss = self.loss(batch)
            found = torch.autograd.grad(loss, list(self.model.parameters()))
        parameters = [layer_name(name) for name, _ in self.model.named_parameters()]
        return {"loss": loss.detach(), **dict(zip(parameters, found, strict=True))}

    def train(self, source: Source, steps: int) -> Seconds:
        """Seconds of some steps, including forming the batches; every call uses another epoch."""
        with applied(self.setting):
            start = clock(self._device)
            for batch in itertools.islice(source.epoch(next(self._epochs)), steps):
                loss = self.loss(batch)
                self._optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                self._optimizer.step()
            return (clock(self._device) - start,)


def contenders(
    recipe: Recipe, vocabulary: int, rules: Sequence[str], tried: Mapping[str, Sequence[Setting]], device: str
) -> list[Contender]:
    """torch.nn's exact gradient, the published procedure, and the trainer under every rule.

    Args:
        recipe: recipe of the model.
        vocabulary: V.
        rules: rules of the trainer.
        tried: settings of torch.nn by dtype; all contenders use the first.
        device: cpu or cuda.
    """

    def model(rule: str) -> LanguageModel:
        return model_of(recipe, vocabulary, rule).to(device)

    def entry(
        implementation: str, variant: str, dtype: str, model: LanguageModel, loss: Any, setting: Setting
    ) -> Contender:
        return Contender(implementation, variant, dtype, model.to(device), loss, setting, recipe)

    result = []
    for dtype, settings in tried.items():
        first = settings[0]
        for setting in settings:
            exact = rival(model("bptt"), lambda gru, x: gru(x))
            result.append(entry("torch.nn", setting.name, dtype, exact, everywhere, setting))
        result.append(entry("published", "dsf", dtype, rival(model("bptt"), published), everywhere, first))
        result += [entry("statefeed", rule, dtype, model(rule), counted, first) for rule in rules]
    return result


def model_of(recipe: Recipe, vocabulary: int, rule: str) -> LanguageModel:
    """The recipe's model, always with the same weights."""
    from statefeed.lm import config
    from statefeed.lm.model import LanguageModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"layers": recipe.layers, "width": recipe.width, "block": recipe.block}
    return LanguageModel(config.Model(cell="gru", feedback=rule, **sizes), vocabulary)
