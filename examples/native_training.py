"""Train with the package's own agent and trainer, go on later, evaluate on fresh noise, export for diffusers.

python examples/native_training.py --queries 1280
python examples/native_training.py --queries 2560 --resume
"""

import argparse
from pathlib import Path

import gymnasium as gym

import diffusion_gym
from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.algorithms import DDPOIS
from diffusion_gym.agents.training.evaluation import EVALUATION_SEED, compare, save_pictures, summary_text
from diffusion_gym.agents.training.export import export_policy
from diffusion_gym.agents.training.trainer import Schedule, Trainer

gym.register_envs(diffusion_gym)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--env", default="DiffusionDenoise-Shapes-Location-v0")
    parser.add_argument("--queries", type=int, default=1280, help="pictures to score before the run ends")
    parser.add_argument("--batch", type=int, default=128, help="pictures sampled at once")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps T")
    parser.add_argument("--samples", type=int, default=256, help="pictures of each model in the evaluation")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("--out", type=Path, default=Path("runs/native"))
    options = parser.parse_args()

    def make(num_envs, prompts="shapes-demo"):
        return gym.make_vec(
            options.env,
            num_envs=num_envs,
            prompts=prompts,
            num_inference_steps=options.steps,
            guidance_scale=1.0,
            reward_kwargs={"strict": True},  # 1 where the whole caption holds, else 0
        )

    envs = make(options.batch)
    policy = DenoisingPolicy.from_env(envs, trainable="full")  # "lora" for a large model
    config = DDPOIS.Config(
        learning_rate=2e-4,
        clip_range=1e-2,  # for latents of 256 dimensions; 1e-4 goes with Stable Diffusion's 16,384
        batch_size=max(1, options.batch // 4),  # four updates an iteration
        micro_batch_size=128,
        trained_steps=(0.0, 0.5),  # the noisier half, which settles the layout
    )
    schedule = Schedule(
        total_reward_queries=options.queries,
        samples_per_iteration=options.batch,
        checkpoint_every=1,
        pictures_every=2,
    )
    trainer = Trainer(envs, DDPOIS(policy, config), options.out, schedule, seed=0, pictures_env=make(16))
    done = trainer.run(resume=options.resume)  # Ctrl-C ends it after the iteration
    print(f"{done.iteration} iterations, {done.reward_queries} reward queries")

    # Both models from the same noise, which training never sees; then the same for prompts that it never saw.
    comparison = compare(envs, policy, options.samples, EVALUATION_SEED)
    save_pictures(options.out / "images", comparison)
    held_out = make(options.batch, envs.unwrapped.prompt_set.held_out_set())
    other = compare(held_out, policy, options.samples, EVALUATION_SEED)
    print(summary_text({**comparison.summary(), "held_out": other.summary()}))
    print(f"with diffusers: {export_policy(policy, options.out / 'model')}")


if __name__ == "__main__":
    main()
