"""DDPO on Tianshou's REINFORCE and PPO: whole trajectories, rewards normalised as in the native agents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from tianshou.algorithm.modelfree.ppo import PPO
from tianshou.algorithm.modelfree.reinforce import Reinforce
from tianshou.algorithm.optim import OptimizerFactory
from tianshou.data import ReplayBuffer

from diffusion_gym.agents.adapters import chosen_steps
from diffusion_gym.agents.advantages import PromptStatistics, batch_normalize
from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.tianshou.policy import GuidedPolicy, denoising_policy

Normalization = Literal["prompt", "batch", "none"]
_REWARD_OPTIONS = ("normalization", "advantage_clip", "statistics_buffer", "statistics_min_count", "trained_steps")


class TrajectoryRewards:
    """What happens to a rollout before Tianshou computes advantages from it.

    Tianshou's own normalisations are others: `Reinforce` uses running statistics of earlier rollouts, so that the
    first is not normalised at all, and `PPO` those of each minibatch. Neither knows prompts.

    Args:
        policy: the policy, which knows T and the stochastic steps.
        normalization: each trajectory's return by its prompt's running statistics or the rollout's, credited to all
            of its steps; or `none`, rewards as they are.
        advantage_clip: advantages are clipped to +- this.
        statistics_buffer: rewards kept a prompt.
        statistics_min_count: rewards that a prompt needs before its own statistics count.
        trained_steps: the part of the trajectory that is trained on, as fractions of T, 0 being the noise.

    Attributes:
        statistics: of the prompts; part of what `save` writes.

    Raises:
        ValueError: an unknown normalisation, or a number out of its range.
    """

    def __init__(
        self,
        policy: DenoisingPolicy,
        normalization: Normalization = "prompt",
        advantage_clip: float = 5.0,
        statistics_buffer: int = 32,
        statistics_min_count: int = 16,
        trained_steps: Sequence[float] = (0.0, 1.0),
    ) -> None:
        if normalization not in get_args(Normalization):
            raise ValueError(f"normalization={normalization!r} must be one of {', '.join(get_args(Normalization))}")
        if not advantage_clip > 0:
            raise ValueError(f"advantage_clip={advantage_clip!r} must be larger than 0")
        self.normalization, self.advantage_clip = normalization, advantage_clip
        self.statistics = PromptStatistics(statistics_buffer, statistics_min_count)
        self.horizon = len(policy.table)
        steps = chosen_steps(policy.stochastic_steps, self.horizon, trained_steps)
        self._trained = policy.table.timesteps.cpu()[steps].numpy()

    def normalize(self, batch: Any) -> None:
        """Replace the rewards of a rollout, trajectory after trajectory: the normalised return comes at the end.

        Raises:
            ValueError: the rollout does not hold whole trajectories, or actions were changed on their way.
        """
        self._require_whole(batch)
        self._require_unchanged_actions(batch)
        if self.normalization == "none":
            return
        returns = np.asarray(batch.rew, dtype=np.float64).reshape(-1, self.horizon).sum(1)
        if self.normalization == "prompt":
            returns = self.statistics.normalize(batch.info.prompt[:: self.horizon].tolist(), returns)
        else:
            returns = batch_normalize(returns)
        # With gamma 1 this is the return of every step of the trajectory.
        batch.rew = np.zeros(len(batch))
        batch.rew[self.horizon - 1 :: self.horizon] = returns

    def trained(self, batch: Any) -> Any:
        """The part of a rollout to train on: steps with sigma > 0 in `trained_steps`, as in the native agents."""
        return batch[np.flatnonzero(np.isin(batch.obs.timestep[:, 0], self._trained))]

    def _require_whole(self, batch: Any) -> None:
        ends = np.flatnonzero(batch.done)
        expected = np.arange(self.horizon - 1, len(batch), self.horizon)
        if len(batch) % self.horizon or not np.array_equal(ends, expected):
            raise ValueError(
                f"the rollout's {len(batch)} steps are not whole trajectories of T={self.horizon} steps: collect "
                f"episodes, or a multiple of num_envs * {self.horizon} steps, into a buffer that holds all of them, "
                "such as TrajectoryCollector's"
            )

    def _require_unchanged_actions(self, batch: Any) -> None:
        states, actions = (part.reshape(-1, self.horizon, *part.shape[1:]) for part in (batch.obs.latents, batch.act))
        if not np.array_equal(states[:, 1:], actions[:, :-1]):
            raise ValueError(
                "observation.latents are not the actions before them; take off what scales, clips or adds noise to "
                "actions or observations"
            )


class _OnTrajectories:
    """What DDPO does to the rollout that both algorithms are given."""

    rewards: TrajectoryRewards
    _credit: str  # where the algorithm keeps what its loss multiplies log-probabilities or ratios by

    def _preprocess_batch(self, batch: Any, buffer: ReplayBuffer, indices: np.ndarray) -> Any:
        self.rewards.normalize(batch)
        prepared = super()._preprocess_batch(batch, buffer, indices)  # type: ignore[misc]
        bound = self.rewards.advantage_clip
        prepared[self._credit] = prepared[self._credit].clip(-bound, bound)
        return self.rewards.trained(prepared)


class DDPOReinforce(_OnTrajectories, Reinforce):
    """DDPO_SF: Tianshou's REINFORCE on trajectory rewards.

    Args:
        policy: the policy.
        optim: makes the optimiser.
        gamma: discount; 1, because the reward of the picture belongs to every step of it.
        max_grad_norm: longer gradients are scaled down to this norm, which Tianshou's `Reinforce` does not do.
        **rewards: options of `TrajectoryRewards`.

    Attributes:
        rewards: normalises them.

    Raises:
        ValueError: the policy is no `GuidedPolicy`, or an option is out of its range.
    """

    policy: GuidedPolicy
    _credit = "returns"

    def __init__(
        self,
        *,
        policy: GuidedPolicy,
        optim: OptimizerFactory,
        gamma: float = 1.0,
        max_grad_norm: float | None = 1.0,
        **rewards: Any,
    ) -> None:
        denoising = denoising_policy(policy)
        self._max_grad_norm = max_grad_norm
        super().__init__(policy=policy, gamma=gamma, return_standardization=False, optim=optim)
        self.rewards = TrajectoryRewards(denoising, **rewards)

    def _create_optimizer(self, module: torch.nn.Module, factory: OptimizerFactory, max_grad_norm: Any = None) -> Any:
        return super()._create_optimizer(module, factory, max_grad_norm=self._max_grad_norm)


class DDPOPPO(_OnTrajectories, PPO):
    """DDPO_IS: Tianshou's PPO on trajectory rewards.

    Args:
        policy: the policy.
        critic: values of states; `ZeroCritic` for none.
        optim: makes the optimiser.
        **options: of `TrajectoryRewards` and of Tianshou's `PPO`; `ddpo_is` gives those of DDPO.

    Attributes:
        rewards: normalises them.

    Raises:
        ValueError: the policy is no `GuidedPolicy`, or an option is out of its range.
    """

    policy: GuidedPolicy
    _credit = "adv"

    def __init__(
        self, *, policy: GuidedPolicy, critic: torch.nn.Module, optim: OptimizerFactory, **options: Any
    ) -> None:
        denoising = denoising_policy(policy)
        if options.get("recompute_advantage"):
            raise ValueError("recompute_advantage=True would undo the normalisation of rewards; leave it out")
        rewards = {name: options.pop(name) for name in _REWARD_OPTIONS if name in options}
        super().__init__(policy=policy, critic=critic, optim=optim, **options)
        self.rewards = TrajectoryRewards(denoising, **rewards)
