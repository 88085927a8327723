"""Agents of Stable-Baselines3 and Tianshou in a benchmark: their settings, and training in portions."""

import re
from dataclasses import replace

import pytest
import torch
from gymnasium.vector import VectorWrapper
from gymnasium.wrappers.vector import TransformReward

from diffusion_gym.agents.benchmark.cells import run_cell
from diffusion_gym.agents.benchmark.learner import LibraryLearner, NativeLearner, RewardLog
from diffusion_gym.agents.benchmark.library_agents import LIBRARY_AGENTS, make_learner

pytest.importorskip("stable_baselines3")
pytest.importorskip("tianshou")


@pytest.fixture
def settings(cell):
    """`settings(agent, **options of the agent)`: those of the tiny suite, no learning rate schedule."""

    def make(agent, **options):
        found = cell(agent).settings(cell(agent).load_suite())
        return replace(found, agent_options=replace(found.agent_options, **options))

    return make


def weights(learner):
    return {name: value.detach().clone() for name, value in learner.policy.trainable_parameters().items()}


@pytest.mark.parametrize("agent", LIBRARY_AGENTS)
def test_training_in_portions_is_training_at_once(settings, agent):
    """The measurements between them draw nothing from the library's generators."""
    whole = make_learner(agent, settings(agent))
    whole.train_until(8)
    expected = weights(whole)
    learner = make_learner(agent, settings(agent))
    before = weights(learner)
    for target in (4, 8):
        learner.train_until(target)
        assert learner.reward_queries == target
    for name, value in weights(learner).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    assert any(not torch.equal(value, before[name]) for name, value in expected.items())
    assert learner.go_back(8) and not learner.go_back(4)  # it stores nothing


@pytest.mark.parametrize("agent", LIBRARY_AGENTS)
def test_seeds_share_no_noise(settings, agent, monkeypatch):
    """The libraries give env i the seed `seed + i`: those of seeds 0 and 1 must lie apart."""
    seen, reset = [], VectorWrapper.reset

    def recorded(self, **options):
        observation, infos = reset(self, **options)
        seen.append({row.sum().item() for row in observation["latents"]})
        return observation, infos

    monkeypatch.setattr(RewardLog, "reset", recorded)
    for seed in (0, 1):
        make_learner(agent, replace(settings(agent), seed=seed)).train_until(4)
    noises = [noise for part in seen for noise in part]
    assert len(noises) >= 8 and len(set(noises)) == len(noises)


def test_the_settings_of_sb3(settings):
    options = {"batch_size": 2, "trained_steps": (0.0, 0.6), "clip_range": 0.1, "inner_epochs": 3, "max_grad_norm": 0.5}
    own = make_learner("sb3/ppo", settings("sb3/ppo", **options))._model
    ours = make_learner("sb3/ddpo_ppo", settings("sb3/ddpo_ppo", **options))._model
    for model in (own, ours):
        assert (model.n_steps, model.n_epochs, model.max_grad_norm, model.learning_rate) == (3, 3, 0.5, 1e-3)
        assert model.clip_range(1.0) == 0.1 and model.gamma == model.gae_lambda == 1 and not model.normalize_advantage
        group = model.policy.optimizer.param_groups[0]
        assert group["weight_decay"] == 1e-4 and isinstance(model.policy.optimizer, torch.optim.AdamW)
        assert model.policy.actor.trainable == "lora"
    assert own.batch_size == 4 and ours.batch_size == 6  # transitions: two of T = 3 steps train; whole trajectories
    assert ours.config.trained_steps == (0.0, 0.6) and own.rollout_buffer.steps.tolist() == [0, 1]
    batch = make_learner("sb3/ppo", settings("sb3/ppo", normalization="batch"))._model
    assert batch.normalize_advantage


def test_the_settings_of_tianshou(settings):
    options = {"batch_size": 2, "trained_steps": (0.0, 0.6), "clip_range": 0.1, "inner_epochs": 3, "max_grad_norm": 0.5}
    learner = make_learner("tianshou/ppo", settings("tianshou/ppo", **options))
    params, algorithm = learner._trainer.params, learner._trainer.algorithm
    assert (params.batch_size, params.update_step_num_repetitions) == (4, 3)
    assert algorithm.eps_clip == 0.1 and algorithm.rewards.options.normalization == "prompt"
    assert learner.policy.trainable == "lora"
    assert make_learner("tianshou/reinforce", settings("tianshou/reinforce"))._trainer.params.batch_size is None


@pytest.mark.parametrize(
    ("agent", "options", "message"),
    [
        ("sb3/ppo", {"ema_decay": 0.9}, "ema_decay=0.9 is for native agents; a library's takes 0"),
        ("tianshou/ppo", {"learning_rate_schedule": "warmup_cosine"}, "learning_rate_schedule='warmup_cosine' is for"),
        ("sb3/ddpo_ppo", {"timestep_fraction": 0.5}, "timestep_fraction=0.5 is for native agents"),
        ("sb3/a2c", {"inner_epochs": 2}, "inner_epochs must be 1 for sb3/a2c"),
    ],
)
def test_what_a_library_cannot_do_is_refused(settings, agent, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_learner(agent, settings(agent, **options))


def test_native_agents_and_the_libraries(settings):
    assert isinstance(make_learner("rwr", settings("rwr")), NativeLearner)
    assert isinstance(make_learner("sb3/a2c", settings("sb3/a2c")), LibraryLearner)


def test_the_record_names_the_library(cell):
    found = run_cell(cell("sb3/ppo"))
    assert found["versions"]["stable-baselines3"] and found["trained"] == "sb3/ppo"
    assert [point["reward_queries"] for point in found["points"]] == [0, 4, 8] and found["points"][2]["kl"] > 0
    # Rollouts of 4 trajectories and one pass over their 3 steps, both branches; activations fit one micro-batch.
    assert [point["network_evaluations"] for point in found["points"]] == [0, 48, 96]


def test_the_log_keeps_the_rewards_below_other_wrappers(make_env):
    log = RewardLog(make_env(2, num_inference_steps=2))
    env = TransformReward(log, lambda rewards: -rewards)
    observation, _ = env.reset(seed=0)
    for _ in range(2):
        observation, rewards, *_ = env.step(torch.zeros_like(observation["latents"]))
    assert log.rewards == pytest.approx((-rewards).tolist()) and len(log.rewards) == 2
