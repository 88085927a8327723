"""Fine-tune the embedded model with Stable-Baselines3's own PPO, set up as DDPO.

pip install 'diffusion-denoise-gym[sb3]'
python examples/sb3_ddpo.py --iterations 20
"""

import argparse
from pathlib import Path

import gymnasium as gym
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecMonitor

import diffusion_gym
from diffusion_gym.agents.sb3 import SB3VecEnv, ddpo_is
from diffusion_gym.agents.training.export import export_policy

gym.register_envs(diffusion_gym)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--env", default="DiffusionDenoise-Shapes-Location-v0")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--num-envs", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="denoising steps T")
    parser.add_argument("--out", type=Path, default=Path("runs/sb3"))
    options = parser.parse_args()

    make = {
        "num_envs": options.num_envs,
        "num_inference_steps": options.steps,
        "guidance_scale": 1.0,
        "reward_kwargs": {"strict": True},  # 1 where the whole caption holds, else 0
        "prompts": ["a red star left of a blue circle"],
    }
    model = ddpo_is(
        gym.make_vec(options.env, **make),
        learning_rate=1e-4,
        clip_range=1e-2,  # for latents of 256 dimensions; 1e-4 goes with Stable Diffusion's 16,384
        batch_size=options.num_envs * options.steps // 2,  # two updates an iteration
        policy_kwargs={"trainable": "full", "micro_batch_size": 128},  # "lora" for a large model
        tensorboard_log=str(options.out / "logs"),
        verbose=1,
        seed=0,
    )
    evaluated = VecMonitor(SB3VecEnv(gym.make_vec(options.env, **make)))

    def score() -> float:
        evaluated.seed(1)  # the same noise each time
        return evaluate_policy(model, evaluated, options.num_envs, deterministic=False)[0]

    before = score()
    model.learn(options.iterations * options.num_envs * options.steps)
    print(f"mean reward {before:.3f} before, {score():.3f} after")
    model.policy.save(options.out / "policy.safetensors")
    print(f"with diffusers: {export_policy(model.policy.actor, options.out / 'model')}")


if __name__ == "__main__":
    main()
