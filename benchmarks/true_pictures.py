"""What as many true pictures teach as an agent gets reward queries: pretraining's loss on drawn scenes of the prompts.

An agent on all 1,800 location prompts sees pictures that are right more often than not wrong, or weighs those that are
right; none of them is better than a scene that was drawn as its caption says. So what the denoising loss makes of
drawn scenes bounds what regression on good pictures can (RWR, sparse RWR), and is a yardstick for the others: success
on the prompts that neither has seen.

    python benchmarks/true_pictures.py --pictures 19200
    python benchmarks/true_pictures.py --pictures 19200 --noisy-share 0 --largest-weight 1    # the plain loss

As in the last phases of the model's own training, a share of the timesteps is drawn from the noisy end, where things
find their places, and weighted up by 1 / SNR; weights are averaged over the updates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, cast

import numpy as np
import torch
import tyro
from torch import nn

from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.averaging import WeightAverage
from diffusion_gym.config import SamplerConfig
from diffusion_gym.images import to_float
from diffusion_gym.models import load_model
from diffusion_gym.models.latent import LatentModel
from diffusion_gym.prompts.shapes import is_held_out
from diffusion_gym.shapes.captions import Caption, all_captions
from diffusion_gym.shapes.scenes import render
from tools.shapes.denoiser import NOISY_FROM
from tools.shapes.measure import success_rate
from tools.shapes.training import warm_cosine

_WARMUP: Final = 20


@dataclass(frozen=True)
class Options:
    """Train the pretrained model on true pictures of location's training prompts; measured on the held-out ones."""

    pictures: int = 19_200
    """True pictures, each seen once."""
    batch: int = 64
    """Pictures of an update."""
    lr: float = 2e-4
    """Peak learning rate, after a short warm-up; falls as a cosine."""
    noisy_share: float = 0.5
    """Share of the timesteps that is drawn from the noisy end."""
    largest_weight: float = 20.0
    """The loss is weighted by 1 / SNR, clamped to [1, this]."""
    ema: float = 0.99
    """Decay of the average of the weights that is measured."""
    samples: int = 512
    """Pictures of a measurement."""
    seed: int = 0
    """Of scenes, noise and measurement."""


def main(options: Options) -> None:
    """Print held-out strict success before and after."""
    torch.set_num_threads(1)
    sampler = SamplerConfig(num_inference_steps=10, guidance_scale=1.0, eta=1.0)
    policy = DenoisingPolicy(load_model("Shapes", "cpu", "float32"), sampler, trainable="full")
    seen = [caption for caption in all_captions("location") if not is_held_out(caption)]
    unseen = [caption for caption in all_captions("location") if is_held_out(caption)]
    print(f"before: {success(policy, unseen, options)}", flush=True)
    with train(policy, seen, options).applied():
        print(f"after {options.pictures:,} true pictures: {success(policy, unseen, options)}")


def success(policy: DenoisingPolicy, captions: list[Caption], options: Options) -> str:
    """Strict success on random captions, with its interval; the same noise whenever it is asked for."""
    rng, generator = np.random.default_rng(options.seed), torch.Generator().manual_seed(options.seed)
    rate, low, high = success_rate(policy, captions, options.samples, rng, generator)
    return f"{rate:.3f} ({low:.3f} to {high:.3f})"


def train(policy: DenoisingPolicy, captions: list[Caption], options: Options) -> WeightAverage:
    """Train the policy's network; the average of its weights."""
    model = cast(LatentModel, policy.model)
    abar, weights = model.pipe.scheduler.alphas_cumprod.float(), list(policy.trainable_parameters().values())
    average, optimizer = WeightAverage(weights, options.ema), torch.optim.AdamW(weights, lr=options.lr)
    rng, updates = np.random.default_rng(options.seed), options.pictures // options.batch
    torch.manual_seed(options.seed)
    for update in range(updates):
        chosen = [captions[i] for i in rng.integers(len(captions), size=options.batch)]
        clean = model.encode(to_float(torch.from_numpy(np.stack([render(caption, rng) for caption in chosen]))))
        text = model.embed(model.tokenize([str(caption) for caption in chosen]))
        t = torch.randint(len(abar), (options.batch,))
        noisy = torch.rand(options.batch) < options.noisy_share
        t = torch.where(noisy, torch.randint(NOISY_FROM, len(abar), (options.batch,)), t)
        signal, noise = abar[t].view(-1, 1, 1, 1), torch.randn_like(clean)
        state = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        error = model.predict(policy.unet, state, t, text) - noise
        loss = (((1 - signal) / signal).clamp(1, options.largest_weight) * error.square()).mean()
        optimizer.param_groups[0]["lr"] = options.lr * warm_cosine(update, updates, _WARMUP)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        average.follow(min(options.ema, (1 + update) / (10 + update)))
    return average


if __name__ == "__main__":
    main(tyro.cli(Options))
