"""Step one denoising process by hand, with the pretrained model as the policy, and save what it looks like.

python examples/step_an_environment.py --out runs/process.png
"""

import argparse
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from PIL import Image

import diffusion_gym
from diffusion_gym.agents import DenoisingPolicy

gym.register_envs(diffusion_gym)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompt", default="a red star left of a blue circle")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/process.png"))
    options = parser.parse_args()

    env = gym.make("DiffusionDenoise-Shapes-Location-v0", render_mode="rgb_array")
    policy = DenoisingPolicy.from_env(env)
    observation, info = env.reset(seed=options.seed, options={"prompt": options.prompt})
    generator = torch.Generator().manual_seed(options.seed)
    frames, done = [env.render()], False
    while not done:
        batch = {key: value[None] for key, value in observation.items()}  # the policy takes batches
        action = policy.distribution(batch).sample(generator)[0].numpy()
        observation, reward, done, _, info = env.step(action)
        frames.append(env.render())
    strip = Image.fromarray(np.concatenate(frames, axis=1))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    strip.resize((strip.width * 3, strip.height * 3), Image.Resampling.NEAREST).save(options.out)
    print(f"{info['prompt']!r}: reward {reward:.2f}, {info['reward_components']}; {options.out}")


if __name__ == "__main__":
    main()
