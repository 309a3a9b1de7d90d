"""``statefeed bench training``: the trainer end to end, against the published procedure and torch.nn in the same loop.

The models are two of the published ones: a GRU of 1x256 with a skip connection on sentences of Penn Treebank words, and
pre-norm blocks with GRUs of 3x512 on blocks of WikiText-103 byte pairs, with synthetic tokens. All contenders have the
same weights and train on the same batches, which are formed again in every repetition. The baselines are plain torch
code: sentences padded to the longest, the recurrence over padding too, and logits at all positions.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import statefeed as sf
from statefeed.bench.measure import (
    NO_ONEDNN,
    ParityError,
    Seconds,
    Setting,
    applied,
    clock,
    float32_settings,
    interleaved,
    machine_line,
    spread,
    usual,
)
from statefeed.bench.options import TRAINING_DTYPES, OptionError, names, rules_of
from statefeed.bench.options import TrainingOptions as Options
from statefeed.bench.published import published

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from rich.table import Table

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

# Quantiles (steps of 1/20) of the sentence length in Penn Treebank, and its numbers of words and sentences.
_LENGTHS = (1, 6, 9, 11, 12, 14, 15, 16, 18, 19, 20, 22, 23, 24, 26, 27, 29, 31, 34, 39, 82)
WORDS, SENTENCES = 9_999, 42_068
BYTE_PAIRS, _STEPS_OF_BLOCKS = 16_000, 16
# Allowed errors relative to the largest value, as for one layer; lower precision is compared with float32.
_ALLOWED = {
    "float32": {"loss": 1e-5, "gradient": 1e-3},
    "tf32": {"loss": 1e-3, "gradient": 3e-2},
    "bfloat16": {"loss": 1e-2, "gradient": 1e-1},
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


def run(options: Options) -> Iterator[dict[str, Any]]:
    """Measure every contender in every dtype.

    Args:
        options: checked options.

    Yields:
        One record per contender and dtype, after the parity check of all of them.

    Raises:
        ParityError: a contender is wrong; nothing was timed.
        OptionError: ``data`` does not contain the corpus.
    """
    recipe = RECIPES[options.recipe]
    if options.smoke:
        recipe = recipe._replace(width=16, batch=8)
    source, vocabulary, corpus = load_text(options, recipe)
    tried = {}
    for dtype in names("dtypes", options.dtypes, TRAINING_DTYPES[options.device]):
        own = [usual(options.device, dtype)]
        if dtype == "float32":  # a GRU does not use oneDNN
            own = [setting for setting in float32_settings(options.device) if setting != NO_ONEDNN]
        tried[dtype] = own
    entries = contenders(recipe, vocabulary, rules_of("gru", options.rules), tried, options.device)
    (batch,) = itertools.islice(source.epoch(0), 1)
    check_parity(recipe, entries, batch)
    steps = min(options.steps, len(source))
    seconds = interleaved(
        {entry.name: lambda entry=entry: entry.train(source, steps) for entry in entries},  # type: ignore[misc]
        options.rounds,
    )
    tokens = [
        sum(int((batch.targets >= 0).sum()) for batch in itertools.islice(source.epoch(epoch), steps))
        for epoch in range(1, options.rounds + 1)  # epoch 0 is the warm-up
    ]
    total = {name: [sum(phases) for phases in repetitions] for name, repetitions in seconds.items()}
    for entry in entries:
        times = total[entry.name]
        baselines = _baselines(entries, total, entry.dtype)
        yield {
            "bench": "training",
            "recipe": options.recipe,
            "implementation": entry.implementation,
            "variant": entry.variant,
            "dtype": entry.dtype,
            "kernels": _kernels(entry, batch),
            **corpus,
            "cell": "gru",
            "layers": recipe.layers,
            "width": recipe.width,
            "batch": len(batch.inputs[0]),
            "context": recipe.context,
            "device": options.device,
            "repeats": options.rounds,
            "steps": steps,
            "tokens": spread(tokens),
            "tokens_per_s": spread([count / s for count, s in zip(tokens, times, strict=True)]),
            "step_ms": spread([1e3 * s / steps for s in times]),
            "times_faster_than": {
                label: spread([other / s for other, s in zip(total[name], times, strict=True)])
                for label, name in baselines.items()
            },
        }


def _baselines(entries: Sequence[Contender], total: dict[str, list[float]], dtype: str) -> dict[str, str]:
    """The baselines: the published procedure in float32 and in the dtype, and torch.nn in the dtype."""
    rivals = [e.name for e in entries if e.implementation == "torch.nn" and e.dtype == dtype]
    best = min(rivals, key=lambda name: spread(total[name])["median"])
    found = {"published float32": "published dsf float32", f"published {dtype}": f"published dsf {dtype}"}
    known = {label: name for label, name in found.items() if name in total}
    return {**known, "torch.nn as shipped": rivals[0], "torch.nn at its best": best}


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
        return _model(recipe, vocabulary, rule).to(device)

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


def _model(recipe: Recipe, vocabulary: int, rule: str) -> LanguageModel:
    """The recipe's model, always with the same weights."""
    from statefeed.lm import config
    from statefeed.lm.model import LanguageModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"layers": recipe.layers, "width": recipe.width, "block": recipe.block}
    return LanguageModel(config.Model(cell="gru", feedback=rule, **sizes), vocabulary)


def check_parity(recipe: Recipe, entries: Sequence[Contender], batch: Batch) -> None:
    """Compare losses with torch.nn, and the gradients of exact rules and of dsf with a reference, on one batch.

    Args:
        recipe: recipe of the model.
        entries: all contenders.
        batch: a batch of the training text.

    Raises:
        ParityError: an error is above the allowed one.
    """
    weight = entries[0].model.embedding.weight
    device, vocabulary = weight.device.type, len(weight)
    ways: dict[str, Recurrence] = {"bptt": lambda gru, x: gru(x), "dsf": published}
    truth = {}
    for rule, way in ways.items():
        model = rival(_model(recipe, vocabulary, "bptt"), way).to(device)
        setting = usual(device, "float32")
        truth[rule] = Contender("truth", rule, "float32", model, everywhere, setting, recipe).gradients(batch)
    for entry in entries:
        found = entry.gradients(batch)
        rule = "bptt" if entry.implementation == "torch.nn" or sf.Feedback(entry.variant).exact else entry.variant
        for name, value in truth.get(rule, {"loss": truth["bptt"]["loss"]}).items():
            error = float((found[name] - value).abs().max() / value.abs().max())
            what = "loss" if name == "loss" else "gradient"
            if not error <= (allowed := _ALLOWED[entry.dtype][what]):
                raise ParityError(
                    f"the {what} {name} of {entry.name} must agree with torch's within {allowed:.0e} of its largest "
                    f"value, got {error:.1e}; nothing was timed"
                )


def _kernels(entry: Contender, batch: Batch) -> dict[str, str] | None:
    """The kernels of a statefeed layer and the reason for them; None for other layers."""
    layer = next((module for module in entry.model.modules() if isinstance(module, sf.GRU)), None)
    if layer is None:
        return None
    device = entry.model.head.weight.device
    with torch.autocast(device.type, torch.bfloat16, enabled=entry.dtype == "bfloat16"):
        explanation = sf.explain(layer, torch.zeros(*batch.inputs.shape, layer.input_size, device=device))
    return {"forward": explanation.forward, "backward": explanation.backward, "why": explanation.why}


# The text ------------------------------------------------------------------------------------------------------------


def load_text(options: Options, recipe: Recipe) -> tuple[Source, int, dict[str, Any]]:
    """The training text in batches, the size of its vocabulary, and the description for the records."""
    from statefeed.lm import config
    from statefeed.lm.data import batches, corpora, tokens
    from statefeed.lm.errors import UsageError

    train = config.Train(batch=recipe.batch, context=recipe.context)
    if recipe.batches == "blocks":
        types = 257 if options.smoke else BYTE_PAIRS
        ids = _byte_pairs(types, _STEPS_OF_BLOCKS * recipe.batch * recipe.context)
        corpus = "made-up byte pairs"
        return (
            batches.training(ids, config.Data(batches="blocks"), train),
            types,
            {"corpus": corpus, "vocabulary": types},
        )
    if options.data is None:
        data = config.Data(tokens="word", batches="sentences")
        text = made_up(200, 50) if options.smoke else made_up(SENTENCES, WORDS)
        corpus = "made-up sentences with the lengths of Penn Treebank and as many words"
    else:
        try:
            data = config.Data(corpus="ptb", path=options.data, tokens="word", batches="sentences")
            text = corpora.read(data).splits["train"]
        except UsageError as error:
            raise OptionError(str(error)) from None
        corpus = "the training split in --data"
    tokenizer = tokens.train(data, {"train": text})
    ids = tokenizer.encode(text)
    return batches.training(ids, data, train), tokenizer.size, {"corpus": corpus, "vocabulary": tokenizer.size}


def _byte_pairs(types: int, count: int) -> NDArray[np.int32]:
    """Random ids that follow Zipf's law."""
    import numpy as np

    weights = 1 / (np.arange(types) + 2.7)
    return np.random.default_rng(0).choice(types, count, p=weights / weights.sum()).astype(np.int32)


def made_up(sentences: int, words: int) -> str:
    """Synthetic sentences with the lengths of Penn Treebank and words that follow Zipf's law; each word occurs.

    Args:
        sentences: number of sentences.
        words: number of different words; each occurs once at the beginning of the text.

    Example:
        >>> len(made_up(5, 3).splitlines())
        5
    """
    generator = random.Random(0)
    steps = len(_LENGTHS) - 1
    lengths = []
    for _ in range(sentences):
        place = generator.random() * steps
        low, high = _LENGTHS[int(place)], _LENGTHS[int(place) + 1]
        lengths.append(round(low + (place - int(place)) * (high - low)))
    weights = list(itertools.accumulate(1 / (rank + 2.7) for rank in range(words)))
    drawn = generator.choices(range(words), cum_weights=weights, k=max(0, sum(lengths) - words))
    order = itertools.chain(range(words), drawn)
    return "".join(" ".join(f"w{k}" for k in itertools.islice(order, length)) + "\n" for length in lengths)


# Tables and figures --------------------------------------------------------------------------------------------------


def table(records: Sequence[dict[str, Any]]) -> Table:
    """One row per record."""
    from rich.table import Table

    result = Table(
        title="training end to end: median of the repetitions (min-max)",
        caption="x: times faster than (below 1: slower), per repetition",
    )
    for heading in ("dtype", "what"):
        result.add_column(heading, no_wrap=True)
    for heading in ("tokens/s", "ms per step", "x published float32", "x published", "x nn shipped", "x nn best"):
        result.add_column(heading, justify="right", no_wrap=True)
    for r in records:
        speed, ratios = r["tokens_per_s"], r["times_faster_than"]
        labels = ("published float32", f"published {r['dtype']}", "torch.nn as shipped", "torch.nn at its best")
        result.add_row(
            r["dtype"],
            f"{r['implementation']} {r['variant']}",
            f"{speed['median']:,.0f} ({speed['min']:,.0f} to {speed['max']:,.0f})",
            f"{r['step_ms']['median']:.0f}",
            *(f"{ratios[label]['median']:.2f}" if label in ratios else "-" for label in labels),
        )
    return result


def figure(records: Sequence[dict[str, Any]]) -> Figure:
    """Tokens per second, one bar per record."""
    from matplotlib.figure import Figure

    result = Figure(figsize=(8, 1 + 0.4 * len(records)), layout="constrained")
    axes = result.add_subplot(xlabel="tokens per second")
    speeds = [r["tokens_per_s"] for r in records]
    reach = [[s["median"] - s["min"] for s in speeds], [s["max"] - s["median"] for s in speeds]]
    colors = ["C0" if r["implementation"] == "statefeed" else "0.6" for r in records]
    axes.barh(range(len(records)), [s["median"] for s in speeds], xerr=reach, color=colors)
    axes.set_yticks(range(len(records)), [f"{r['implementation']} {r['variant']}, {r['dtype']}" for r in records])
    axes.invert_yaxis()
    axes.set_title(f"{machine_line(records)}\nmedians of the repetitions; error bars: minimum to maximum", fontsize=9)
    return result
