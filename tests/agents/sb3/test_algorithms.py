"""SB3's own PPO and A2C: settings, learning, callbacks, logs."""

import math
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3")
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecMonitor

from diffusion_gym.agents.sb3 import SB3VecEnv, ddpo_is, ddpo_sf
from pages import run_page

T = 3


@pytest.mark.parametrize("make", [ddpo_is, ddpo_sf])
def test_settings_are_those_of_ddpo(make_env, make):
    model = make(make_env(5, num_inference_steps=T), learning_rate=3e-5)
    assert (model.gamma, model.gae_lambda, model.vf_coef, model.ent_coef, model.n_steps) == (1, 1, 0, 0, T)
    assert model.max_grad_norm == 1 and model.normalize_advantage and model.learning_rate == 3e-5
    optimizer = model.policy.optimizer
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert (group["weight_decay"], group["eps"], group["betas"], group["lr"]) == (1e-4, 1e-8, (0.9, 0.999), 3e-5)
    assert {id(p) for p in group["params"]} == {id(p) for p in model.policy.actor.trainable_parameters().values()}
    if make is ddpo_is:
        assert model.clip_range(1.0) == 1e-4 and model.batch_size == 5 * T and model.n_epochs == 1


def test_single_environments_work_too(make_single):
    env = make_single()
    model = ddpo_is(env, n_steps=2 * T, batch_size=2 * T, learning_rate=1e-2)
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    model.learn(2 * T)
    assert any(not torch.equal(before[name], value) for name, value in model.policy.state_dict().items())


def test_learning_leaves_the_environments_model_alone(make_env):
    env = make_env(4, num_inference_steps=T)
    before = {name: value.clone() for name, value in env.unwrapped.model.unet.state_dict().items()}
    for trainable in ("lora", "full"):
        ddpo_sf(env, learning_rate=0.1, policy_kwargs={"trainable": trainable}).learn(4 * T)
    assert all(torch.equal(before[name], value) for name, value in env.unwrapped.model.unet.state_dict().items())


def test_evaluate_policy_plays_the_means(make_env, perturb):
    model = ddpo_is(make_env(3, num_inference_steps=T))
    perturb(model.policy.actor, 0.1)
    evaluated = SB3VecEnv(make_env(3, num_inference_steps=T))
    evaluated.seed(11)
    rewards, lengths = evaluate_policy(model, VecMonitor(evaluated), 3, deterministic=True, return_episode_rewards=True)
    env = make_env(3, num_inference_steps=T)
    observation, _ = env.reset(seed=11)
    with torch.no_grad():
        for _ in range(T):
            action = model.policy.actor.distribution(observation).mean
            observation, expected, _, _, _ = env.step(action)
    assert lengths == [T] * 3
    np.testing.assert_allclose(rewards, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    "algorithm, logged",
    [("ddpo_is", "train/approx_kl"), ("ddpo_sf", "train/policy_loss"), ("DDPOPPO", "train/approx_kl")],
)
def test_callbacks_and_tensorboard(make_env, tmp_path, ddpo, algorithm, logged):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make = {"ddpo_is": ddpo_is, "ddpo_sf": ddpo_sf, "DDPOPPO": ddpo}[algorithm]
    model = make(make_env(2, num_inference_steps=T), tensorboard_log=str(tmp_path / "logs"))
    evaluated = VecMonitor(SB3VecEnv(make_env(2, num_inference_steps=T)))
    evaluation = EvalCallback(
        evaluated, n_eval_episodes=2, eval_freq=T, best_model_save_path=str(tmp_path / "best"), verbose=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the environments differ by their monitor
        model.learn(2 * 2 * T, log_interval=1, callback=[evaluation, CheckpointCallback(T, str(tmp_path / "saved"))])
    assert (tmp_path / "best" / "best_model.zip").exists() and len(list((tmp_path / "saved").iterdir())) == 2
    assert math.isfinite(evaluation.best_mean_reward)
    events = EventAccumulator(str(next((tmp_path / "logs").iterdir())))
    events.Reload()
    shown = set(events.Tags()["scalars"])
    assert {"rollout/ep_rew_mean", "rollout/ep_len_mean", "eval/mean_reward", logged} <= shown
    assert events.Scalars("rollout/ep_len_mean")[0].value == T


def test_trained_steps_come_in_minibatches_of_their_own(make_env, rolled):
    model = ddpo_is(make_env(4, num_inference_steps=T), trained_steps=(0.0, 0.5), batch_size=4, seed=0)
    buffer = rolled(model)
    parts = list(buffer.get(4))
    assert [len(part.advantages) for part in parts] == [4, 4]  # steps 0 and 1 of T = 3
    noisy = model.policy.actor.table.timesteps[:2].tolist()
    assert sorted(torch.cat([part.observations["timestep"] for part in parts]).flatten().tolist()) == sorted(4 * noisy)
    assert ddpo_is(make_env(4, num_inference_steps=T), trained_steps=(0.0, 0.5)).batch_size == 4 * 2  # of all of them
    with pytest.raises(ValueError, match=r"trained_steps=\(0.4, 0.5\) must be two fractions of T=3"):
        ddpo_is(make_env(2, num_inference_steps=T), trained_steps=(0.4, 0.5))


# --- rewards that are not finite -------------------------------------------------------------------------------


def failing(images, prompts, metadata):
    """The second picture cannot be scored."""
    scores = images.mean((1, 2, 3))
    scores[1:2] = float("nan")
    return scores


@pytest.mark.parametrize("make", [ddpo_is, ddpo_sf])
def test_failed_rewards_are_refused_or_left_out(make_env, rolled, make):
    env = make_env(4, num_inference_steps=T, reward=failing)
    with pytest.raises(ValueError, match=r"reward of env \[1\] is NaN or infinite.*trained_steps=\(0, 1\)"):
        make(VecMonitor(SB3VecEnv(env, failed_rewards="keep"))).learn(4 * T)  # its `train` has no way to drop them
    model = make(env, trained_steps=(0, 1), learning_rate=1e-2)
    start = {name: value.clone() for name, value in model.policy.state_dict().items()}
    (sample,) = rolled(model).get(None)
    assert len(sample.advantages) == 3 * T and torch.isfinite(sample.advantages).all()
    kept = sample.observations["latents"][sample.observations["timestep"][:, 0] == 999]
    first = model.rollout_buffer.latents[0]
    assert not any(torch.equal(latents, first[1]) for latents in kept)
    model.learn(4 * T)
    assert all(torch.isfinite(value).all() for value in model.policy.state_dict().values())
    assert any(not torch.equal(value, start[name]) for name, value in model.policy.state_dict().items())


def test_failed_rewards_of_single_environments(make_single):
    never = make_single(reward=lambda images, *_: images.mean((1, 2, 3)) * math.nan)
    with pytest.raises(ValueError, match=r"reward of env \[0\] is NaN or infinite"):
        ddpo_sf(never).learn(T)
    with pytest.raises(RuntimeError, match="all 1 rewards of the iteration are NaN or infinite"):
        ddpo_sf(never, trained_steps=(0, 1)).learn(T)


def test_the_page_runs(tmp_path, monkeypatch):
    """Every block of docs/stable-baselines3.md in order, with fewer environments and steps."""
    monkeypatch.chdir(tmp_path)
    sizes = {"=64,": "=4,", "64 * T": "4 * T", "32 * T": "2 * T", "T = 10": "T = 3", "steps=10": "steps=3"}
    scope = run_page("stable-baselines3.md", sizes)
    assert scope["action"].shape == (4, 8, 8) and (tmp_path / "model").is_dir()
