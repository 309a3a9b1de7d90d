"""The callbacks for Lightning and the Hugging Face Trainer, on stubs of the two interfaces.

`make interop` runs them in the packages themselves: tests/interop/test_lightning.py and test_transformers.py.
"""

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import statefeed as sf


class Callback:
    """The base class of both packages as far as the callbacks use it."""


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., types.ModuleType]]:
    """Imports a callback's module with these packages in place of the real ones; none else can be imported."""
    loaded = []

    def load(name: str, **packages: type) -> types.ModuleType:
        for package in ("lightning", "lightning.pytorch", "pytorch_lightning", "transformers"):
            monkeypatch.setitem(sys.modules, package, None)
            monkeypatch.setattr(sys, "meta_path", [_Absent(), *sys.meta_path])
            monkeypatch.delitem(sys.modules, package)
        for package, callback in packages.items():
            stub = types.ModuleType(package)
            stub.Callback = stub.TrainerCallback = callback
            monkeypatch.setitem(sys.modules, package, stub)
            if package == "lightning":
                monkeypatch.setitem(sys.modules, "lightning.pytorch", stub)
        loaded.append(f"statefeed.integrations.{name}")
        sys.modules.pop(loaded[-1], None)
        return importlib.import_module(loaded[-1])

    yield load
    for name in loaded:
        sys.modules.pop(name, None)


class _Absent:
    """An import finder for which the packages are not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in ("lightning", "pytorch_lightning", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])


class Model(nn.Module):
    """A LightningModule as far as the callback uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.GRU(2, 3)
        self.decoder = sf.GRU(3, 3, feedback="gate+1")
        self.logged: list[dict[str, float]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x)[0])[0]

    def log_dict(self, numbers: dict[str, float]) -> None:
        self.logged.append(numbers)


def rules(model: Model) -> list[str]:
    return [str(getattr(layer, "feedback", None)) for layer in (model.encoder, model.decoder)]


def monitor(every: int) -> sf.Monitor:
    return sf.Monitor(lambda model, x: model(x).square().sum(), torch.ones(4, 1, 2), every=every)


class LightningTrainer:
    """Calls the hooks in the order of lightning.pytorch.Trainer: epochs of 4 batches, two batches an optimizer step."""

    def __init__(
        self, callback: Any, epochs: int = 2, max_steps: int = -1, length: float = 4, optimizers: int = 1
    ) -> None:
        self.callback, self.global_step, self.current_epoch = callback, 0, 0
        self.max_epochs, self.max_steps, self.num_training_batches = epochs, max_steps, length
        self.optimizers = optimizers  # a step of each counts

    @property
    def estimated_stepping_batches(self) -> float:
        """Steps of one optimizer, as Lightning estimates them: -1 if only epochs of unknown length limit them."""
        if self.max_epochs == -1:
            return float("inf") if self.max_steps == -1 else self.max_steps
        if self.num_training_batches == float("inf"):
            return self.max_steps
        steps = self.num_training_batches // 2 * self.max_epochs
        return steps if self.max_steps == -1 else min(steps, self.max_steps)

    def fit(self, model: Model) -> list[list[str]]:
        self.callback.on_fit_start(self, model)
        seen = []
        for batch in range(8):
            self.current_epoch, self.global_step = batch // 4, batch // 2 * self.optimizers
            self.callback.on_train_batch_start(self, model, None, batch % 4)
            seen.append(rules(model))
        return seen


def hf_train(callback: Any, model: Model, steps: int = 4) -> tuple[list[list[str]], list[dict[str, float]]]:
    """Calls the hooks in the order of transformers.Trainer, with everything by keyword that it passes so."""
    state = types.SimpleNamespace(global_step=0, max_steps=steps, log_history=[])
    seen = []
    everything = {"model": model, "processing_class": None, "optimizer": None, "train_dataloader": None}
    callback.on_train_begin(None, state, None, **everything)
    for step in range(steps):
        state.global_step = step
        callback.on_step_begin(None, state, None, **everything)
        seen.append(rules(model))
    return seen, state.log_history


@pytest.mark.parametrize("packages", [["lightning"], ["pytorch_lightning"], ["lightning", "pytorch_lightning"]])
def test_the_lightning_callback_is_one_of_every_installed_package(load: Any, packages: list[str]) -> None:
    bases = {name: type("Callback", (Callback,), {}) for name in packages}
    callback = load("lightning", **bases).SwapCallback()
    assert all(isinstance(callback, base) for base in bases.values())


def test_lightning_swaps_at_fit_start_and_leaves_a_rule_that_was_set(load: Any) -> None:
    callback, model = load("lightning", lightning=Callback).SwapCallback(), Model()
    assert callback.report is None
    assert LightningTrainer(callback).fit(model) == [["bptt", "gate+1"]] * 8
    assert list(callback.report.swapped) == ["encoder"]
    assert LightningTrainer(callback).fit(model)[-1] == ["bptt", "gate+1"]


def test_lightning_schedule_and_monitor_count_optimizer_steps(load: Any) -> None:
    watch = monitor(every=2)
    callback = load("lightning", lightning=Callback).SwapCallback(schedule="dsf@0.5/jacobian", monitor=watch)
    model = Model()
    assert LightningTrainer(callback).fit(model) == [["dsf", "dsf"]] * 4 + [["jacobian", "jacobian"]] * 4
    assert [step for step, _ in watch.history] == [0, 2]
    assert [bool(numbers) for numbers in model.logged] == [True, False, True, False]


@pytest.mark.parametrize("limits", [{"epochs": -1}, {"length": float("inf")}])
def test_a_schedule_without_a_length_of_training_is_an_error_at_fit_start(load: Any, limits: dict[str, Any]) -> None:
    callback, model = load("lightning", lightning=Callback).SwapCallback(schedule="dsf@0.5/jacobian"), Model()
    with pytest.raises(ValueError, match="set max_steps of the Trainer, or max_epochs if the dataset has a length"):
        LightningTrainer(callback, **limits).fit(model)
    assert rules(model) == ["None", "gate+1"]
    seen = LightningTrainer(callback, max_steps=4, **limits).fit(model)
    assert seen == [["dsf", "dsf"]] * 4 + [["jacobian", "jacobian"]] * 4


@pytest.mark.parametrize("optimizers", [1, 2, 3])
def test_a_schedule_of_epochs_does_not_depend_on_the_number_of_optimizers(load: Any, optimizers: int) -> None:
    callback = load("lightning", lightning=Callback).SwapCallback(schedule="dsf@0.5/jacobian")
    seen = LightningTrainer(callback, optimizers=optimizers).fit(Model())
    assert seen == [["dsf", "dsf"]] * 4 + [["jacobian", "jacobian"]] * 4


def test_a_schedule_stays_at_its_end(load: Any) -> None:
    callback = load("lightning", lightning=Callback).SwapCallback(schedule="dsf@0.5/jacobian")
    seen = LightningTrainer(callback, max_steps=4, optimizers=2).fit(Model())
    assert seen == [["dsf", "dsf"]] * 2 + [["jacobian", "jacobian"]] * 6


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_a_later_rule_that_a_layer_does_not_support_is_an_error_at_the_first_step(load: Any, name: str) -> None:
    callback, model = load(name, **{name: Callback}).SwapCallback(schedule="dsf@0.5/gate"), Model()
    model.encoder = nn.RNN(2, 3)
    with pytest.raises(ValueError, match='"gate" needs a direct path'):
        LightningTrainer(callback).fit(model) if name == "lightning" else hf_train(callback, model)
    assert rules(model) == ["dsf", "dsf"]


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_a_second_training_has_the_same_patterns(load: Any, name: str) -> None:
    callback = load(name, **{name: Callback}).SwapCallback("dsf", exclude=iter(["decoder"]))
    for _ in range(2):
        model = Model()
        seen = LightningTrainer(callback).fit(model) if name == "lightning" else hf_train(callback, model)[0]
        assert seen[-1] == ["dsf", "gate+1"]


def test_transformers_swaps_schedules_and_logs(load: Any) -> None:
    module, model = load("transformers", transformers=Callback), Model()
    callback = module.SwapCallback()
    assert isinstance(callback, Callback)
    seen, history = hf_train(callback, model)
    assert seen == [["bptt", "gate+1"]] * 4
    assert not history
    watch = monitor(every=3)
    seen, history = hf_train(module.SwapCallback(schedule=sf.Schedule("dsf@0.25/jacobian"), monitor=watch), Model())
    assert seen == [["dsf", "dsf"]] + [["jacobian", "jacobian"]] * 3
    assert [row["step"] for row in history] == [0, 3]
    assert all("alignment/cosine" in row for row in history)


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_patterns_and_contradictions(load: Any, name: str) -> None:
    module, model = load(name, **{name: Callback}), Model()
    with pytest.raises(ValueError, match="exclude each other, got 'dsf' and 'dsf/bptt'"):
        module.SwapCallback("dsf", schedule="dsf/bptt")
    with pytest.raises(ValueError, match="did you mean"):
        module.SwapCallback("DSF")
    callback = module.SwapCallback("dsf", exclude="decoder")
    seen = LightningTrainer(callback).fit(model) if name == "lightning" else hf_train(callback, model)[0]
    assert seen[-1] == ["dsf", "gate+1"]


@pytest.mark.parametrize("name", ["lightning", "transformers"])
@pytest.mark.parametrize("patterns", [{"exclude": "decoder"}, {"include": ["enc*"]}])
def test_a_schedule_leaves_excluded_layers_unchanged(load: Any, name: str, patterns: dict[str, Any]) -> None:
    callback, model = load(name, **{name: Callback}).SwapCallback(schedule="dsf@0.5/bptt", **patterns), Model()
    seen = LightningTrainer(callback).fit(model) if name == "lightning" else hf_train(callback, model)[0]
    half = len(seen) // 2
    assert seen == [["dsf", "gate+1"]] * half + [["bptt", "gate+1"]] * half


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_without_its_package_a_callback_raises_with_the_install_command(load: Any, name: str) -> None:
    with pytest.raises(ImportError, match=rf'pip install "statefeed\[{name}\]"'):
        load(name)
