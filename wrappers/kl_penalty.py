"""The distance to the pretrained model as a part of the reward, r_t - beta KL_t: RLHF's way to limit a policy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, Literal, Protocol

import torch
from gymnasium.vector import VectorEnv

from diffusion_gym.scheduling import gaussian_kl
from diffusion_gym.wrappers.episodes import EpisodesVectorEnv, kept, like, require_states, rows, spread, with_info
from diffusion_gym.wrappers.single import SingleWrapper

Estimator = Literal["exact", "sampled"]


class Gaussian(Protocol):
    """N(mean, std^2 I) for N states."""

    @property
    def mean(self) -> torch.Tensor:
        """`(N, C, H, W)`."""
        ...

    @property
    def std(self) -> torch.Tensor:
        """`(N, 1, 1, 1)`, 0 where the step is deterministic."""
        ...


class ReferencedPolicy(Protocol):
    """A policy that knows the model it started from, such as `diffusion_gym.agents.DenoisingPolicy`."""

    def distribution(self, observation: Mapping[str, Any]) -> Gaussian:
        """The policy's Gaussian over x_{t-1}."""
        ...

    def reference_distribution(self, observation: Mapping[str, Any]) -> Gaussian:
        """The pretrained model's, of equal std."""
        ...


class KLPenaltyVectorEnv(EpisodesVectorEnv):
    """Rewards r_t - beta KL_t, for algorithms whose loss cannot be changed.

    KL_t estimates KL(policy || pretrained) = ||mu - mu_ref||^2 / (2 sigma_t^2), in the state that the action was taken
    in and summed over the dimensions; 0 at deterministic steps. The return is that of the picture, less beta times the
    divergence of the trajectory. `info["kl"]` has KL_t of each step. The penalty costs two more predictions a step.

    `sampled` is RLHF's penalty, log pi(a|s) - log pi_ref(a|s): its mean is the divergence, and its policy gradient is
    that of the divergence. `exact` is the closed form, without noise. It depends on the state and the weights and not
    on the action, and an algorithm takes rewards for constants: `exact` drops out of the gradient of step t, as any
    baseline does, and only teaches to avoid states that lead to larger KL later. Take it to measure, not to train.

    Args:
        env: a denoising vector environment, wrapped or not, that shows its states.
        policy: the policy that acts; None where it is made later: then set the attribute before the first step.
        beta: weight of the divergence, in rewards a nat, at least 0; 0 only measures it. The agents' `kl_weight` is in
            the same unit, of their advantages.
        estimator: `sampled`, the log-ratio of the action; or `exact`, the closed form.

    Attributes:
        policy: the policy, which may be replaced at any time.

    Raises:
        ValueError: `env` shows no states, `beta` is negative or not finite, an unknown `estimator`.
        TypeError: `policy` has no `distribution` or `reference_distribution`.

    Example:
        >>> import gymnasium as gym, diffusion_gym
        >>> from diffusion_gym.agents import DenoisingPolicy
        >>> env = gym.make_vec("DiffusionDenoise-Shapes-Color-v0", num_envs=2, num_inference_steps=2)
        >>> policy = DenoisingPolicy.from_env(env)  # the pretrained model, so far
        >>> env = KLPenaltyVectorEnv(env, policy, beta=0.01)
        >>> observation, infos = env.reset(seed=0)
        >>> observation, rewards, *_, infos = env.step(policy.distribution(observation).sample())
        >>> infos["kl"]
        tensor([0., 0.])
    """

    def __init__(
        self,
        env: VectorEnv[Any, Any, Any],
        policy: ReferencedPolicy | None,
        beta: float,
        estimator: Estimator = "sampled",
    ) -> None:
        _check(env, policy, beta, estimator)
        super().__init__(env)
        self.policy, self.beta, self.estimator = policy, float(beta), estimator
        self._state: dict[str, Any] = {}

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As the wrapped environment's."""
        observation, infos = super().reset(seed=seed, options=options)
        self._state = kept(observation)
        return observation, infos

    def step(self, actions: Any) -> tuple[dict[str, Any], Any, Any, Any, dict[str, Any]]:
        """As the wrapped environment's, with the penalty in the rewards and `kl` `(N,)` in the infos.

        Raises:
            ValueError: there is no policy yet.
        """
        policy = _required(self.policy)
        observation, rewards, terminations, truncations, infos = super().step(actions)
        moved = self.events.moved
        kl: Any = like(torch.zeros(len(moved)), rewards)
        if moved.any():  # what is reset in place of its step has no action, and its old state may be x_0
            parts = rows({**self._state, "action": actions}, moved)
            kl = like(spread(divergence(policy, parts, parts.pop("action"), self.estimator), moved), rewards)
        self._state = kept(observation)
        infos = with_info(infos, "kl", kl, moved)
        if "final_info" in infos:
            infos["final_info"] = with_info(infos["final_info"], "kl", kept({"kl": kl})["kl"], self.events.ended)
        return observation, rewards - self.beta * kl, terminations, truncations, infos


class KLPenalty(SingleWrapper[KLPenaltyVectorEnv]):
    """`KLPenaltyVectorEnv` for a single environment."""

    kind = KLPenaltyVectorEnv


@torch.no_grad()
def divergence(
    policy: ReferencedPolicy, observation: Mapping[str, Any], actions: Any, estimator: Estimator
) -> torch.Tensor:
    """KL(policy || pretrained) `(N,)` in N states, or its estimate from the actions taken there.

    Args:
        policy: the policy.
        observation: the states.
        actions: x_{t-1} `(N, C, H, W)`, a tensor or an array; `exact` does not look at them.
        estimator: `exact` or `sampled`.
    """
    own, reference = policy.distribution(observation), policy.reference_distribution(observation)
    exact = gaussian_kl(own.mean, reference.mean, own.std)
    if estimator == "exact":
        return exact
    # The log-ratio, multiplied out: the difference of two log-probabilities would lose float32's last digits.
    safe = torch.where(own.std > 0, own.std, torch.inf)
    noise = (torch.as_tensor(actions, device=own.mean.device) - own.mean) / safe
    return exact + (noise * (own.mean - reference.mean) / safe).flatten(1).sum(1)


def _check(env: Any, policy: Any, beta: float, estimator: str) -> None:
    require_states(env, "KLPenalty")
    if policy is not None:
        _required(policy)
    if not isinstance(beta, Real) or isinstance(beta, bool) or not math.isfinite(beta) or beta < 0:
        raise ValueError(f"beta={beta!r} must be a finite number of at least 0")
    if estimator not in ("exact", "sampled"):
        raise ValueError(f"estimator={estimator!r} must be 'exact' or 'sampled'")


def _required(policy: ReferencedPolicy | None) -> ReferencedPolicy:
    if policy is None:
        raise ValueError(
            "policy=None: set the wrapper's attribute policy to the policy that acts, before the first step"
        )
    lacking = [name for name in ("distribution", "reference_distribution") if not callable(getattr(policy, name, None))]
    if lacking:
        raise TypeError(f"policy={policy!r} has no {' and no '.join(lacking)}; DenoisingPolicy.from_env(env) has both")
    return policy
