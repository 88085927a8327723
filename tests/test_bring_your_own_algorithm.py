"""What the page "Bring your own algorithm" says of TorchRL is so; tests/test_docs.py runs its code."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from diffusion_gym.agents import DenoisingPolicy


@pytest.fixture
def torchrl():
    """TorchRL, where it is installed: it is an extra."""
    pytest.importorskip("tensordict")
    return pytest.importorskip("torchrl.envs")


class Acting(torch.nn.Module):
    """Sampled actions for a TensorDictModule; one state or N."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, prompt, timestep, latents):
        single = latents.ndim == 3
        state = {"prompt": prompt, "timestep": timestep, "latents": latents}
        action = self.policy.distribution({k: v[None] if single else v for k, v in state.items()}).sample()
        return action[0] if single else action


def actor(policy):
    from tensordict.nn import TensorDictModule

    return TensorDictModule(Acting(policy), in_keys=["prompt", "timestep", "latents"], out_keys=["action"])


@torch.no_grad()
def test_a_torchrl_rollout_is_the_environments_own(torchrl, make_env):
    """Two episodes and a half; the actions, replayed without TorchRL, give all else that it recorded."""
    settings = {"num_envs": 3, "autoreset_mode": "Disabled", "num_inference_steps": 2}
    env = make_env(**settings)
    wrapped = torchrl.GymWrapper(env)
    wrapped.set_seed(5)
    rollout = wrapped.rollout(5, actor(DenoisingPolicy.from_env(env)), break_when_any_done=False)

    plain = make_env(**settings)
    plain.reset(seed=5)
    for step in range(5):
        if step % 2 == 0:
            observation, _ = plain.reset()
        for key, value in observation.items():
            assert torch.equal(rollout[key][:, step], value), (key, step)
        observation, reward, terminations, _, _ = plain.step(rollout["action"][:, step])
        assert torch.equal(rollout["next", "latents"][:, step], observation["latents"])
        assert torch.equal(rollout["next", "reward"][:, step, 0], reward)
        assert torch.equal(rollout["next", "terminated"][:, step, 0], terminations)
    assert rollout["next", "done"][0].flatten().tolist() == [False, True, False, True, False]


def test_torchrl_finds_the_specs_in_order(torchrl, make_env):
    torchrl.check_env_specs(torchrl.GymWrapper(make_env(num_envs=2, autoreset_mode="Disabled")))


@torch.no_grad()
def test_torchrl_takes_a_single_environment(torchrl, make_env):
    vector = make_env(num_envs=1).unwrapped
    env = gym.make(
        "DiffusionDenoise-v0",
        model=vector.model,
        reward=vector.reward,
        prompts=vector.prompt_set,
        num_inference_steps=3,
    )
    rollout = torchrl.GymWrapper(env).rollout(10, actor(DenoisingPolicy.from_env(env)))
    assert rollout.batch_size == (3,) and rollout["latents"].shape == (3, *vector.model.latent_shape)
    assert torch.equal(rollout["latents"][1:], rollout["action"][:-1])
    assert rollout["next", "reward"][:2].eq(0).all() and rollout["next", "reward"][2] > 0


@torch.no_grad()
def test_a_policy_takes_a_flat_tensordict(torchrl, make_env):
    env = make_env(num_envs=2, autoreset_mode="Disabled", num_inference_steps=3)
    policy = DenoisingPolicy.from_env(env)
    rollout = torchrl.GymWrapper(env).rollout(3, actor(policy))
    flat = policy.distribution(rollout.reshape(-1)).mean.reshape(2, 3, *env.unwrapped.model.latent_shape)
    for step in range(3):
        states = {key: rollout[key][:, step].numpy() for key in ("prompt", "timestep", "latents")}
        np.testing.assert_allclose(flat[:, step], policy.distribution(states).mean, rtol=1e-4, atol=1e-5)


def test_torchrl_refuses_next_step(torchrl, make_env):
    with pytest.raises(RuntimeError, match="must be one of SAME_STEP or DISABLED"):
        torchrl.GymWrapper(make_env(autoreset_mode="NextStep"))


def test_torchrl_cannot_read_same_step(torchrl, make_env):
    """The reason that the page gives; when this fails, TorchRL has learned it and the page is out of date."""
    env = make_env(num_envs=2, autoreset_mode="SameStep", num_inference_steps=3)
    with pytest.raises((KeyError, RuntimeError)):  # it differs with where the first episode ends
        torchrl.GymWrapper(env).rollout(5, break_when_any_done=False)
