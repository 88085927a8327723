"""The workload with diffusion_gym's DDPO_IS.

python benchmarks/peers/native.py PIPELINE [--lora] [--micro-batch 16]
"""

from __future__ import annotations

from typing import Any

from workload import Meter, Workload, main


def measure(workload: Workload) -> dict[str, Any]:
    """Time diffusion_gym's DDPO_IS."""
    workload.prepare()
    import gymnasium as gym
    import numpy as np
    from gymnasium.vector import AutoresetMode

    import diffusion_gym
    from diffusion_gym.agents import DenoisingPolicy
    from diffusion_gym.agents.algorithms import DDPOIS
    from diffusion_gym.agents.training.allocator import keep_freed_memory

    gym.register_envs(diffusion_gym)
    keep_freed_memory()  # as the commands do
    meter = Meter(workload)
    trainable = "lora" if workload.lora else "full"
    env = gym.make_vec(
        "DiffusionDenoise-v0",
        num_envs=workload.sample_batch,
        model=workload.pipeline,
        reward="Compressibility",
        prompts="common-animals",
        num_inference_steps=workload.steps,
        guidance_scale=workload.guidance,
        eta=workload.eta,
        device=workload.device,
        dtype=str(workload.dtype).removeprefix("torch.") if workload.lora else "float32",
        autoreset_mode=AutoresetMode.DISABLED,
    )
    base: Any = env.unwrapped
    base.model.decode, base.reward = meter.part("decode", base.model.decode), meter.part("reward", base.reward)
    policy = DenoisingPolicy.from_env(env, trainable=trainable)
    options = DDPOIS.Config(
        trainable=trainable,
        batch_size=workload.trajectories,
        micro_batch_size=workload.passed_at_once,
        learning_rate=workload.lr,
        clip_range=workload.clip,
        mixed_precision=workload.precision,
    )
    agent = DDPOIS(policy, options)
    rng = np.random.default_rng(workload.seed)
    for iteration in range(workload.warmup + workload.epochs):
        meter.next_iteration()
        with meter.phase("rollout"):
            trajectories = agent.sample(env, workload.samples, (workload.seed, iteration))
        with meter.phase("train"):
            metrics = agent.update(trajectories, rng)
    found = {"updates": metrics["updates"], "micro_batch": agent.optimizer.micro_batch_size}
    return meter.line("diffusion_gym", sum(parameter.numel() for parameter in agent.parameters), **found)


if __name__ == "__main__":
    main(measure)
