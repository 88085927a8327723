"""Train a diffusion model of your own: any network, wrapped in an object with the `DenoisingModel` protocol.

Here a small pixel model, pre-trained in this script on pictures of discs; DDPO_IS then makes its pictures brighter.

python examples/custom_model.py --queries 1280
"""

import argparse
from pathlib import Path

import gymnasium as gym
import torch
from torch import nn
from torch.nn.functional import mse_loss, silu

import diffusion_gym
from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.algorithms import DDPOIS
from diffusion_gym.agents.training.evaluation import EVALUATION_SEED, compare
from diffusion_gym.agents.training.trainer import Schedule, Trainer
from diffusion_gym.models import DenoisingModel
from diffusion_gym.scheduling import NoiseSchedule, ddim_table

gym.register_envs(diffusion_gym)
ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-3, 0.15, 100, dtype=torch.float64), 0)


class Network(nn.Module):
    """A UNet of one level."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 32))
        self.enter, self.leave = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(64, 3, 3, padding=1)
        self.down, self.up = nn.Conv2d(32, 32, 4, 2, 1), nn.ConvTranspose2d(32, 32, 4, 2, 1)
        self.middle = nn.Conv2d(32, 32, 5, padding=2)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """From x_t `(N, 3, 16, 16)` and t `(N,)` to x_0."""
        high = silu(self.enter(x) + self.time(t[:, None] / 100)[..., None, None])
        low = silu(self.down(high))
        return self.leave(torch.cat([high, silu(self.up(low + silu(self.middle(low))))], 1))


class Discs(DenoisingModel):
    """The protocol, as far as an unconditional model needs it; with prompts add `tokenize`, `embed`, `vocab_size`."""

    name, default_prompts, prompt_length = "discs", "unconditional", 0
    device, dtype, latent_shape, num_train_timesteps = torch.device("cpu"), torch.float32, (3, 16, 16), 100
    sampler_defaults = {"num_inference_steps": 10, "guidance_scale": 1.0}

    def __init__(self, network: nn.Module) -> None:
        self.unet = network.requires_grad_(False).eval()

    def step_table(self, config):
        """From noise to picture in T steps of equal length; `ddpm_table` and `flow_table` are for other samplers."""
        stride = self.num_train_timesteps // config.num_inference_steps
        timesteps = torch.arange(1, config.num_inference_steps + 1).flip(0) * stride - 1
        schedule = NoiseSchedule(ALPHA_BAR, final_alpha_bar=1.0, prediction="sample")
        return ddim_table(schedule, timesteps, timesteps - stride, eta=config.eta, sigma_min=config.sigma_min)

    def predict(self, unet, latents, timesteps, embeddings):
        """What `unet`, this model's or the trained copy, says."""
        return unet(latents, timesteps)

    def decode(self, latents):
        """Pixels in [-1, 1] to pictures in [0, 1]."""
        return (latents / 2 + 0.5).clamp(0, 1)


def pretrain(network: nn.Module, steps: int) -> None:
    """`steps` updates of denoising, on discs of any color, place and size on a dark ground."""
    axis = torch.linspace(-1, 1, 16)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for _ in range(steps):
        x, y, radius = torch.rand(3, 64, 1, 1, 1)
        inside = (axis - x + 0.5) ** 2 + (axis[:, None] - y + 0.5) ** 2 < (0.3 + 0.3 * radius) ** 2
        x0 = torch.where(inside, 1.6 * torch.rand(64, 3, 1, 1) - 0.8, -0.8)  # pictures in [-1, 1]
        t = torch.randint(100, (64,))
        signal = ALPHA_BAR[t].float().view(-1, 1, 1, 1)
        noisy = signal.sqrt() * x0 + (1 - signal).sqrt() * torch.randn_like(x0)
        optimizer.zero_grad()
        mse_loss(network(noisy, t), x0).backward()
        optimizer.step()


def brightness(images, prompts, metadata):
    """The reward."""
    return images.mean((1, 2, 3))


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pretraining", type=int, default=500, help="updates")
    parser.add_argument("--queries", type=int, default=1280)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("runs/custom-model"))
    options = parser.parse_args()

    torch.manual_seed(0)
    network = Network()
    pretrain(network, options.pretraining)
    envs = gym.make_vec("DiffusionDenoise-v0", num_envs=options.batch, model=Discs(network), reward=brightness)
    policy = DenoisingPolicy.from_env(envs, trainable="full")  # "lora" adapts layers named to_q, to_k, to_v, to_out.0
    agent = DDPOIS(policy, DDPOIS.Config(learning_rate=3e-4, clip_range=1e-2, batch_size=32, micro_batch_size=256))
    schedule = Schedule(total_reward_queries=options.queries, samples_per_iteration=options.batch)
    Trainer(envs, agent, options.out, schedule).run()

    result = compare(envs, policy, 2 * options.batch, EVALUATION_SEED).summary()  # from the same fresh noise
    print(f"mean reward {result['base_reward_mean']:.3f} before, {result['reward_mean']:.3f} after")


if __name__ == "__main__":
    main()
