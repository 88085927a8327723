"""Train on several GPUs: the same result as on one, but sooner.

torchrun --nproc_per_node 2 examples/multi_gpu.py
accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no \
    examples/multi_gpu.py

Without GPUs put `ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1` before the command. docs/scale-out.md has several machines.
"""

import argparse
from pathlib import Path

import gymnasium as gym

import diffusion_gym
from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.algorithms import DDPOIS
from diffusion_gym.agents.processes import Processes
from diffusion_gym.agents.training.export import export_policy
from diffusion_gym.agents.training.trainer import Schedule, Trainer

gym.register_envs(diffusion_gym)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--env", default="DiffusionDenoise-Shapes-Color-v0")
    parser.add_argument("--queries", type=int, default=512, help="pictures to score, by all processes together")
    parser.add_argument("--samples", type=int, default=64, help="pictures behind each round of updates")
    parser.add_argument("--batch", type=int, default=16, help="sampled at once; --samples is a multiple for each GPU")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps T")
    parser.add_argument("--out", type=Path, default=Path("runs/multi-gpu"))
    options = parser.parse_args()

    processes = Processes.launched()  # a single one without a launcher
    with processes.leaving():
        envs = gym.make_vec(
            options.env,
            num_envs=options.batch,
            num_inference_steps=options.steps,
            guidance_scale=1.0,
            device=str(processes.device),  # one GPU each
        )
        config = DDPOIS.Config(learning_rate=1e-4, clip_range=1e-2, batch_size=options.samples // 2)
        agent = DDPOIS(DenoisingPolicy.from_env(envs, trainable="full"), config, processes)
        schedule = Schedule(total_reward_queries=options.queries, samples_per_iteration=options.samples)
        done = Trainer(envs, agent, options.out, schedule).run()  # the first process writes the run folder
        if processes.main:
            print(f"{done.iteration} iterations by {processes.count} processes on {processes.device.type}")
            print(f"with diffusers: {export_policy(agent.policy, options.out / 'model')}")


if __name__ == "__main__":
    main()
