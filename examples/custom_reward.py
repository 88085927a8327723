"""Train on a reward of your own: any callable that gives one number a picture.

python examples/custom_reward.py --queries 1280
"""

import argparse
from pathlib import Path

import gymnasium as gym

import diffusion_gym
from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.algorithms import DDPOIS
from diffusion_gym.agents.training.trainer import Schedule, Trainer
from diffusion_gym.rewards import RewardOutput

gym.register_envs(diffusion_gym)


def warmth(images, prompts, metadata):
    """More red than blue: images are (N, 3, H, W) in [0, 1]; components show up in the metrics."""
    red, blue = images[:, 0].mean((1, 2)), images[:, 2].mean((1, 2))
    return RewardOutput(red - blue, {"red": red, "blue": blue})


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--queries", type=int, default=1280)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("runs/custom-reward"))
    options = parser.parse_args()

    envs = gym.make_vec(
        "DiffusionDenoise-v0",
        num_envs=options.batch,
        model="Shapes",
        reward=warmth,
        prompts=["two circles", "three stars"],
        num_inference_steps=10,
        guidance_scale=1.0,
    )
    policy = DenoisingPolicy.from_env(envs, trainable="full")
    agent = DDPOIS(policy, DDPOIS.Config(learning_rate=1e-4, clip_range=1e-2, batch_size=32, micro_batch_size=128))
    schedule = Schedule(total_reward_queries=options.queries, samples_per_iteration=options.batch)
    done = Trainer(envs, agent, options.out, schedule).run()
    print(f"{done.iteration} iterations; metrics in {options.out / 'metrics.jsonl'}")


if __name__ == "__main__":
    main()
