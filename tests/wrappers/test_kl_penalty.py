"""The KL penalty: r_t - beta KL_t, against torch.distributions, in all autoreset modes."""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from torch.distributions import Normal, kl_divergence

from diffusion_gym.agents.rollout import collect
from diffusion_gym.agents.training.evaluation import trajectory_kl
from diffusion_gym.testing import conformance
from diffusion_gym.testing.conformance import RULES, check_vector_env
from diffusion_gym.wrappers import KLPenalty, KLPenaltyVectorEnv, OneStep, OneStepVectorEnv
from diffusion_gym.wrappers.kl_penalty import divergence

MODES = list(AutoresetMode)
NUMBER, T, BETA = 3, 4, 0.25


def by_hand(latents, action=None):
    """KL of the toy policy in float64, `(N,)`, or the log-ratio of the actions."""
    x = torch.as_tensor(latents).double()
    own, reference = Normal(0.9 * x, 0.5), Normal(0.7 * x, 0.5)
    if action is None:
        return kl_divergence(own, reference).sum((1, 2, 3)).numpy()
    taken = torch.as_tensor(action).double()
    return (own.log_prob(taken) - reference.log_prob(taken)).sum((1, 2, 3)).numpy()


def reset_first(env):
    return env.reset(options={"reset_mask": np.array([True] + [False] * (env.num_envs - 1))})


# --- the numbers -----------------------------------------------------------------------------------------------


def test_a_trajectory_without_noise_has_no_kl(make_env, moved_policy):
    env = make_env(NUMBER, eta=0.0)
    policy = moved_policy(env)
    rolled = collect(env, policy, torch.Generator().manual_seed(1), seed=5)
    assert trajectory_kl(policy, rolled, NUMBER).isnan().all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("output", ["numpy", "torch"])
def test_the_return_is_less_by_beta_times_the_kl_of_the_trajectory(make_env, moved_policy, mode, output):
    env = make_env(NUMBER, autoreset_mode=mode, output=output)
    policy = moved_policy(env)
    rolled = collect(env, policy, torch.Generator().manual_seed(1), seed=5)
    wanted = trajectory_kl(policy, rolled, NUMBER)
    assert (wanted > 0.01).all() and wanted.std() > 0
    penalized = KLPenaltyVectorEnv(env, policy, BETA, "exact")
    penalized.reset(seed=5)
    total, divergences = torch.zeros(NUMBER), torch.zeros(NUMBER)
    for action in rolled.latents[1:]:
        _, rewards, terminations, _, infos = penalized.step(action if output == "torch" else action.numpy())
        assert isinstance(infos["kl"], torch.Tensor if output == "torch" else np.ndarray)
        assert infos["kl"].dtype == rewards.dtype and rewards.dtype in (torch.float32, np.float32)
        total += torch.as_tensor(rewards)
        divergences += torch.as_tensor(infos["kl"])
    assert torch.as_tensor(terminations).all()
    torch.testing.assert_close(divergences, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(total, rolled.rewards - BETA * wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_each_step_is_charged_in_the_state_acted_on(make_env, toy, play, actions, mode, estimator):
    """Two episodes and a half where the mode goes on by itself, env 0 one step behind after a reset of its own."""
    steps = T if mode == AutoresetMode.DISABLED else 2 * T + 2
    kinds = {"output": "numpy", "autoreset_mode": mode}
    plain = play(make_env(NUMBER, **kinds), steps, after=reset_first)
    played = play(KLPenaltyVectorEnv(make_env(NUMBER, **kinds), toy, BETA, estimator), steps, after=reset_first)
    over, number = np.zeros(NUMBER, dtype=bool), 0
    for index, now in enumerate(played):
        np.testing.assert_array_equal(now.observation["latents"], plain[index].observation["latents"])
        if not hasattr(now, "rewards"):
            over &= ~now.infos["_prompt"]
            continue
        before = played[index - 1].observation["latents"]
        action = actions(number, NUMBER) if estimator == "sampled" else None
        wanted = np.where(over, 0, by_hand(before, action))
        np.testing.assert_allclose(now.infos["kl"], wanted, rtol=1e-4, atol=1e-4)
        assert now.infos["_kl"].tolist() == (~over).tolist()
        np.testing.assert_allclose(now.rewards, plain[index].rewards - BETA * wanted, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(now.terminations, plain[index].terminations)
        over = now.terminations if mode == AutoresetMode.NEXT_STEP else np.zeros(NUMBER, dtype=bool)
        number += 1
    assert sum(now.terminations.sum() for now in played if hasattr(now, "rewards")) == (
        NUMBER - 1 if mode == AutoresetMode.DISABLED else 2 * NUMBER
    )


def test_the_default_is_the_estimator_to_train_with(make_env, toy, actions):
    """The log-ratio of the action, whose policy gradient is that of the divergence (the next test)."""
    env, action = KLPenaltyVectorEnv(make_env(NUMBER, output="numpy"), toy, BETA), actions(0, NUMBER)
    latents = env.reset(seed=0)[0]["latents"]
    sampled = by_hand(latents, action)
    np.testing.assert_allclose(env.step(action)[-1]["kl"], sampled, rtol=1e-4, atol=1e-4)
    assert (np.abs(sampled - by_hand(latents)) > 0.1).all()


def test_the_score_function_sees_the_sampled_penalty_and_not_the_exact_one():
    """At T = 1: the gradient of E[r] by score x reward is that of the divergence only with the log-ratio."""
    mean, std, count = torch.tensor([0.3, -0.2]).view(1, 1, 1, 2), torch.full((200_000, 1, 1, 1), 0.5), 200_000

    class Shifted:
        def distribution(self, observation):
            return SimpleNamespace(mean=mean.expand(count, 1, 1, 2), std=std)

        def reference_distribution(self, observation):
            return SimpleNamespace(mean=torch.zeros(count, 1, 1, 2), std=std)

    action = mean + std * torch.randn(count, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    score = (action - mean) / std**2
    gradients = {}
    for estimator in ("exact", "sampled"):
        kl = divergence(Shifted(), {}, action, estimator)
        torch.testing.assert_close(kl.mean(), mean.square().sum() / (2 * 0.25), rtol=0.02, atol=0)
        gradients[estimator] = (score * kl.view(-1, 1, 1, 1)).mean(0).flatten()
    torch.testing.assert_close(gradients["sampled"], (mean / 0.25).flatten(), rtol=0.05, atol=0.02)
    assert gradients["exact"].abs().max() < 0.02


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_a_deterministic_step_costs_nothing(make_env, moved_policy, exact_end_pipeline, estimator):
    env = make_env(2, model=str(exact_end_pipeline), num_inference_steps=2, autoreset_mode="Disabled")
    policy = moved_policy(env)
    penalized = KLPenaltyVectorEnv(env, policy, BETA, estimator)
    observation, _ = penalized.reset(seed=0)
    observation, _, _, _, infos = penalized.step(policy.distribution(observation).sample())
    assert (infos["kl"] != 0).all()
    assert (policy.distribution(observation).std == 0).all()
    *_, infos = penalized.step(policy.distribution(observation).sample())
    assert infos["kl"].tolist() == [0, 0]


def test_at_the_pretrained_model_the_rewards_stay(make_env, toy, play):
    toy.reference_distribution = toy.distribution
    plain = play(make_env(NUMBER), T)
    played = play(KLPenaltyVectorEnv(make_env(NUMBER), toy, BETA), T)
    assert [now.rewards.tolist() for now in played[1:]] == [now.rewards.tolist() for now in plain[1:]]
    assert (played[-1].rewards > 0).all()


def test_beta_0_measures_alone(make_env, toy, play):
    played = play(KLPenaltyVectorEnv(make_env(NUMBER), toy, 0, "exact"), T)
    assert all((now.infos["kl"] > 0).all() for now in played[1:])
    assert played[-1].rewards.tolist() == play(make_env(NUMBER), T)[-1].rewards.tolist()


def test_the_info_of_the_end_has_the_kl_of_those_that_ended(make_env, toy, play):
    played = play(KLPenaltyVectorEnv(make_env(NUMBER), toy, BETA), T, after=reset_first)
    end = played[-1].infos
    assert end["_kl"].all() and end["final_info"]["_kl"].tolist() == [False, True, True]
    assert end["final_info"]["kl"][1:].tolist() == end["kl"][1:].tolist()
    assert "image" in end["final_info"] and "final_info" not in played[1].infos


def test_the_policy_is_asked_once_for_each_action(make_env, toy, play):
    env = KLPenaltyVectorEnv(make_env(NUMBER, autoreset_mode="NextStep"), toy, BETA)
    play(env, T + 1)  # the last call resets
    assert (toy.calls, toy.rows) == (T, T * NUMBER)


def test_the_native_agents_rollout_counts_the_penalty(make_env, moved_policy):
    env = make_env(NUMBER)
    policy = moved_policy(env)
    plain = collect(env, policy, torch.Generator().manual_seed(0), seed=0)
    rolled = collect(KLPenaltyVectorEnv(env, policy, BETA, "exact"), policy, torch.Generator().manual_seed(0), seed=0)
    wanted = plain.rewards - BETA * trajectory_kl(policy, plain, NUMBER)
    torch.testing.assert_close(rolled.rewards, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(rolled.images, plain.images) and rolled.prompts == plain.prompts


def test_stable_baselines3_collects_penalised_rewards(make_env):
    """The policy is SB3's, set after it is made; KL by torch.distributions from what SB3 stored."""
    pytest.importorskip("stable_baselines3")
    from diffusion_gym.agents.sb3 import ddpo_sf

    inner = RecordEpisodeStatistics(make_env(2, output="numpy", reward="Incompressibility"))
    env = KLPenaltyVectorEnv(inner, None, BETA, "exact")
    model = ddpo_sf(env, learning_rate=0.0, seed=0)
    actor = model.policy.actor
    with torch.no_grad():
        for parameter in actor.trainable_parameters().values():
            parameter.add_(0.2)
    env.policy = actor
    model.learn(2 * T)
    stored = model.rollout_buffer  # which the update has flattened, env by env
    states = {key: torch.as_tensor(value) for key, value in stored.observations.items()}
    states = {key: value.long() if key != "latents" else value for key, value in states.items()}
    own, reference = actor.distribution(states), actor.reference_distribution(states)
    kl = kl_divergence(Normal(own.mean, own.std), Normal(reference.mean, reference.std)).sum((1, 2, 3))
    assert (kl > 1e-3).all()
    wanted = np.array(inner.return_queue) - BETA * kl.detach().numpy().reshape(2, T).sum(1)
    np.testing.assert_allclose(stored.rewards.sum(0), wanted, rtol=1e-4, atol=1e-4)  # may be near 0


# --- a proper environment --------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_it_conforms_but_for_the_rewards_on_the_way(make_env, toy, estimator):
    for rule in RULES:
        if rule is not conformance.reward_waits_for_the_end:
            rule(lambda **kinds: KLPenaltyVectorEnv(make_env(num_inference_steps=2, **kinds), toy, BETA, estimator))


def test_without_a_divergence_it_conforms_in_full(make_env, toy):
    toy.reference_distribution = toy.distribution
    check_vector_env(lambda **kinds: KLPenaltyVectorEnv(make_env(num_inference_steps=2, **kinds), toy, BETA))


# --- misuse ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [-0.1, float("nan"), float("inf"), "0.1", None, True])
def test_beta_is_checked(make_env, toy, beta):
    with pytest.raises(ValueError, match=f"beta={beta!r} must be a finite number of at least 0"):
        KLPenaltyVectorEnv(make_env(1), toy, beta)


def test_other_arguments_are_checked(make_env, toy):
    with pytest.raises(ValueError, match="estimator='k3' must be 'exact' or 'sampled'"):
        KLPenaltyVectorEnv(make_env(1), toy, BETA, "k3")
    with pytest.raises(TypeError, match="policy=.* has no distribution and no reference_distribution"):
        KLPenaltyVectorEnv(make_env(1), object(), BETA)


def test_environments_without_states_are_refused(make_env, make_single, toy):
    for wrap, env in (
        (KLPenaltyVectorEnv, gym.make_vec("CartPole-v1", num_envs=1)),
        (KLPenaltyVectorEnv, OneStepVectorEnv(make_env(1))),
        (KLPenalty, gym.make("CartPole-v1")),
        (KLPenalty, OneStep(make_single())),
    ):
        with pytest.raises(ValueError, match="^KLPenalty: env=.* does not show timestep and latents"):
            wrap(env, toy, BETA)


def test_the_policy_may_come_later(make_env, make_single, toy, actions):
    for env in (KLPenaltyVectorEnv(make_env(1, output="numpy"), None, BETA), KLPenalty(make_single(), None, BETA)):
        action = actions(0, 1) if isinstance(env, KLPenaltyVectorEnv) else actions(0, 1)[0]
        env.reset(seed=0)
        with pytest.raises(ValueError, match="policy=None: set the wrapper's attribute policy"):
            env.step(action)
        env.policy = toy
        assert env.step(action)[-1]["kl"] != 0


def test_a_refused_step_changes_nothing(make_env, toy, actions):
    env = KLPenaltyVectorEnv(make_env(1, output="numpy", autoreset_mode="NextStep"), toy, BETA, "exact")
    observation, _ = env.reset(seed=0)
    with pytest.raises(ValueError, match="float32"):
        env.step(actions(0, 1).astype(np.float64))
    np.testing.assert_allclose(env.step(actions(0, 1))[4]["kl"], by_hand(observation["latents"]), rtol=1e-5)
