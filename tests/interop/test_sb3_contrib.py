"""sb3-contrib: a recurrent policy of PPO."""

import pytest
import torch

import statefeed as sf

# Warnings of the package are not ours to repair.
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


def test_exact_gradients_give_the_same_losses(compare, tmp_path):
    pytest.importorskip("gymnasium", reason="run `make interop`")
    sb3_contrib = pytest.importorskip("sb3_contrib", reason="run `make interop`")

    def fit(swapped):
        options = {"n_steps": 64, "batch_size": 64, "n_epochs": 2, "policy_kwargs": {"lstm_hidden_size": 32}}
        model = sb3_contrib.RecurrentPPO("MlpLstmPolicy", "CartPole-v1", seed=0, device="cpu", **options)
        if swapped:
            sf.swap(model.policy)
        losses = []
        for _ in range(2):
            model.learn(64, reset_num_timesteps=False)
            losses.append(float(model.logger.name_to_value["train/loss"]))
        return losses, model

    _, model = compare("sb3-contrib", "RecurrentPPO", "64x32 packed", fit, rtol=1e-2)
    assert type(model.policy.lstm_actor) is sf.LSTM
    model.save(tmp_path / "model.zip")
    loaded = sb3_contrib.RecurrentPPO.load(tmp_path / "model.zip", device="cpu")
    assert type(loaded.policy.lstm_actor) is torch.nn.LSTM
    for name, value in loaded.policy.state_dict().items():
        torch.testing.assert_close(model.policy.state_dict()[name], value)
    assert type(sf.restore(model.policy).lstm_actor) is torch.nn.LSTM
