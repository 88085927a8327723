"""The page "Bring your own algorithm": its code runs, and what it says of TorchRL is so."""

import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from diffusion_gym.agents import DenoisingPolicy

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "bring-your-own-algorithm.md"
TEXT = PAGE.read_text()


def test_the_code_of_the_page_runs(tmp_path):
    """In a process of its own, as a reader would run it; the page's assertions are the contract."""
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)
    assert len(blocks) == 8 and sum(block.count("assert") for block in blocks) >= 14
    script = tmp_path / "page.py"
    script.write_text("\n".join([*blocks, "print('end of the page')"]))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "end of the page"


def test_every_linked_file_and_section_exists():
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        path, _, section = target.partition("#")
        assert (PAGE.parent / path).exists(), target
        assert not section or f"## {section}" in TEXT.lower(), target


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


class Counting(gym.Env):
    """A toy with a Dict space and episodes of two steps, which counts them."""

    observation_space = gym.spaces.Dict({"count": gym.spaces.Box(0, 9, (1,), np.float32)})
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return {"count": np.zeros(1, np.float32)}, {}

    def step(self, action):
        self.count += 1
        return {"count": np.full(1, self.count, np.float32)}, 0.0, self.count == 2, False, {}


def test_torchrl_loses_the_final_observation_of_any_dict_space(torchrl):
    same_step = gym.vector.AutoresetMode.SAME_STEP
    envs = gym.vector.SyncVectorEnv([Counting] * 2, autoreset_mode=same_step)
    assert list(envs.reset()[0]["count"].ravel()) == [0, 0]
    rollout = torchrl.GymWrapper(envs).rollout(2, break_when_any_done=False)
    assert rollout["next", "count"][0].flatten().tolist() == [1, 0]  # it ends at 2


def test_torchrls_normal_sums_the_dimensions_and_divides_by_sigma(torchrl):
    from torchrl.modules import IndependentNormal

    mean, x = torch.zeros(2, 4, 8, 8), torch.ones(2, 4, 8, 8)
    each = -0.5 - 0.5 * np.log(2 * np.pi)
    scored = IndependentNormal(mean, torch.ones_like(mean), event_dim=3).log_prob(x)
    np.testing.assert_allclose(scored, [256 * each] * 2, rtol=1e-5)
    exact = IndependentNormal(mean, torch.zeros_like(mean), event_dim=3, validate_args=False)
    assert not exact.log_prob(mean).isfinite().any()
