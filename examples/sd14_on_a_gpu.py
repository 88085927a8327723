"""Fine-tune Stable Diffusion 1.4 with DDPO_IS, as in the DDPO paper, on one GPU.

diffusion-gym download CompVis/stable-diffusion-v1-4
python examples/sd14_on_a_gpu.py --reward Compressibility --out runs/sd14-compressibility

The whole program runs on a laptop as well, on a tiny model with random weights, to see that it works:

python -m diffusion_gym.testing.random_pipeline runs/tiny-pipeline
python examples/sd14_on_a_gpu.py --model runs/tiny-pipeline --queries 16 --batch 8 --steps 4 --out runs/tiny
"""

import argparse
from pathlib import Path

import gymnasium as gym
import torch

import diffusion_gym
from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.algorithms import DDPOIS
from diffusion_gym.agents.training.export import export_policy
from diffusion_gym.agents.training.trainer import Schedule, Trainer

gym.register_envs(diffusion_gym)

# The paper's prompts for each reward (section 2.1); docs/prompts.md lists more sets.
PROMPTS = {
    "Compressibility": "imagenet-animals",
    "Incompressibility": "imagenet-animals",
    "Aesthetic": "common-animals",
}


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--reward", choices=PROMPTS, default="Compressibility")
    parser.add_argument("--model", default="SD14", help="SD14, a hub id, or a diffusers directory")
    parser.add_argument("--queries", type=int, default=50_000, help="pictures to score before the run ends")
    parser.add_argument("--samples", type=int, default=256, help="pictures behind each round of updates")
    parser.add_argument("--batch", type=int, default=8, help="pictures sampled at once; what fits in memory")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps T")
    parser.add_argument("--out", type=Path, default=Path("runs/sd14"))
    options = parser.parse_args()
    cuda = torch.cuda.is_available()

    envs = gym.make_vec(
        "DiffusionDenoise-v0",
        num_envs=options.batch,
        model=options.model,
        reward=options.reward,
        prompts=PROMPTS[options.reward],
        num_inference_steps=options.steps,
        guidance_scale=5.0,
        eta=1.0,  # the paper's "ancestral" sampler
        device="cuda" if cuda else "cpu",
    )
    samples = min(options.samples, options.queries)
    agent = DDPOIS(
        DenoisingPolicy.from_env(envs, trainable="lora", lora_rank=4),  # "full" and 1e-5 for the paper's own runs
        DDPOIS.Config(
            learning_rate=3e-4,  # what adapters need; full weights take 1e-5
            clip_range=1e-4,
            batch_size=max(1, samples // 4),  # four updates a round
            mixed_precision="bf16" if cuda else "no",
            gradient_checkpointing=cuda,  # takes longer, and much less memory
        ),
    )
    schedule = Schedule(total_reward_queries=options.queries, samples_per_iteration=samples)
    done = Trainer(envs, agent, options.out, schedule).run()
    print(f"{done.iteration} iterations; metrics in {options.out / 'metrics.jsonl'}")
    print(f"with diffusers: {export_policy(agent.policy, options.out / 'lora')}")


if __name__ == "__main__":
    main()
