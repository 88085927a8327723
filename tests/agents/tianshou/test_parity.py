"""On the same trajectories and weights Tianshou's own update code gives what the native agents give."""

import numpy as np
import pytest
import torch

pytest.importorskip("tianshou")
from tianshou.data import Batch, VectorReplayBuffer
from tianshou.utils.torch_utils import policy_within_training_step

from diffusion_gym.agents.advantages import PromptStatistics
from diffusion_gym.agents.algorithms import DDPOIS, DDPOSF
from diffusion_gym.agents.optimization import OptimizerOptions
from diffusion_gym.agents.tianshou import AdamWFactory, GuidedActor, GuidedPolicy, TrajectoryCollector, ddpo_is, ddpo_sf

T, N = 3, 6
UNBOUNDED = 1e9  # the gradient as it is, not scaled down


def buffer_of(trajectories):
    """A Tianshou buffer with the transitions of native trajectories, an env each."""
    number, horizon = len(trajectories), len(trajectories.timesteps)
    buffer = VectorReplayBuffer(number * horizon, number, ignore_obs_next=True)
    everyone = torch.arange(number)
    for step in range(horizon):
        at = torch.full((number,), step)
        last = step == horizon - 1
        states = {key: value.numpy() for key, value in trajectories.states(everyone, at).items()}
        buffer.add(
            Batch(
                obs=Batch(states),
                act=trajectories.actions(everyone, at).numpy(),
                rew=trajectories.rewards.numpy() * last,
                terminated=np.full(number, last),
                truncated=np.zeros(number, dtype=bool),
                info=Batch(prompt=np.array(trajectories.prompts, dtype=object)),
            )
        )
    return buffer


def gradients(parameters):
    return torch.cat([p.grad.flatten() for p in parameters.values()])


def same_direction(ours, theirs):
    assert float(theirs.norm()) > 1e-6
    assert float(torch.cosine_similarity(ours.double(), theirs.double(), dim=0)) >= 0.9999
    assert float(ours.norm() / theirs.norm()) == pytest.approx(1, abs=1e-3)


def update(algorithm, trajectories, batch_size=None, repeat=1):
    with policy_within_training_step(algorithm.policy):
        return algorithm.update(buffer=buffer_of(trajectories), batch_size=batch_size, repeat=repeat)


def frozen(monkeypatch, optimizer):
    """The optimiser computes gradients and leaves the weights as they are."""
    monkeypatch.setattr(optimizer, "step", lambda *args, **kwargs: None)


@pytest.fixture
def world(make_env, make_policy, roll, perturb):
    """A policy, and trajectories of an earlier version of it."""

    def make(moved=0.0, **keywords):
        env = make_env(N, num_inference_steps=T, autoreset_mode="Disabled", **keywords)
        policy = make_policy(env)
        trajectories = roll(env, policy)
        return env, perturb(policy, moved, seed=1) if moved else policy, trajectories

    return make


def test_rollouts(world):
    """With the same seeds Tianshou's collector samples the native rollout, bit for bit."""
    env, policy, trajectories = world()
    algorithm = ddpo_sf(env, GuidedPolicy(GuidedActor(policy)))
    collector = TrajectoryCollector(algorithm, env, N)
    collector.reset(gym_reset_kwargs={"seed": 0})
    torch.manual_seed(0)
    collector.collect(n_episode=N)
    ours, theirs = collector.buffer.sample(0)[0], buffer_of(trajectories).sample(0)[0]
    for key in ("prompt", "timestep", "latents"):
        np.testing.assert_array_equal(ours.obs[key], theirs.obs[key])
    for key in ("act", "rew", "done"):
        np.testing.assert_array_equal(ours[key], theirs[key])
    assert (ours.info.prompt == theirs.info.prompt).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_log_probs(world, reduction):
    env, policy, trajectories = world(log_prob_reduction=reduction)
    batch, _ = buffer_of(trajectories).sample(0)
    guided = GuidedPolicy(GuidedActor(policy)).eval()
    for step in range(T):  # in the rollout's own batches: in others the network rounds otherwise
        part = batch[step::T]
        ours = guided(part).dist.log_prob(torch.as_tensor(part.act))
        torch.testing.assert_close(ours, trajectories.log_probs[step], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normalization", ["prompt", "batch", "none"])
@pytest.mark.parametrize("native, make", [(DDPOSF, ddpo_sf), (DDPOIS, ddpo_is)])
def test_advantages(world, native, make, normalization):
    env, policy, trajectories = world()
    options = {"normalization": normalization, "advantage_clip": 0.8}
    if normalization == "prompt":
        options |= {"statistics_min_count": 2}
    agent = native(policy, native.Config(**options))
    algorithm = make(env, GuidedPolicy(GuidedActor(policy)), **options)
    for _ in range(2):  # the second time the running statistics count
        batch, indices = (buffer := buffer_of(trajectories)).sample(0)
        prepared = algorithm._preprocess_batch(batch, buffer, indices)
        ours = np.asarray(prepared.adv if make is ddpo_is else prepared.returns).reshape(N, T)
        expected = agent.advantages(trajectories)
        np.testing.assert_allclose(ours, np.repeat(expected[:, None], T, 1), rtol=1e-5, atol=1e-6)
        assert len(np.unique(expected)) > 2


@pytest.mark.parametrize("model", ["tiny_pipeline", "exact_end_pipeline"])
@pytest.mark.parametrize("part", [(0.0, 1.0), (0.0, 0.5)])
@pytest.mark.parametrize("native, make", [(DDPOSF, ddpo_sf), (DDPOIS, ddpo_is)])
def test_policy_gradient(world, monkeypatch, request, native, make, model, part):
    """Also where the last step is deterministic: it counts neither in the sum nor in the mean."""
    env, policy, trajectories = world(model=str(request.getfixturevalue(model)))
    parameters = policy.trainable_parameters()
    options = {"normalization": "batch", "max_grad_norm": UNBOUNDED, "trained_steps": part}

    agent = native(policy, native.Config(**options, micro_batch_size=64))
    frozen(monkeypatch, agent.optimizer.adam)
    agent.update(trajectories, np.random.default_rng(0))
    theirs = gradients(parameters)

    algorithm = make(env, GuidedPolicy(GuidedActor(policy)), **options)
    frozen(monkeypatch, algorithm.optim._optim)
    update(algorithm, trajectories)
    same_direction(gradients(parameters), theirs)


def test_score_function_gradient_is_that_of_the_policy_given(world, monkeypatch):
    """Against autograd on the definition, for a policy that has moved: E[A grad log pi]."""
    env, policy, trajectories = world(moved=0.02)
    parameters = policy.trainable_parameters()
    algorithm = ddpo_sf(env, GuidedPolicy(GuidedActor(policy)), normalization="batch", max_grad_norm=UNBOUNDED)
    frozen(monkeypatch, algorithm.optim._optim)
    update(algorithm, trajectories)
    ours = gradients(parameters)

    rewards = trajectories.rewards
    advantages = (rewards - rewards.mean()) / rewards.std(unbiased=False)
    loss = torch.zeros(())
    for step in range(T):
        at, everyone = torch.full((N,), step), torch.arange(N)
        mean = policy.distribution(trajectories.states(everyone, at)).mean
        sigma = policy.table.sigma[step]
        loss = (
            loss + (advantages * ((trajectories.latents[step + 1] - mean) ** 2 / (2 * sigma**2)).mean((1, 2, 3))).sum()
        )
    expected = torch.autograd.grad(loss / (N * T), list(parameters.values()))
    same_direction(ours, torch.cat([part.flatten() for part in expected]))


def test_second_epoch(world, monkeypatch):
    """Once the weights have moved the ratio counts, and its clipping."""
    env, policy, trajectories = world()
    parameters = policy.trainable_parameters()
    start = {name: value.detach().clone() for name, value in parameters.items()}
    clip = 5e-4
    shared = {"normalization": "batch", "max_grad_norm": UNBOUNDED}

    agent = DDPOIS(
        policy,
        DDPOIS.Config(
            **shared, clip_range=clip, inner_epochs=2, learning_rate=1e-3, adam_epsilon=1e-2, micro_batch_size=64
        ),
    )
    metrics = agent.update(trajectories, np.random.default_rng(0))
    assert 0 < metrics["clip_fraction"] < 0.5  # of the first epoch, which clips nothing, and the second
    theirs, moved = gradients(parameters), {name: value.detach().clone() for name, value in parameters.items()}

    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(start[name])
    algorithm = ddpo_is(
        env,
        GuidedPolicy(GuidedActor(policy)),
        optim=AdamWFactory(OptimizerOptions(1e-3, adam_epsilon=1e-2)),
        eps_clip=clip,
        **shared,
    )
    update(algorithm, trajectories, repeat=2)
    same_direction(gradients(parameters), theirs)
    for name, value in parameters.items():
        torch.testing.assert_close(value.detach(), moved[name], rtol=1e-4, atol=1e-7)


def test_gradients_are_scaled_down_as_in_the_native_agent(world):
    env, policy, trajectories = world()
    for make in (ddpo_sf, ddpo_is):
        algorithm = make(env, GuidedPolicy(GuidedActor(policy)), max_grad_norm=1e-3, normalization="batch")
        update(algorithm, trajectories)
        assert float(gradients(policy.trainable_parameters()).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_micro_batches_change_memory_alone(world, monkeypatch):
    env, policy, trajectories = world()
    parameters, found, sizes = policy.trainable_parameters(), [], []
    whole = policy.distribution
    monkeypatch.setattr(policy, "distribution", lambda seen: sizes.append(len(seen["latents"])) or whole(seen))
    for size in (0, 4):
        algorithm = ddpo_is(
            env,
            GuidedPolicy(GuidedActor(policy, micro_batch_size=size)),
            normalization="batch",
            max_grad_norm=UNBOUNDED,
        )
        frozen(monkeypatch, algorithm.optim._optim)
        update(algorithm, trajectories)
        found.append(gradients(parameters))
        assert max(sizes) == (size or N * T)
        sizes.clear()
    assert float((found[1] - found[0]).norm()) < 1e-4 * float(found[0].norm())


def test_prompt_statistics_are_kept_from_rollout_to_rollout(world):
    env, policy, trajectories = world()
    algorithm = ddpo_sf(env, GuidedPolicy(GuidedActor(policy)), statistics_min_count=2)
    by_hand = PromptStatistics(32, 2)
    for _ in range(2):
        update(algorithm, trajectories)
        by_hand.normalize(trajectories.prompts, trajectories.rewards.double().numpy())
    state = algorithm.rewards.statistics.state()
    assert {prompt: pytest.approx(rewards) for prompt, rewards in by_hand.state().items()} == state
    assert sum(map(len, state.values())) == 2 * N
