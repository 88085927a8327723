"""Seconds of one DDPO_IS iteration on the embedded model, beside the bare UNet work that it cannot avoid.

Run `make bench`. Prints one table; every ratio is within one run of this script.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode

import diffusion_gym
from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.algorithms import DDPOIS
from diffusion_gym.agents.rollout import collect_many

gym.register_envs(diffusion_gym)


@dataclass(frozen=True)
class Options:
    """Time one iteration of DDPO_IS."""

    samples: int = 64
    """Trajectories an iteration."""
    steps: int = 20
    """Denoising steps T."""
    threads: int = 2
    """CPU threads."""
    rounds: int = 2
    """Rounds; the fastest of each part counts."""
    device: str = "cpu"
    """Device."""


def fastest(work: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest of `rounds` calls, after one to warm up."""
    work()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def measure(options: Options, guidance: float) -> str:
    """One row of the table."""
    env = gym.make_vec(
        "DiffusionDenoise-Shapes-Composition-v0",
        num_envs=options.samples,
        num_inference_steps=options.steps,
        guidance_scale=guidance,
        autoreset_mode=AutoresetMode.DISABLED,
        device=options.device,
    )
    policy = DenoisingPolicy.from_env(env, trainable="full")
    agent = DDPOIS(policy, DDPOIS.Config(batch_size=32, micro_batch_size=128, clip_range=1e-2, learning_rate=1e-5))
    trajectories = collect_many(env, policy, options.samples, (0, 0))
    rollout = fastest(lambda: collect_many(env, policy, options.samples, (0, 0)), options.rounds)
    update = fastest(lambda: agent.update(trajectories, np.random.default_rng(0)), options.rounds)
    floor_rollout, floor_update = floor(options, policy, 1 if guidance == 1 else 2)
    floor_rollout, floor_update = (fastest(part, options.rounds) for part in (floor_rollout, floor_update))
    return (
        f"| {guidance:g} | {rollout:.2f} | {rollout / floor_rollout:.2f} | {update:.2f} | {update / floor_update:.2f} "
        f"| {rollout + update:.2f} |"
    )


def floor(options: Options, policy: DenoisingPolicy, branches: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """The bare UNet forwards of a rollout, and forwards and backwards of an update, at the same batch sizes."""
    model, unet = policy.model, policy.unet

    def inputs(number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        number *= branches
        embeddings = model.embed(model.tokenize(["a red circle"])).expand(number, -1, -1)
        times = torch.full((number,), 500, device=model.device)
        return torch.randn(number, *model.latent_shape, device=model.device), times, embeddings

    def forwards() -> None:
        batch = inputs(options.samples)
        with torch.no_grad():
            for _ in range(options.steps):
                model.predict(unet, *batch)

    def backwards() -> None:
        batch = inputs(128)
        for _ in range(options.samples * options.steps // 128):
            model.predict(unet, *batch).square().mean().backward()
        unet.zero_grad()

    return forwards, backwards


def main(options: Options) -> None:
    """Print the table."""
    torch.set_num_threads(options.threads)
    print(f"{options.samples} samples, T = {options.steps}, {options.threads} threads, {options.device}")
    print("| guidance | rollout, s | / bare UNet | update, s | / bare UNet | iteration, s |")
    print("|---" * 6 + "|")
    for guidance in (1.0, 3.0):
        print(measure(options, guidance), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
