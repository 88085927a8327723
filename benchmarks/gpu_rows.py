"""One row of a GPU's tables: an iteration of DDPO_IS on a pipeline of random weights, its speed, memory and ratio.

Random weights do not change the speed. `gpu.py` runs the rows. A variant lets cuDNN choose by trying (`autotuned`),
lays the trained network out in channels-last format, or compiles it by torch.compile (with CUDA graphs:
`reduce-overhead`): its ratio to the plain row says whether that pays on a card.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from matrix_rate import matrix_rate, operations, synchronize

Variant = Literal["plain", "autotuned", "channels-last", "compiled", "compiled-graphs"]


@dataclass(frozen=True)
class Row:
    """One measurement: an iteration of DDPO_IS after one of `batch` pictures to warm up."""

    model: str
    """A pipeline directory."""
    trainable: Literal["lora", "full"] = "lora"
    """What trains."""
    batch: int = 8
    """Pictures sampled at once, pictures behind an update, and transitions trained on at once."""
    samples: int = 16
    """Pictures of the iteration, a multiple of `batch`."""
    steps: int = 50
    """Denoising steps T."""
    guidance: float = 5.0
    """Guidance scale, of rollouts and of training."""
    dtype: str = "bfloat16"
    """Type of the frozen weights; full training keeps float32 weights and computes in bfloat16."""
    device: str = "cuda"
    """Device."""
    variant: Variant = "plain"
    """How the network that trains is laid out and run."""


def measure(row: Row) -> dict[str, Any]:
    """Seconds of a rollout and of an update, peak memory, and how far the ratios of the fresh rollout are from 1."""
    from diffusion_gym.agents.rollout import collect_many

    _forget(row.device)
    torch.manual_seed(0)
    env, agent = _env_and_agent(row)
    policy = agent.policy
    observation, _ = env.reset(seed=0)
    with torch.no_grad():
        forward = operations(lambda: policy.distribution(observation)) / row.batch
    both = operations(lambda: policy(observation, observation["latents"]).sum().backward()) / row.batch
    _apply(row.variant, policy.unet)
    warming_up = collect_many(env, policy, row.batch, (0, 0))
    deviation = ratio_deviation(policy, warming_up, row.batch)
    agent.update(warming_up, np.random.default_rng(0))
    started = _now(row.device)
    trajectories = collect_many(env, policy, row.samples, (0, 1))
    sampled = _now(row.device)
    agent.update(trajectories, np.random.default_rng(1))
    rollout, update = sampled - started, _now(row.device) - sampled
    transitions = row.samples * len(policy.stochastic_steps)
    rate = matrix_rate(row.device, getattr(torch, row.dtype))
    cuda = row.device.startswith("cuda")
    return {
        "rollout_seconds": rollout,
        "update_seconds": update,
        "rollout_images_per_second": row.samples / rollout,
        "update_transitions_per_second": transitions / update,
        "images_per_second": row.samples / (rollout + update),
        "matrix_rate": rate,
        "rollout_share": forward * row.samples * row.steps / rollout / rate,
        "update_share": both * transitions / update / rate,
        "ratio_deviation": deviation,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
        "card": torch.cuda.get_device_name() if cuda else "CPU",
        "torch": torch.__version__,
        "picture": list(env.unwrapped.model.image_shape),
    }


@torch.enable_grad()
def ratio_deviation(policy: Any, trajectories: Any, batch: int, passes: int = 4) -> float:
    """The largest |ratio - 1| of some stored transitions, scored as training scores them, in mixed micro-batches.

    Args:
        policy: the policy that sampled, unchanged since.
        trajectories: what it sampled.
        batch: transitions in a pass.
        passes: how many passes.
    """
    steps = policy.stochastic_steps.to(trajectories.latents.device)
    pairs = torch.cartesian_prod(torch.arange(len(trajectories), device=steps.device), steps)
    chosen = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).to(pairs.device)]
    deviations = []
    for part in chosen[: batch * passes].split(batch):
        samples, at = part.unbind(1)
        new = policy(trajectories.states(samples, at), trajectories.actions(samples, at)).detach()
        deviations.append((new - trajectories.log_probs[at, samples]).exp().sub(1).abs().max())
    return float(torch.stack(deviations).max())


def _now(device: str) -> float:
    synchronize(device)
    return time.perf_counter()


def _forget(device: str) -> None:
    """What earlier rows of this process held is not in this one's peak."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _env_and_agent(row: Row) -> tuple[Any, Any]:
    import gymnasium as gym
    from gymnasium.vector import AutoresetMode

    import diffusion_gym
    from diffusion_gym.agents import DenoisingPolicy
    from diffusion_gym.agents.algorithms import DDPOIS

    gym.register_envs(diffusion_gym)
    full = row.trainable == "full"
    env = gym.make_vec(
        "DiffusionDenoise-v0",
        num_envs=row.batch,
        model=row.model,
        reward="Compressibility",
        prompts="common-animals",
        num_inference_steps=row.steps,
        guidance_scale=row.guidance,
        device=row.device,
        dtype="float32" if full else row.dtype,
        autoreset_mode=AutoresetMode.DISABLED,
    )
    options = DDPOIS.Config(
        trainable=row.trainable,
        batch_size=row.batch,
        micro_batch_size=row.batch,
        mixed_precision="bf16" if row.dtype == "bfloat16" else "no",
        learning_rate=1e-5 if full else 3e-4,
    )
    policy = DenoisingPolicy.from_env(env, trainable=row.trainable)
    return env, DDPOIS(policy, options)


def _apply(variant: Variant, unet: torch.nn.Module) -> None:
    torch.backends.cudnn.benchmark = variant == "autotuned"
    if "channels-last" in variant:
        unet.to(memory_format=torch.channels_last)
    if "compiled" in variant:
        unet.compile(mode="reduce-overhead" if "graphs" in variant else None)
