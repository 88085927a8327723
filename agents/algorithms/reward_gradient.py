"""The gradient of the reward itself, through picture and denoising steps: DRaFT-K, AlignProp and ReFL as one agent.

For rewards that say `differentiable = True`. The last steps are sampled anew with gradient from a state of the rollout:
the last K of them (DRaFT-K, arXiv:2309.17400), a number drawn anew for each update (AlignProp,
arXiv:2310.03739), or none: the picture is the estimate of x_0 at one random step (ReFL, arXiv:2304.05977,
algorithm 1). Every picture is scored twice, in the rollout and with gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch.utils.checkpoint import checkpoint

from diffusion_gym.agents.algorithms.base import AGENTS, Agent, AgentConfig
from diffusion_gym.agents.algorithms.metrics import Metrics, update_metrics
from diffusion_gym.agents.finite import require, require_choice
from diffusion_gym.agents.optimization import Losses
from diffusion_gym.agents.renoising import fresh_noise
from diffusion_gym.agents.rollout import Trajectories
from diffusion_gym.devices import to_device
from diffusion_gym.envs.vector import DenoisingVectorEnv
from diffusion_gym.rewards.base import reward_name
from diffusion_gym.rewards.differentiable import differentiable_scores, is_differentiable

GradientForm = Literal["draft", "alignprop", "refl"]


@dataclass(frozen=True)
class RewardGradientConfig(AgentConfig):
    """Options of the reward's gradient."""

    form: GradientForm = "draft"
    """Which steps have a gradient: the last `truncation` ones (DRaFT-K), as many last ones as each update draws, from 1
    to T (AlignProp), or the estimate of x_0 alone at a step drawn from `trained_steps` (ReFL, late ones)."""
    truncation: int = 1
    """K of DRaFT-K."""
    batch_size: int = 64
    """Pictures behind one gradient update."""
    reward_limit: float | None = None
    """Rewards above it have no gradient (ReFL's rectifier); None for no limit."""
    checkpoint_chain: bool = True
    """Recompute each denoising step in the backward pass, so that memory hardly grows with K."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self, "form", GradientForm)
        require(self, "larger than 0", "truncation", "batch_size")
        if self.reward_floors:
            raise ValueError(
                f"reward_floors={self.reward_floors!r} is for agents that learn from scores, not from the reward's "
                "gradient; leave it out, or take another agent"
            )


@AGENTS.register("reward_gradient")
class RewardGradient(Agent):
    """Gradient steps on the reward of pictures whose last denoising steps are differentiated."""

    Config: ClassVar[type[AgentConfig]] = RewardGradientConfig
    config: RewardGradientConfig
    needs_stochastic_steps: ClassVar[bool] = False
    _env: DenoisingVectorEnv

    def check_env(self, env: VectorEnv[Any, Any, Any]) -> None:
        """Refuse a reward without gradient, and a K that is longer than the trajectory; see `Agent.check_env`."""
        reward = cast(DenoisingVectorEnv, env.unwrapped).reward
        if not is_differentiable(reward):
            raise ValueError(
                f"reward={reward_name(reward)!r} does not say that it is differentiable (differentiable = True), so "
                "that reward_gradient cannot learn from it; take such a reward, or another agent"
            )
        if self.config.form == "draft" and self.config.truncation > len(self.policy.table):
            raise ValueError(
                f"truncation={self.config.truncation} must be at most num_inference_steps={len(self.policy.table)}"
            )

    def sample(self, env: VectorEnv[Any, Any, Any], number: int, seed_path: tuple[int, ...]) -> Trajectories:
        """Trajectories with all states, of the environment whose reward is differentiated; see `Agent.sample`."""
        self.check_env(env)
        self._env = cast(DenoisingVectorEnv, env.unwrapped)
        return super().sample(env, number, seed_path)

    def update(self, trajectories: Trajectories, rng: np.random.Generator) -> Metrics:
        """One pass over the iteration's trajectories; see `Agent.update`."""
        _, rewards = self.rewards(trajectories)
        order = rng.permutation(np.flatnonzero(np.isfinite(rewards)))
        rows = []
        for start in range(0, len(order), self.config.batch_size):
            samples = torch.from_numpy(order[start : start + self.config.batch_size])
            begin, seed = self.begin(rng), int(rng.integers(2**62))
            steps = len(self.policy.table) - begin
            noise = fresh_noise(trajectories, steps * len(samples), seed).unflatten(0, (steps, len(samples)))
            items = self.local_on_host(torch.stack([samples, torch.arange(len(samples))], 1), len(trajectories))
            rows.append(self.minimize(items, partial(self.losses, trajectories, begin, noise), len(samples)))
        return {**update_metrics(rows), "samples_dropped": len(rewards) - len(order)}

    def begin(self, rng: np.random.Generator) -> int:
        """The first step with gradient of an update, 0 being the noisiest."""
        total = len(self.policy.table)
        if self.config.form == "refl":
            return int(self.steps[rng.integers(len(self.steps))])
        return total - (self.config.truncation if self.config.form == "draft" else int(rng.integers(1, total + 1)))

    def losses(self, trajectories: Trajectories, begin: int, noise: torch.Tensor, items: torch.Tensor) -> Losses:
        """-r(x_0, c) of M pictures, whose denoising from step `begin` on has a gradient.

        Args:
            trajectories: this process's.
            begin: the step from whose stored state they are sampled anew, or estimated.
            noise: of the steps from there on, `(K, B, C, H, W)`.
            items: (sample, place in the update), int64 `(M, 2)`, on the host.
        """
        prompts = [trajectories.prompts[sample] for sample in items[:, 0].tolist()]
        samples, places = to_device(items, trajectories.latents.device).unbind(1)
        conditions, latents = trajectories.conditions(samples), trajectories.latents[begin, samples]
        if self.config.form == "refl":
            latents = self.policy.denoised(self._state(conditions, begin, latents))
        else:
            for step in range(begin, len(self.policy.table)):
                advance = partial(self._advance, conditions, step, noise[step - begin, places])
                chained = self.config.checkpoint_chain and torch.is_grad_enabled()
                latents = checkpoint(advance, latents, use_reentrant=False) if chained else advance(latents)
        metadata, images = self._env.prompt_set.metadata_of(prompts), self.policy.model.decode(latents)
        scores = differentiable_scores(self._env.reward, images, prompts, metadata)
        loss = -scores if self.config.reward_limit is None else (self.config.reward_limit - scores).relu()
        usable = scores.isfinite()
        reward = torch.where(usable, scores, 0.0).detach()
        differentiated = torch.full_like(reward, len(noise))
        loss = torch.where(usable, loss, 0.0)
        return {"loss": loss, "reward_with_gradient": reward, "steps_with_gradient": differentiated}

    def _advance(
        self, conditions: dict[str, torch.Tensor], step: int, noise: torch.Tensor, latents: torch.Tensor
    ) -> torch.Tensor:
        """The next state, with gradient."""
        gaussian = self.policy.distribution(self._state(conditions, step, latents))
        return gaussian.mean + gaussian.std * noise

    def _state(self, conditions: dict[str, torch.Tensor], step: int, latents: torch.Tensor) -> dict[str, torch.Tensor]:
        steps = to_device(torch.full((len(latents),), step), latents.device)
        return {**conditions, "step": steps, "latents": latents}
