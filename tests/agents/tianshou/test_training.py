"""Tianshou's trainer and logger, files, the page."""

import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("tianshou")
from tianshou.algorithm import PPO
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.utils import TensorboardLogger
from tianshou.utils.torch_utils import policy_within_training_step
from torch.utils.tensorboard import SummaryWriter

from diffusion_gym.agents.optimization import OptimizerOptions
from diffusion_gym.agents.tianshou import (
    AdamWFactory,
    GuidedPolicy,
    TianshouVectorEnv,
    TrajectoryCollector,
    ZeroCritic,
    ddpo_is,
    ddpo_sf,
    load,
    save,
)
from diffusion_gym.storage import load_tensors, save_tensors
from pages import run_page

T = 3


@pytest.mark.parametrize("build", [ddpo_sf, ddpo_is])
def test_training(make, tmp_path, build, trained):
    """Tianshou's trainer with its logger, test episodes and both ways to save."""
    env = make(2)
    torch.manual_seed(0)
    algorithm = build(env, learning_rate=1e-3, statistics_min_count=2)
    start = {name: value.detach().clone() for name, value in algorithm.policy.denoising.trainable_parameters().items()}
    logger = TensorboardLogger(SummaryWriter(str(tmp_path)), training_interval=1, update_interval=1, save_interval=1)
    saved = []
    info = trained(
        algorithm,
        TrajectoryCollector(algorithm, env, 4),
        4,
        max_epochs=2,
        test_collector=TrajectoryCollector(algorithm, make(2), 3),
        test_step_num_episodes=3,
        logger=logger,
        save_best_fn=lambda best: saved.append(save(best, tmp_path / "best.safetensors")),
        save_checkpoint_fn=lambda epoch, *steps: save(algorithm, tmp_path / f"{epoch}.safetensors"),
    )
    assert info.update_step == 2 and info.train_step == 8 * T
    logged = TensorboardLogger.restore_logged_data(str(tmp_path))
    assert len(logged["update"]["loss"]["mean"]) == len(logged["training"]["returns_stat"]["mean"]) == 2
    assert list(logged["test"]["n_collected_episodes"]) == [3, 3, 3]
    assert len(logged["training"]["pred_dist_std_array_stat"]) == 1  # sigma once, not for each dimension
    assert saved and {path.name for path in tmp_path.glob("*.safetensors")} == {
        *("best.safetensors", "1.safetensors", "2.safetensors")
    }
    moved = algorithm.policy.denoising.trainable_parameters()
    assert any(not torch.equal(value, start[name]) for name, value in moved.items())


@pytest.mark.parametrize("build", [ddpo_sf, lambda env, **more: ddpo_is(env, value_network=True, vf_coef=0.5, **more)])
def test_saved_training_goes_on(make, tmp_path, build):
    env = make(2)
    one, two = (build(env, learning_rate=1e-2, statistics_min_count=2) for _ in range(2))
    collector = TrajectoryCollector(one, env, 4)
    collector.reset()
    collector.collect(n_episode=4)

    def updated(algorithm):
        np.random.seed(0)  # Tianshou's order of the transitions
        with policy_within_training_step(algorithm.policy):
            algorithm.update(buffer=collector.buffer, batch_size=None, repeat=1)

    updated(one)
    path = tmp_path / "weights.safetensors"
    assert save(one, path) == str(path)
    stored = {name.split(".", 1)[1] for name in load_tensors(path) if name.startswith("policy.")}
    assert stored == set(one.policy.denoising.trainable_parameters())  # not the UNet
    load(two, path)
    for algorithm in (one, two):  # moments and statistics count here
        updated(algorithm)
    assert two.rewards.statistics.state() == one.rewards.statistics.state()
    theirs = dict(one.named_parameters())
    for name, value in two.named_parameters():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0, msg=name)


def test_files_of_others(make, tmp_path):
    env = make(2)
    path = tmp_path / "weights.safetensors"
    save(ddpo_sf(env), path)
    with pytest.raises(ValueError, match="weights of another policy; check the model, trainable, lora_rank"):
        load(ddpo_sf(env, GuidedPolicy.from_env(env, lora_rank=2)), path)
    with pytest.raises(ValueError, match="weights of another policy"):
        load(ddpo_is(env, value_network=True, vf_coef=0.5), path)
    save_tensors(path, {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="no file of diffusion_gym.agents.tianshou.save"):
        load(ddpo_sf(env), path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        load(ddpo_sf(env), path)


def test_tianshous_own_ppo_takes_the_policy(make, trained):
    """Without the helpers: its settings are then the user's own."""
    env = make(2)
    policy = GuidedPolicy.from_env(env)
    algorithm = PPO(
        policy=policy,
        critic=ZeroCritic(policy.denoising.device),
        optim=AdamWFactory(OptimizerOptions(1e-3)),
        gamma=1.0,
        gae_lambda=1.0,
    )
    trained(algorithm, Collector(algorithm, TianshouVectorEnv(env), VectorReplayBuffer(2 * T, 2)), 2)


@pytest.mark.gpu
@pytest.mark.parametrize("build", [ddpo_sf, ddpo_is])
def test_training_on_a_gpu(make, exact_end_pipeline, tmp_path, build, trained):
    env = make(2, device="cuda", model=str(exact_end_pipeline))
    algorithm = build(env, GuidedPolicy.from_env(env, micro_batch_size=2), learning_rate=1e-3)
    start = {name: value.detach().clone() for name, value in algorithm.policy.denoising.trainable_parameters().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Tianshou says that envs are idle
        trained(algorithm, TrajectoryCollector(algorithm, env, 3), 3, max_epochs=2)
    moved = algorithm.policy.denoising.trainable_parameters()
    assert all(value.device.type == "cuda" for value in moved.values())
    assert any(not torch.equal(value, start[name]) for name, value in moved.items())
    load(algorithm, save(algorithm, tmp_path / "weights.safetensors"))


def test_the_page_runs(tmp_path, monkeypatch):
    """Every block of docs/tianshou.md in order, with fewer environments and steps."""
    monkeypatch.chdir(tmp_path)
    scope = run_page("tianshou.md", {"=64": "=4", "32 * T": "2 * T", "T = 10": "T = 3"})
    assert len(scope["stats"].returns) == 4 and list((tmp_path / "logs").iterdir())
    assert (tmp_path / "run.safetensors").exists() and (tmp_path / "model").is_dir()


@pytest.mark.parametrize(
    "other, message",
    [
        ({"guidance_scale": 2.0}, "guidance_scale=2.0 of the environment is 5.0 in"),
        ({"eta": 0.5}, "eta=0.5 of the environment is 1.0 in"),
        ({"sampler": "ddpm"}, "sampler='ddpm' of the environment is 'ddim' in"),
    ],
)
def test_a_file_is_not_loaded_for_another_model_or_sampler(make, exact_end_pipeline, tmp_path, other, message):
    path = save(ddpo_sf(make(2)), tmp_path / "weights.safetensors")
    for different, expected in ((other, message), ({"model": str(exact_end_pipeline)}, "another model")):
        algorithm = ddpo_sf(make(2, **different))
        before = {name: value.clone() for name, value in algorithm.policy.denoising.trainable_parameters().items()}
        with pytest.raises(ValueError, match=expected):
            load(algorithm, path)
        with pytest.raises(ValueError, match=expected):
            TrajectoryCollector(ddpo_sf(make(2)), make(2, **different), 2)
        after = algorithm.policy.denoising.trainable_parameters()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
    load(ddpo_sf(make(2)), path)
