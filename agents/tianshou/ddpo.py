"""DDPO on Tianshou's REINFORCE and PPO: whole trajectories, rewards normalised as in the native agents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Final

import numpy as np
import torch
from tianshou.algorithm.modelfree.ppo import PPO
from tianshou.algorithm.modelfree.reinforce import Reinforce
from tianshou.algorithm.optim import OptimizerFactory, ParamsType
from tianshou.data import ReplayBuffer

from diffusion_gym.agents.adapters import ACTOR_CRITIC, require_no_groups, require_trained_values, taken
from diffusion_gym.agents.advantages import AdvantageOptions, Normalization, RewardNormalizer
from diffusion_gym.agents.algorithms.ddpo_is import ClippedConfig
from diffusion_gym.agents.optimization import OptimizerOptions
from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.rollout import trained_steps as steps_in
from diffusion_gym.agents.tianshou.policy import GuidedPolicy, ValueCritic, ZeroCritic, denoising_policy

_REWARD_OPTIONS: Final = [*(entry.name for entry in fields(AdvantageOptions)), "trained_steps"]


class AdamWFactory(OptimizerFactory):
    """AdamW on the parameters that train.

    Args:
        options: learning rate, moments and their bits; those of the native agents by default.
    """

    def __init__(self, options: OptimizerOptions | None = None) -> None:
        super().__init__()
        self.options = options or OptimizerOptions()

    def _create_optimizer_for_params(self, params: ParamsType) -> torch.optim.Optimizer:
        every: Any = params  # Tianshou gives all parameters of a module, frozen ones too
        return self.options.make([parameter for parameter in every if parameter.requires_grad])


class TrajectoryRewards:
    """What happens to a rollout before Tianshou computes advantages from it.

    Tianshou's own normalisations are others: `Reinforce` uses running statistics of earlier rollouts, so that the
    first is not normalised at all, and `PPO` those of each minibatch. Neither knows prompts.

    Args:
        policy: the policy, which knows T and the stochastic steps.
        normalization: each trajectory's return by its prompt's running statistics or the rollout's, credited to all
            of its steps; or `none`, rewards as they are.
        trained_steps: the part of the trajectory that is trained on, as fractions of T, 0 being the noise.
        **options: the others of `AdvantageOptions`.

    Attributes:
        statistics: of the prompts; part of what `save` writes.

    Raises:
        ValueError: an unknown normalisation, or a number out of its range.
    """

    def __init__(
        self,
        policy: DenoisingPolicy,
        normalization: Normalization = AdvantageOptions.normalization,
        trained_steps: Sequence[float] = ClippedConfig.trained_steps,
        **options: Any,
    ) -> None:
        require_no_groups(normalization)
        self.options = AdvantageOptions(normalization, **options)
        self._normalizer = RewardNormalizer(self.options)
        self.statistics = self._normalizer.statistics
        self.horizon = len(policy.table)
        self._trained = policy.table.timesteps.cpu()[steps_in(policy.table, trained_steps)].numpy()

    def normalize(self, batch: Any) -> None:
        """Replace the rewards of a rollout, trajectory after trajectory: the normalised return comes at the end.

        Raises:
            ValueError: the rollout does not hold whole trajectories, or actions were changed on their way.
        """
        self._require_whole(batch)
        parts = (batch.obs.latents, batch.act, np.asarray(batch.rew, dtype=np.float64))
        states, actions, rewards = (part.reshape(-1, self.horizon, *part.shape[1:]) for part in parts)
        if not np.array_equal(states[:, 1:], actions[:, :-1]):
            raise ValueError(
                "observation.latents are not the actions before them; take off what scales, clips or adds noise to "
                "actions or observations"
            )
        if self.options.normalization != "none":
            # With gamma 1 the reward at the end is the return of every step of the trajectory.
            prompts, normalized = batch.info.prompt[:: self.horizon].tolist(), np.zeros_like(rewards)
            normalized[:, -1] = self._normalizer.normalize(prompts, rewards.sum(1))
            batch.rew = normalized.ravel()

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


class _OnTrajectories:
    """What DDPO does to the rollout that both algorithms are given; options of `TrajectoryRewards` are taken out."""

    _credit: str  # where the algorithm keeps what its loss multiplies log-probabilities or ratios by

    def __init__(self, *, policy: GuidedPolicy, **options: Any) -> None:
        denoising, rewards = denoising_policy(policy), taken(options, _REWARD_OPTIONS)
        super().__init__(policy=policy, **options)  # type: ignore[call-arg]
        self.rewards = TrajectoryRewards(denoising, **rewards)

    def _preprocess_batch(self, batch: Any, buffer: ReplayBuffer, indices: np.ndarray) -> Any:
        self.rewards.normalize(batch)
        prepared = super()._preprocess_batch(batch, buffer, indices)  # type: ignore[misc]
        bound = self.rewards.options.advantage_clip
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
        gamma: float = ACTOR_CRITIC["gamma"],
        max_grad_norm: float | None = ACTOR_CRITIC["max_grad_norm"],
        **rewards: Any,
    ) -> None:
        self._max_grad_norm = max_grad_norm
        super().__init__(policy=policy, optim=optim, gamma=gamma, return_standardization=False, **rewards)

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
        if options.get("recompute_advantage"):
            raise ValueError("recompute_advantage=True would undo the normalisation of rewards; leave it out")
        super().__init__(policy=policy, critic=critic, optim=optim, **options)


def ddpo_sf(
    env: Any,
    policy: GuidedPolicy | None = None,
    *,
    learning_rate: float = OptimizerOptions.learning_rate,
    optim: OptimizerFactory | None = None,
    **changes: Any,
) -> DDPOReinforce:
    """DDPO_SF, equation 3 of the paper, as Tianshou's `Reinforce`.

    One update takes all transitions of the rollout: `OnPolicyTrainerParams(batch_size=None,
    update_step_num_repetitions=1)`, because the estimator is exact only for the policy that sampled them.

    Args:
        env: a denoising environment, Gymnasium's or Tianshou's.
        policy: by default `GuidedPolicy.from_env(env)`.
        learning_rate: of AdamW.
        optim: another optimiser.
        **changes: arguments of `DDPOReinforce` that are to differ.

    Raises:
        ValueError: `env` is no denoising environment, or an argument is out of its range.
    """
    return DDPOReinforce(**_parts(env, policy, learning_rate, optim), **changes)


def ddpo_is(
    env: Any,
    policy: GuidedPolicy | None = None,
    *,
    learning_rate: float = OptimizerOptions.learning_rate,
    optim: OptimizerFactory | None = None,
    value_network: bool = False,
    **changes: Any,
) -> DDPOPPO:
    """DDPO_IS, equation 4 of the paper, as Tianshou's `PPO`.

    Args:
        env: a denoising environment, Gymnasium's or Tianshou's.
        policy: by default `GuidedPolicy.from_env(env)`.
        learning_rate: of AdamW.
        optim: another optimiser.
        value_network: learn V(x_t, t, c) as a baseline, with the same optimiser; needs `vf_coef`.
        **changes: arguments of `DDPOPPO` and Tianshou's `PPO` that are to differ.

    Raises:
        ValueError: `env` is no denoising environment, or an argument is out of its range.
    """
    settings = {
        **ACTOR_CRITIC,
        "eps_clip": ClippedConfig.clip_range,
        "advantage_normalization": False,  # rewards are normalised, by prompt; Tianshou's is by minibatch
        "return_scaling": False,  # would scale what is normalised already
        "value_clip": False,  # there are no values
        "dual_clip": None,  # not in DDPO
        **changes,
    }
    require_trained_values(value_network, settings["vf_coef"])
    parts = _parts(env, policy, learning_rate, optim)
    denoising = denoising_policy(parts["policy"])
    critic = ValueCritic(denoising) if value_network else ZeroCritic(denoising.device)
    return DDPOPPO(critic=critic, **parts, **settings)


def _parts(
    env: Any, policy: GuidedPolicy | None, learning_rate: float, optim: OptimizerFactory | None
) -> dict[str, Any]:
    """Policy and optimiser that were given, or those of the environment and the learning rate."""
    made = optim or AdamWFactory(OptimizerOptions(learning_rate=learning_rate))
    return {"policy": policy or GuidedPolicy.from_env(env), "optim": made}
