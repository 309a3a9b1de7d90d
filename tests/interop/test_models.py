"""One line in other people's models: reinforcement learning, audio and forecasting packages from PyPI, as they come."""

import copy
import tempfile

import pytest
import torch

import statefeed as sf

# Warnings of those packages and of theirs are not ours to repair.
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]


def test_recurrent_ppo_learns_cartpole_without_velocity():
    """sb3-contrib: both recurrent layers of the policy, which must remember to know how fast the pole falls."""
    gym = pytest.importorskip("gymnasium", reason="run `make interop`")
    sb3_contrib = pytest.importorskip("sb3_contrib", reason="run `make interop`")
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    class WithoutVelocity(gym.ObservationWrapper):
        def __init__(self, env):
            super().__init__(env)
            space = env.observation_space
            self.observation_space = gym.spaces.Box(space.low[[0, 2]], space.high[[0, 2]], dtype=space.dtype)

        def observation(self, observation):
            return observation[[0, 2]]

    torch.set_num_threads(1)
    model = sb3_contrib.RecurrentPPO(
        "MlpLstmPolicy",
        make_vec_env("CartPole-v1", n_envs=8, seed=0, wrapper_class=WithoutVelocity),
        n_steps=128,
        batch_size=256,
        n_epochs=5,
        learning_rate=1e-3,
        gamma=0.98,
        policy_kwargs={"lstm_hidden_size": 32, "net_arch": [32]},
        seed=0,
        device="cpu",
    )
    report = sf.swap(model.policy, feedback="dsf")
    assert set(report.swapped) == {"lstm_actor", "lstm_critic"}

    def reward():
        return evaluate_policy(model, model.get_env(), n_eval_episodes=20)[0]

    untrained = reward()
    for _ in range(8):
        model.learn(8_000, reset_num_timesteps=False)
        trained = reward()
        if trained > 120:
            break
    print(f"reward per episode: untrained {untrained:.0f}, trained {trained:.0f} after {model.num_timesteps} steps")
    assert untrained < 40
    assert trained > 120


def test_demucs_separates_two_tones():
    """demucs, a model of audio source separation: its bidirectional LSTM, in training and restored."""
    demucs = pytest.importorskip("demucs.demucs", reason="run `make interop`")
    torch.manual_seed(0)
    model = demucs.Demucs(["low", "high"], audio_channels=1, channels=8, depth=3, lstm_layers=2, dconv_mode=0)
    plain = copy.deepcopy(model).eval()
    report = sf.swap(model, feedback="dsf")
    assert list(report.swapped) == ["lstm.lstm"]

    t = torch.arange(2048) / 8000

    def tones(B):
        phase = 6.3 * torch.rand(2, B, 1)
        frequency = torch.tensor([200.0, 1500.0])[:, None, None] * (0.9 + 0.2 * torch.rand(2, B, 1))
        sources = torch.sin(6.2832 * frequency * t + phase).transpose(0, 1)[:, :, None]
        return sources.sum(1), sources

    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        mixture, sources = tones(4)
        loss = (model(mixture) - sources).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    print(f"mean squared error: {losses[0]:.3f}, then {losses[-1]:.3f}")
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])

    plain.load_state_dict(model.state_dict())
    mixture, _ = tones(2)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(mixture), plain(mixture))


def test_deepar_forecasts_a_sine():
    """gluonts: DeepAR, whose training loop is Lightning's; swapped between building the network and training it."""
    pytest.importorskip("gluonts.torch", reason="run `make interop`")
    import numpy as np
    import pandas as pd
    from gluonts.dataset.common import ListDataset
    from gluonts.torch import DeepAREstimator

    class Estimator(DeepAREstimator):
        def create_lightning_module(self):
            module = super().create_lightning_module()
            reports.append(sf.swap(module, feedback="dsf"))
            return module

    reports = []
    steps = np.arange(400)
    series = np.sin(2 * np.pi * steps / 24) + 0.05 * np.random.default_rng(0).standard_normal(400) + 2
    start = pd.Period("2024-01-01", freq="h")
    data = ListDataset([{"start": start, "target": series[:-24]}], freq="h")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        estimator = Estimator(
            freq="h",
            prediction_length=24,
            context_length=48,
            hidden_size=24,
            lr=1e-2,
            num_batches_per_epoch=20,
            trainer_kwargs={"max_epochs": 4, "accelerator": "cpu", "logger": False, "default_root_dir": folder},
        )
        (forecast,) = estimator.train(data).predict(data)
    assert [list(report.swapped) for report in reports] == [["model.rnn"]]
    error = float(np.abs(forecast.mean - series[-24:]).mean())
    flat = float(np.abs(series[:-24].mean() - series[-24:]).mean())
    print(f"mean absolute error over a day: {error:.2f}, of the mean {flat:.2f}")
    assert error < 0.5 * flat
