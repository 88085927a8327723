"""Fine-tune the embedded model with Tianshou's PPO and trainer, set up as DDPO.

pip install 'diffusion-denoise-gym[tianshou]'
python examples/tianshou_ddpo.py --iterations 20
"""

import argparse
from pathlib import Path

import gymnasium as gym
import torch
from tianshou.trainer import OnPolicyTrainerParams
from tianshou.utils import TensorboardLogger
from torch.utils.tensorboard import SummaryWriter

import diffusion_gym
from diffusion_gym.agents.tianshou import GuidedPolicy, TrajectoryCollector, ddpo_is, save
from diffusion_gym.agents.training.export import export_policy

gym.register_envs(diffusion_gym)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--env", default="DiffusionDenoise-Shapes-Location-v0")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--num-envs", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="denoising steps T")
    parser.add_argument("--out", type=Path, default=Path("runs/tianshou"))
    options = parser.parse_args()

    torch.manual_seed(0)
    make = {"num_envs": options.num_envs, "num_inference_steps": options.steps, "prompts": ["a star above a triangle"]}
    envs, test_envs = (gym.make_vec(options.env, autoreset_mode="Disabled", **make) for _ in range(2))
    algorithm = ddpo_is(
        envs,
        GuidedPolicy.from_env(envs, trainable="lora", micro_batch_size=64),
        learning_rate=1e-3,
        eps_clip=1e-2,  # for latents of 256 dimensions; 1e-4 goes with Stable Diffusion's 16,384
    )
    rollout = options.num_envs * options.steps
    info = algorithm.run_training(
        OnPolicyTrainerParams(
            training_collector=TrajectoryCollector(algorithm, envs, options.num_envs),
            collection_step_num_env_steps=None,
            collection_step_num_episodes=options.num_envs,
            batch_size=rollout // 2,  # two updates an iteration
            epoch_num_steps=rollout,  # an epoch is one iteration
            max_epochs=options.iterations,
            test_collector=TrajectoryCollector(algorithm, test_envs, options.num_envs),
            test_step_num_episodes=options.num_envs,
            save_best_fn=lambda best: save(best, options.out / "best.safetensors"),
            logger=TensorboardLogger(SummaryWriter(str(options.out / "logs")), training_interval=1, update_interval=1),
            show_progress=False,
        )
    )
    print(f"best mean reward {info.best_reward:.3f}")
    print(f"with diffusers: {export_policy(algorithm.policy.denoising, options.out / 'model')}")


if __name__ == "__main__":
    main()
