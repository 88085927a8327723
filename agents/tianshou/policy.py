"""The guided UNet as Tianshou's policy: actor, distribution, critics."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal, Self

import torch
from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
from torch import nn
from torch.distributions import Distribution

from diffusion_gym.agents.adapters import made_policy, policy_options, require_micro_batch_size, to_tensors
from diffusion_gym.agents.denoising_env import denoising_env
from diffusion_gym.agents.distribution import DenoisingDistribution
from diffusion_gym.agents.identity import Identity, identity
from diffusion_gym.agents.optimization import recomputed
from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.value import ValueNetwork
from diffusion_gym.envs.spaces import make_spaces


class GuidedGaussian(Distribution):
    """The Gaussian over x_{t-1} as a distribution of PyTorch: Tianshou's `dist_fn`.

    It is not `Independent(Normal(mean, std), 3)`: a deterministic step has std 0, and log-probabilities are reduced
    as the environment's configuration says.

    Args:
        gaussian: the policy's distribution of N states.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, gaussian: DenoisingDistribution) -> None:
        self.gaussian = gaussian
        number, *event = gaussian.mean.shape
        super().__init__(torch.Size([number]), torch.Size(event), validate_args=False)

    @property
    def mean(self) -> torch.Tensor:
        """mu_theta, `(N, C, H, W)`: the action of deterministic evaluation."""
        return self.gaussian.mean

    mode = mean

    @property
    def variance(self) -> torch.Tensor:
        """sigma_t^2, `(N, 1)`: one number for all dimensions, because Tianshou logs its root `stddev` for each."""
        return self.gaussian.std.flatten(1) ** 2

    def sample(self, sample_shape: Any = ()) -> torch.Tensor:
        """Actions x_{t-1}, float32 `(*sample_shape, N, C, H, W)`, from PyTorch's global generator."""
        return replace(self.gaussian, mean=self.mean.expand(*sample_shape, *self.mean.shape)).sample()

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `(N,)` of actions `(N, C, H, W)`; 0 at deterministic steps."""
        return self.gaussian.log_prob(value)

    def entropy(self) -> torch.Tensor:
        """Entropies `(N,)`; see `DenoisingDistribution.entropy`."""
        return self.gaussian.entropy()


class GuidedActor(nn.Module):
    """A `DenoisingPolicy` with the call of Tianshou's actors.

    Args:
        policy: the policy.
        micro_batch_size: transitions that go through the network at a time; see `recomputed`. 0 takes all at once.
    """

    def __init__(self, policy: DenoisingPolicy, micro_batch_size: int = 0) -> None:
        super().__init__()
        require_micro_batch_size(micro_batch_size)
        self.policy, self.micro_batch_size = policy, micro_batch_size

    def forward(self, obs: Any, state: Any = None, info: Any = None) -> tuple[DenoisingDistribution, Any]:
        """The Gaussian over x_{t-1} of N states, and the hidden state, which is passed on.

        Args:
            obs: a `Batch` or mapping of arrays or tensors, as `DenoisingPolicy.distribution` takes them.
            state: of recurrent actors.
            info: not used.
        """
        observation = to_tensors(obs, self.policy.device)
        mean, std = recomputed(self._parameters_of, self.micro_batch_size, observation)
        return DenoisingDistribution(mean, std, self.policy.config.log_prob_reduction), state

    def _parameters_of(self, observation: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        distribution = self.policy.distribution(observation)
        return distribution.mean, distribution.std


class GuidedPolicy(ProbabilisticActorPolicy):
    """Tianshou's `ProbabilisticActorPolicy` on a guided UNet: nothing scales, bounds, clips or squashes actions.

    Args:
        actor: the actor.
        deterministic_eval: act with the mean outside of training. The mean of every step does not make a sample of
            the model: evaluate with sampled actions, unless means are what you ask for.
        action_scaling: must be false.
        action_bound_method: must be None.

    Raises:
        ValueError: actions would be scaled or clipped, or no step is stochastic.
    """

    actor: GuidedActor  # type: ignore[assignment]

    def __init__(
        self,
        actor: GuidedActor,
        *,
        deterministic_eval: bool = False,
        action_scaling: bool = False,
        action_bound_method: Literal["clip", "tanh"] | None = None,
    ) -> None:
        _refuse_changed_actions(action_scaling, action_bound_method)
        actor.policy.require_noise()
        observation_space, action_space = make_spaces(actor.policy.model)
        parts: dict[str, Any] = {"actor": actor, "dist_fn": GuidedGaussian}  # Tianshou's types know its own alone
        super().__init__(
            **parts,
            deterministic_eval=deterministic_eval,
            action_space=action_space,
            observation_space=observation_space,
            action_scaling=False,
            action_bound_method=None,
        )

    @classmethod
    def from_env(cls, env: Any, *, micro_batch_size: int = 0, **options: Any) -> Self:
        """The policy of an environment's model and sampler.

        Args:
            env: a denoising environment, Gymnasium's or Tianshou's.
            micro_batch_size: see `GuidedActor`.
            **options: those of `PolicyOptions`, and of this class.

        Raises:
            ValueError: `env` is no denoising environment, or training needs float16.
        """
        base = denoising_env(env)
        policy = made_policy(base.model, base.sampler_config, policy_options(options), "Tianshou")
        return cls(GuidedActor(policy, micro_batch_size), **options)

    def forward(self, batch: Any, state: Any = None, **kwargs: Any) -> Any:
        """Actions and their distribution for the states in `batch.obs`; gradients flow in train mode alone.

        Tianshou's collectors switch to eval mode but leave autograd on, which would keep the activations of rollouts.
        """
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            return super().forward(batch, state)

    @property
    def denoising(self) -> DenoisingPolicy:
        """The policy that trains, for use without Tianshou."""
        return self.actor.policy


class ZeroCritic(nn.Module):
    """Values of 0: DDPO has no value function, and Tianshou's PPO wants a critic.

    Args:
        device: where values are.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def forward(self, obs: Any) -> torch.Tensor:
        """Zeros, `(N, 1)`."""
        return torch.zeros(len(obs["latents"]), 1, device=self.device)


class ValueCritic(nn.Module):
    """V(x_t, t, c) by a `ValueNetwork`, with the call of Tianshou's critics.

    Args:
        policy: the policy, which embeds prompts.
    """

    def __init__(self, policy: DenoisingPolicy) -> None:
        super().__init__()
        self.network = ValueNetwork.of(policy)
        self._values = partial(self.network.values, policy)  # the policy itself would become a part of this module

    def forward(self, obs: Any) -> torch.Tensor:
        """Values, `(N, 1)`."""
        return self._values(obs)[:, None]


def denoising_policy(policy: Any) -> DenoisingPolicy:
    """The denoising policy in a policy of Tianshou that leaves its actions as they are.

    Raises:
        ValueError: it is not a guided UNet's, or it changes actions on their way to the environment.
    """
    actor = getattr(policy, "actor", None)
    if not isinstance(actor, GuidedActor):
        raise ValueError(f"policy={type(policy).__name__} is not a guided UNet's; use GuidedPolicy.from_env(env)")
    _refuse_changed_actions(policy.action_scaling, policy.action_bound_method)
    if policy.dist_fn is not GuidedGaussian:
        raise ValueError(
            f"dist_fn={policy.dist_fn!r} must be GuidedGaussian: the policy is the sampler's Gaussian, neither "
            "squashed nor of another width; use GuidedPolicy.from_env(env)"
        )
    return actor.policy


def policy_identity(policy: Any) -> Identity:
    """Model and sampler of a policy, as `diffusion_gym.agents.identity` compares them."""
    denoising = denoising_policy(policy)
    return identity(denoising.model, None, denoising.config)


def _refuse_changed_actions(action_scaling: bool, action_bound_method: str | None) -> None:
    for name, value in (("action_scaling", action_scaling), ("action_bound_method", action_bound_method)):
        if value:
            raise ValueError(
                f"{name}={value!r} would change x_(t-1), whose log-probability is that of the sample; leave it off"
            )
