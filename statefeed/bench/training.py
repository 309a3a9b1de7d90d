"""Owns ``statefeed bench training``: the trainer end to end, against the published procedure and torch.nn in its loop.

The model is the smallest published one: words of Penn Treebank, a GRU of one layer and 256 units with a path around
it, batches of 128 sentences cut at 65 tokens, Adam. Everyone has the same weights and trains on the same batches, cut
anew in every turn. The rivals are what one writes with torch alone: sentences filled up to the longest, the recurrence
over the filling too, and logits at all positions.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import statefeed as sf
from statefeed.bench.layers import DTYPES, rules_of
from statefeed.bench.measure import (
    NO_ONEDNN,
    SHIPPED,
    ParityError,
    Seconds,
    Setting,
    applied,
    clock,
    float32_settings,
    interleaved,
    spread,
)
from statefeed.bench.options import OptionError, names, option
from statefeed.bench.options import Options as Common
from statefeed.bench.published import published

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from statefeed.lm.batches import Batch, Source
    from statefeed.lm.model import LanguageModel

# Words of a Penn Treebank sentence at every twentieth of all sentences, and how many words and sentences there are.
_LENGTHS = (1, 6, 9, 11, 12, 14, 15, 16, 18, 19, 20, 22, 23, 24, 26, 27, 29, 31, 34, 39, 82)
_WORDS, _SENTENCES = 9_999, 42_068
_BATCH, _CONTEXT, _WIDTH = 128, 64, 256
_RATE, _DECAY = 1e-3, 1e-4
# Allowed parts of the largest value, as for one layer; bfloat16 against float32.
_ALLOWED = {"float32": {"loss": 1e-5, "gradient": 1e-3}, "bfloat16": {"loss": 1e-2, "gradient": 1e-1}}


@dataclass(frozen=True)
class Options(Common):
    """Training end to end: a GRU of 1x256 on Penn Treebank."""

    data: str | None = option(
        None, "folder with the train and valid split of Penn Treebank; null makes up sentences of the same lengths"
    )
    rules: str = option("bptt,fused-bptt,dsf,gate+1", "feedback rules, separated by commas")
    dtypes: str = option("float32,bfloat16", "among float32 and bfloat16 (autocast), separated by commas")
    steps: int = option(3, "training steps of one turn")
    output: str = option(
        "training.jsonl", "the records, one JSON object a line, replaced if there; the figure goes beside"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        names("dtypes", self.dtypes, DTYPES)
        rules_of("gru", self.rules)
        if self.steps < 1:
            raise OptionError(f"steps must be at least 1, got {self.steps}")
        if self.device != "cpu":
            raise OptionError(f"device must be cpu, where the trainer runs, got {self.device}")
        if self.data is not None and not Path(self.data).is_dir():
            raise OptionError(f"data must be a folder with the splits of Penn Treebank, got {self.data!r}")


class Published(nn.Module):
    """The same model out of torch alone.

    Args:
        model: whose weights it takes.
        recurrence: (torch.nn.GRU, inputs) -> outputs and state; of all positions.
    """

    def __init__(self, model: LanguageModel, recurrence: Callable[[nn.GRU, Tensor], tuple[Tensor, Any]]) -> None:
        super().__init__()
        vocabulary, width = model.embedding.weight.shape
        self.embedding, self.gru = nn.Embedding(vocabulary, width), nn.GRU(width, width)
        self.head = nn.Linear(width, vocabulary)
        self.recurrence = recurrence
        self.load_state_dict({_plain(name): weight for name, weight in model.state_dict().items()})

    def forward(self, batch: Batch) -> Tensor:
        """Mean cross-entropy over the targets that count, from logits at all positions."""
        x = self.embedding(batch.inputs)
        logits = self.head(x + self.recurrence(self.gru, x)[0])
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())


def _plain(name: str) -> str:
    return name.replace("blocks.0.rnn.", "gru.")


class Contender:
    """One way to train.

    Args:
        implementation: ``"torch.nn"``, ``"published"`` or ``"statefeed"``.
        variant: torch.nn's setting, or the rule.
        dtype: bfloat16 runs the forward pass under autocast.
        model: with the weights that everyone has.
        loss: (model, batch) -> mean loss.
        setting: of torch while it runs.
    """

    def __init__(
        self,
        implementation: str,
        variant: str,
        dtype: str,
        model: nn.Module,
        loss: Callable[..., Tensor],
        setting: Setting,
    ) -> None:
        self.implementation, self.variant, self.dtype = implementation, variant, dtype
        self.model, self.setting = model, setting
        self._loss = loss
        self._optimizer = torch.optim.Adam(model.parameters(), lr=_RATE, weight_decay=_DECAY, fused=True)
        self._turns = itertools.count()

    @property
    def name(self) -> str:
        return f"{self.implementation} {self.variant} {self.dtype}"

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of a batch."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bfloat16"):
            return self._loss(self.model, batch)

    def gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Loss and the gradient in every parameter, under torch's names of them."""
        loss = self.loss(batch)
        found = torch.autograd.grad(loss, list(self.model.parameters()))
        parameters = [_plain(name) for name, _ in self.model.named_parameters()]
        return {"loss": loss.detach(), **dict(zip(parameters, found, strict=True))}

    def turn(self, source: Source, steps: int) -> Seconds:
        """Seconds of some steps, cutting the batches included; every turn takes those of another epoch."""
        with applied(self.setting):
            start = clock("cpu")
            for batch in itertools.islice(source.epoch(next(self._turns)), steps):
                loss = self.loss(batch)
                self._optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                self._optimizer.step()
                loss.item()
            return (clock("cpu") - start,)


def run(options: Options) -> Iterator[dict[str, Any]]:
    """Measure; one record for every contender and dtype.

    Args:
        options: checked.

    Yields:
        the records, once parity holds for all of them.

    Raises:
        ParityError: before anything is timed.
        OptionError: when ``data`` does not hold the corpus.
    """
    source, vocabulary, corpus = _sentences(options)
    settings = [setting for setting in float32_settings("cpu") if setting != NO_ONEDNN]  # a GRU makes no use of it
    dtypes = names("dtypes", options.dtypes, DTYPES)
    rules = rules_of("gru", options.rules)
    width = 16 if options.smoke else _WIDTH
    entries = contenders(vocabulary, width, rules, dtypes, settings)
    (batch,) = itertools.islice(source.epoch(0), 1)
    check_parity(entries, batch)
    steps = min(options.steps, len(source))
    seconds = interleaved(
        {entry.name: lambda entry=entry: entry.turn(source, steps) for entry in entries},  # type: ignore[misc]
        options.rounds,
    )
    tokens = [
        sum(int((batch.targets >= 0).sum()) for batch in itertools.islice(source.epoch(turn), steps))
        for turn in range(1, options.rounds + 1)  # the first is not measured
    ]
    total = {name: [sum(phases) for phases in turns] for name, turns in seconds.items()}
    for entry in entries:
        mine = total[entry.name]
        baselines = _baselines(entries, total, entry.dtype)
        yield {
            "bench": "training",
            "implementation": entry.implementation,
            "variant": entry.variant,
            "dtype": entry.dtype,
            "kernels": _kernels(entry, batch),
            **corpus,
            "cell": "gru",
            "layers": 1,
            "width": width,
            "batch": len(batch.inputs[0]),
            "context": _CONTEXT,
            "device": "cpu",
            "repeats": options.rounds,
            "steps": steps,
            "tokens": spread(tokens),
            "tokens_per_s": spread([count / s for count, s in zip(tokens, mine, strict=True)]),
            "step_ms": spread([1e3 * s / steps for s in mine]),
            "times_faster_than": {
                label: spread([other / s for other, s in zip(total[name], mine, strict=True)])
                for label, name in baselines.items()
            },
        }


def _baselines(entries: Sequence[Contender], total: dict[str, list[float]], dtype: str) -> dict[str, str]:
    """Who everyone is compared with: the published procedure in float32 and in the dtype, and torch.nn in the dtype."""
    rivals = [e.name for e in entries if e.implementation == "torch.nn" and e.dtype == dtype]
    best = min(rivals, key=lambda name: spread(total[name])["median"])
    found = {"published float32": "published dsf float32", f"published {dtype}": f"published dsf {dtype}"}
    known = {label: name for label, name in found.items() if name in total}
    return {**known, "torch.nn as shipped": rivals[0], "torch.nn at its best": best}


def contenders(
    vocabulary: int, width: int, rules: Sequence[str], dtypes: Sequence[str], settings: Sequence[Setting]
) -> list[Contender]:
    """torch.nn's exact gradient, as shipped first; the published procedure; the trainer under every rule.

    Args:
        vocabulary: V.
        width: of embedding and state.
        rules: of the trainer.
        dtypes: of the forward pass.
        settings: of torch for torch.nn in float32, as shipped first.
    """
    from statefeed.lm import config
    from statefeed.lm.model import LanguageModel

    def model(rule: str) -> LanguageModel:
        torch.manual_seed(0)
        recipe = config.Model(cell="gru", feedback=rule, layers=1, width=width, block="plain")
        return LanguageModel(recipe, vocabulary)

    def plain(recurrence: Callable[[nn.GRU, Tensor], tuple[Tensor, Any]]) -> nn.Module:
        return Published(model("bptt"), recurrence)

    def call(model: nn.Module, batch: Batch) -> Tensor:
        loss: Tensor = model(batch)
        return loss

    def trained(model: LanguageModel, batch: Batch) -> Tensor:
        return model.loss(batch).mean

    result = []
    for dtype in dtypes:
        for setting in settings if dtype == "float32" else [SHIPPED]:
            result.append(Contender("torch.nn", setting.name, dtype, plain(lambda gru, x: gru(x)), call, setting))
        result.append(Contender("published", "dsf", dtype, plain(published), call, SHIPPED))
        result += [Contender("statefeed", rule, dtype, model(rule), trained, SHIPPED) for rule in rules]
    return result


def check_parity(entries: Sequence[Contender], batch: Batch) -> None:
    """Hold every loss against that of torch.nn, and exact gradients and those of dsf against each other, on one batch.

    Args:
        entries: all contenders, torch.nn as shipped in float32 first if there is float32.
        batch: of sentences of many lengths.

    Raises:
        ParityError: the first error above what is allowed.
    """
    from statefeed.lm import config
    from statefeed.lm.model import LanguageModel

    first = entries[0].model
    assert isinstance(first, Published)
    vocabulary, width = first.embedding.weight.shape
    torch.manual_seed(0)
    exact = LanguageModel(config.Model(cell="gru", feedback="bptt", layers=1, width=width, block="plain"), vocabulary)
    ways: dict[str, Callable[[nn.GRU, Tensor], tuple[Tensor, Any]]] = {"bptt": lambda gru, x: gru(x), "dsf": published}
    truth = {
        rule: Contender("truth", rule, "float32", Published(exact, way), lambda m, b: m(b), SHIPPED).gradients(batch)
        for rule, way in ways.items()
    }
    for entry in entries:
        with applied(entry.setting):
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
    """What runs our layer forward and backward, and why; None for the others."""
    layer = next((module for module in entry.model.modules() if isinstance(module, sf.GRU)), None)
    if layer is None:
        return None
    with torch.autocast("cpu", torch.bfloat16, enabled=entry.dtype == "bfloat16"):
        said = sf.explain(layer, torch.zeros(*batch.inputs.shape, layer.input_size))
    return {"forward": said.forward, "backward": said.backward, "why": said.why}


# The sentences -------------------------------------------------------------------------------------------------------


def _sentences(options: Options) -> tuple[Source, int, dict[str, Any]]:
    """The training sentences in batches, the size of their vocabulary, and what the records say of them."""
    from statefeed.lm import batches, config, corpora, tokens

    recipe = config.Train(batch=8 if options.smoke else _BATCH, context=_CONTEXT)
    if options.data is None:
        data = config.Data(tokens="word", batches="sentences")
        text = made_up(200, 50) if options.smoke else made_up(_SENTENCES, _WORDS)
        told = "made-up sentences with the lengths of Penn Treebank and as many words"
    else:
        try:
            data = config.Data(corpus="ptb", path=options.data, tokens="word", batches="sentences")
            text = corpora.read(data).splits["train"]
        except config.UsageError as error:
            raise OptionError(str(error)) from None
        told = "the training split in --data"
    tokenizer = tokens.train(data, {"train": text})
    ids = tokenizer.encode(text)
    return batches.training(ids, data, recipe), tokenizer.size, {"corpus": told, "vocabulary": tokenizer.size}


def made_up(sentences: int, words: int) -> str:
    """Sentences with the lengths of Penn Treebank, of words that follow Zipf's law; each word occurs.

    Args:
        sentences: how many; those that the words need at least once come first.
        words: how many different ones.

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


# What is made of the records -----------------------------------------------------------------------------------------


def table(records: Sequence[dict[str, Any]]) -> Table:
    """One row a record."""
    from rich.table import Table

    result = Table(
        title="training end to end: median of the repetitions (least to largest)",
        caption="x: times faster than (below 1: slower), turn by turn",
    )
    for heading in ("dtype", "what"):
        result.add_column(heading, no_wrap=True)
    for heading in ("tokens/s", "ms a step", "x published float32", "x published", "x nn shipped", "x nn best"):
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
    """One bar a record: tokens per second."""
    from matplotlib.figure import Figure

    result = Figure(figsize=(8, 1 + 0.4 * len(records)), layout="constrained")
    axes = result.add_subplot(xlabel="tokens per second")
    speeds = [r["tokens_per_s"] for r in records]
    reach = [[s["median"] - s["min"] for s in speeds], [s["max"] - s["median"] for s in speeds]]
    colours = ["C0" if r["implementation"] == "statefeed" else "0.6" for r in records]
    axes.barh(range(len(records)), [s["median"] for s in speeds], xerr=reach, color=colours)
    axes.set_yticks(range(len(records)), [f"{r['implementation']} {r['variant']}, {r['dtype']}" for r in records])
    axes.invert_yaxis()
    return result
