"""Fine-tune Stable Diffusion 1.4 to follow its prompts, as a vision-language model behind a server judges it.

vllm serve llava-hf/llava-1.5-7b-hf --port 8000  # on another GPU or machine; any OpenAI-compatible server will do
python examples/vlm_reward.py --server http://127.0.0.1:8000/v1 --out runs/alignment

`--mode count` asks how many animals there are, and needs no BERTScore. docs/prompt-alignment.md has all options, and
tiny models with random weights for a laptop: `--model`, `--bertscore-model`.
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


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--server", required=True, help="base URL, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--vlm-model", help="its model; by default the first that it lists")
    parser.add_argument("--mode", choices=["describe", "count"], default="describe")
    parser.add_argument("--bertscore-model", default="microsoft/deberta-xlarge-mnli", help="judges descriptions")
    parser.add_argument("--bertscore-layers", type=int, help="by default the number tuned for that model")
    parser.add_argument("--model", default="SD14", help="SD14, a hub id, or a diffusers directory")
    parser.add_argument("--queries", type=int, default=50_000, help="pictures to score before the run ends")
    parser.add_argument("--samples", type=int, default=256, help="pictures behind each round of updates")
    parser.add_argument("--batch", type=int, default=8, help="pictures sampled at once; what fits in memory")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps T")
    parser.add_argument("--out", type=Path, default=Path("runs/alignment"))
    options = parser.parse_args()
    cuda = torch.cuda.is_available()

    envs = gym.make_vec(
        "DiffusionDenoise-v0",
        num_envs=options.batch,
        model=options.model,
        reward="PromptAlignment",  # its prompts: animals doing things, or numbers of animals
        reward_kwargs={
            "vlm": options.server,
            "vlm_model": options.vlm_model,
            "mode": options.mode,
            "bertscore_model": options.bertscore_model,
            "bertscore_layers": options.bertscore_layers,
            "cache": str(options.out / "answers"),
        },
        autoreset_mode="Disabled",  # the server answers while the next batch is sampled
        num_inference_steps=options.steps,
        guidance_scale=5.0,
        eta=1.0,
        device="cuda" if cuda else "cpu",
    )
    policy = DenoisingPolicy.from_env(envs, trainable="lora", lora_rank=4)
    config = DDPOIS.Config(
        learning_rate=3e-4,
        clip_range=1e-4,
        batch_size=max(1, options.samples // 4),
        mixed_precision="bf16" if cuda else "no",
        gradient_checkpointing=cuda,
    )
    schedule = Schedule(total_reward_queries=options.queries, samples_per_iteration=options.samples)
    done = Trainer(envs, DDPOIS(policy, config), options.out, schedule).run()
    print(f"{done.iteration} iterations; the model's last words: {envs.unwrapped.reward.descriptions[-1]!r}")
    print(f"with diffusers: {export_policy(policy, options.out / 'lora')}")


if __name__ == "__main__":
    main()
