"""The reward's gradient: against finite differences in float64, by hand, and through the networks of a pipeline."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from agent_updates import close, gradients, slope, update, weights
from diffusion_gym.agents.algorithms import RewardGradient
from diffusion_gym.agents.distribution import DenoisingDistribution
from diffusion_gym.agents.training.trainer import Schedule, Trainer

STD = [0.5, 0.2]
FORMS = [("draft", 1), ("draft", 2), ("alignprop", 1), ("refl", 1)]


class Chain:
    """Two steps x <- theta_k sin(x) + sigma_k z in float64; a picture is the tanh of x_0."""

    def __init__(self, theta):
        self.theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        self.table, self.model = [0, 1], SimpleNamespace(decode=torch.tanh)

    def _mean(self, observation):
        return self.theta[observation["step"]].view(-1, 1, 1, 1) * observation["latents"].sin()

    def distribution(self, observation):
        std = torch.tensor(STD, dtype=torch.float64)[observation["step"]].view(-1, 1, 1, 1)
        return DenoisingDistribution(self._mean(observation), std, "mean")

    def denoised(self, observation):
        return 2 * self._mean(observation)


def score(images, prompts, metadata):
    return (images**2 + 0.3 * images).flatten(1).sum(1)


score.differentiable = True


def on_chain(theta, form, truncation, checkpoint_chain=True, limit=None):
    """The summed loss of four pictures from step `begin` on, by the agent; and what it was computed from."""
    agent = object.__new__(RewardGradient)
    options = {"form": form, "truncation": truncation, "reward_limit": limit, "checkpoint_chain": checkpoint_chain}
    agent.policy, agent.config = Chain(theta), RewardGradient.Config(**options)
    agent.steps = torch.tensor([0, 1])
    agent._env = SimpleNamespace(
        reward=score, prompt_set=SimpleNamespace(metadata_of=lambda prompts: [{}] * len(prompts))
    )
    generator = torch.Generator().manual_seed(2)
    latents, noise = torch.randn(2, 2, 4, 1, 1, 3, generator=generator, dtype=torch.float64)
    rolled = SimpleNamespace(latents=latents, prompts=("a",) * 4, conditions=lambda samples: {})
    begin = agent.begin(np.random.default_rng(1))
    items = torch.arange(4)[:, None].expand(4, 2)
    return agent.losses(rolled, begin, noise[begin:], items)["loss"].sum(), agent.policy.theta, begin, latents, noise


@pytest.mark.parametrize(("form", "truncation"), FORMS)
@pytest.mark.parametrize("checkpointed", [True, False])
def test_the_gradient_is_that_of_finite_differences(form, truncation, checkpointed):
    theta, step = [0.7, -1.2], 1e-6
    loss, parameter, begin, *_ = on_chain(theta, form, truncation, checkpointed)
    found = torch.autograd.grad(loss, parameter)[0].numpy()
    for k in range(2):
        moved = [[value + sign * step * (index == k) for index, value in enumerate(theta)] for sign in (1, -1)]
        above, below = (on_chain(each, form, truncation)[0].item() for each in moved)
        assert found[k] == pytest.approx((above - below) / (2 * step), rel=1e-6, abs=1e-9)
    assert (found != 0).tolist() == ([begin == 0, begin == 1] if form == "refl" else [begin == 0, True])


def test_the_gradient_of_the_last_step_by_hand():
    loss, parameter, begin, latents, noise = on_chain([0.7, -1.2], "draft", 1)
    x = latents[1].numpy()
    picture = np.tanh(-1.2 * np.sin(x) + 0.2 * noise[1].numpy())
    wanted = -((2 * picture + 0.3) * (1 - picture**2) * np.sin(x)).sum()
    found = torch.autograd.grad(loss, parameter)[0]
    assert begin == 1
    np.testing.assert_allclose(found, [0, wanted], rtol=1e-12)
    assert loss.item() == pytest.approx(-(picture**2 + 0.3 * picture).sum(), rel=1e-12)


def test_rewards_beyond_the_limit_have_no_gradient():
    scores = -on_chain([0.7, -1.2], "draft", 2)[0]
    loss, parameter, *_ = on_chain([0.7, -1.2], "draft", 2, limit=-100.0)
    assert loss == 0 and torch.autograd.grad(loss, parameter)[0].abs().max() == 0
    loss, parameter, *_ = on_chain([0.7, -1.2], "draft", 2, limit=100.0)
    assert loss.item() == pytest.approx(400 - scores.item())


def test_how_many_steps_have_a_gradient():
    rng, counts = np.random.default_rng(0), {"alignprop": set(), "refl": set()}
    for form, seen in counts.items():
        for _ in range(20):
            agent = object.__new__(RewardGradient)
            agent.policy, agent.steps = SimpleNamespace(table=[0] * 5), torch.tensor([3, 4])
            agent.config = RewardGradient.Config(form=form)
            seen.add(agent.begin(rng))
    assert counts == {"alignprop": {0, 1, 2, 3, 4}, "refl": {3, 4}}


# --- on a pipeline ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_an_update_follows_the_reward_through_network_and_autoencoder(make_env, make_agent, trainable):
    """Autograd of the mean brightness of the pictures of DDIM's last two steps, without noise."""
    env = make_env(6, num_inference_steps=3, eta=0.0, autoreset_mode="Disabled")
    options = {"agent": RewardGradient, "truncation": 2, "batch_size": 6, "max_grad_norm": 1e9}
    agent, other = (make_agent(env, trainable, **options) for _ in range(2))
    rolled = agent.sample(env, 6, (0, 0))
    metrics = update(agent, rolled)
    latents, samples = rolled.latents[1], torch.arange(6)
    for step in (1, 2):
        latents = other.policy.distribution(
            {**rolled.conditions(samples), "step": torch.full((6,), step), "latents": latents}
        ).mean
    value = env.unwrapped.model.decode(latents).mean()
    assert metrics["steps_with_gradient"] == 2 and metrics["samples_dropped"] == 0
    assert metrics["reward_with_gradient"] == pytest.approx(rolled.rewards.mean().item(), rel=1e-4)
    close(-gradients(agent), slope(value, other.parameters), 1e-3)


def test_pictures_become_brighter(make_env, make_agent):
    env = make_env(6, num_inference_steps=3, autoreset_mode="Disabled")
    agent = make_agent(env, "full", agent=RewardGradient, batch_size=3, learning_rate=3e-3)
    before, start = agent.sample(env, 12, (1,)).rewards.mean(), weights(agent)
    for iteration in range(2):
        update(agent, agent.sample(env, 6, (0, iteration)), iteration)
    assert not torch.equal(weights(agent), start)
    assert agent.sample(env, 12, (1,)).rewards.mean() > before + 0.01


def test_a_reward_without_gradient_is_refused_before_anything_is_written(make_env, make_agent, tmp_path):
    def plain(images, prompts, metadata):
        return images.mean((1, 2, 3))

    env = make_env(4, reward=plain, autoreset_mode="Disabled")
    agent = make_agent(env, agent=RewardGradient)
    with pytest.raises(ValueError, match="reward='plain' does not say that it is differentiable"):
        Trainer(env, agent, tmp_path / "run", Schedule(samples_per_iteration=4))
    assert not (tmp_path / "run").exists()
    plain.differentiable = True
    Trainer(env, agent, tmp_path / "run", Schedule(samples_per_iteration=4))
    with pytest.raises(ValueError, match="truncation=9 must be at most num_inference_steps=4"):
        make_agent(env, agent=RewardGradient, truncation=9).check_env(env)


def test_a_reward_that_says_so_and_has_none_is_refused(make_env, make_agent):
    def detached(images, prompts, metadata):
        return images.detach().mean((1, 2, 3))

    detached.differentiable = True
    env = make_env(4, reward=detached, reward_seconds=60, autoreset_mode="Disabled")
    agent = make_agent(env, agent=RewardGradient)
    with pytest.raises(ValueError, match="reward='detached' says differentiable = True, but .* requires_grad=False"):
        update(agent, agent.sample(env, 4, (0, 0)))
