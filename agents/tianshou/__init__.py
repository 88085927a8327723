"""Tianshou drives the environment and expresses DDPO; see docs/tianshou.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

try:
    import tianshou  # noqa: F401
except ImportError as error:
    raise ImportError("tianshou is not installed; pip install 'diffusion-denoise-gym[tianshou]'") from error

import torch
from tianshou.algorithm.optim import OptimizerFactory, ParamsType

from diffusion_gym.agents.identity import require_same
from diffusion_gym.agents.tianshou.collector import TrajectoryCollector
from diffusion_gym.agents.tianshou.ddpo import DDPOPPO, DDPOReinforce, TrajectoryRewards
from diffusion_gym.agents.tianshou.env import TianshouVectorEnv
from diffusion_gym.agents.tianshou.policy import (
    GuidedActor,
    GuidedGaussian,
    GuidedPolicy,
    ValueCritic,
    ZeroCritic,
    denoising_policy,
    policy_identity,
)
from diffusion_gym.storage import (
    exact_json,
    load_tensors,
    optimizer_tensors,
    parse_json,
    restore_optimizer,
    save_tensors,
    tensors_metadata,
)

__all__ = [
    "AdamWFactory",
    "DDPOPPO",
    "DDPOReinforce",
    "GuidedActor",
    "GuidedGaussian",
    "GuidedPolicy",
    "TianshouVectorEnv",
    "TrajectoryCollector",
    "TrajectoryRewards",
    "ValueCritic",
    "ZeroCritic",
    "ddpo_is",
    "ddpo_sf",
    "load",
    "save",
]

_FORMAT = "diffusion-gym-tianshou-1"


class AdamWFactory(OptimizerFactory):
    """AdamW on the parameters that train, with the native agents' defaults.

    Args:
        learning_rate: the learning rate.
        betas: moment decays.
        epsilon: epsilon.
        weight_decay: weight decay.
    """

    def __init__(
        self,
        learning_rate: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        weight_decay: float = 1e-4,
    ) -> None:
        super().__init__()
        if not learning_rate > 0:
            raise ValueError(f"learning_rate={learning_rate!r} must be larger than 0")
        self.options: dict[str, Any] = {
            "lr": learning_rate,
            "betas": betas,
            "eps": epsilon,
            "weight_decay": weight_decay,
        }

    def _create_optimizer_for_params(self, params: ParamsType) -> torch.optim.Optimizer:
        every: Any = params  # Tianshou gives all parameters of a module, frozen ones too
        return torch.optim.AdamW([parameter for parameter in every if parameter.requires_grad], **self.options)


def ddpo_sf(
    env: Any,
    policy: GuidedPolicy | None = None,
    *,
    learning_rate: float = 1e-5,
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
    settings = {
        "gamma": 1.0,  # the return is the reward of the picture, at every step of it
        "max_grad_norm": 1.0,  # as in the native agents; Tianshou's Reinforce has no bound
        "normalization": "prompt",  # in place of Tianshou's return_standardization; see TrajectoryRewards
        **changes,
    }
    policy = policy or GuidedPolicy.from_env(env)
    return DDPOReinforce(policy=policy, optim=optim or AdamWFactory(learning_rate), **settings)


def ddpo_is(
    env: Any,
    policy: GuidedPolicy | None = None,
    *,
    learning_rate: float = 1e-5,
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
        "gamma": 1.0,  # the return is the reward of the picture, at every step of it
        "gae_lambda": 1.0,  # with gamma 1 and values of 0 the advantage is that return: A_t = r
        "eps_clip": 1e-4,  # log-probabilities are means over dimensions, so that ratios are near 1
        "vf_coef": 0.0,  # DDPO has no value function
        "ent_coef": 0.0,  # sigma_t is the sampler's: the entropy is constant
        "max_grad_norm": 1.0,  # as in the native agents
        "advantage_normalization": False,  # rewards are normalised, by prompt; Tianshou's is by minibatch
        "return_scaling": False,  # would scale what is normalised already
        "value_clip": False,  # there are no values
        "dual_clip": None,  # not in DDPO
        "normalization": "prompt",  # DDPO, appendix F.3
        **changes,
    }
    if value_network and not settings["vf_coef"]:
        raise ValueError("value_network=True is not trained with vf_coef=0; pass vf_coef=0.5, or leave it out")
    policy = policy or GuidedPolicy.from_env(env)
    denoising = denoising_policy(policy)
    critic = ValueCritic(denoising) if value_network else ZeroCritic(denoising.device)
    return DDPOPPO(policy=policy, critic=critic, optim=optim or AdamWFactory(learning_rate), **settings)


def save(algorithm: DDPOReinforce | DDPOPPO, path: str | Path) -> str:
    """Write what trains, the optimiser and the prompts' statistics as one safetensors file, without pickle.

    `OnPolicyTrainerParams(save_best_fn=lambda algorithm: save(algorithm, path))` keeps the best policy.

    Args:
        algorithm: the algorithm.
        path: the file.

    Returns:
        The path, which Tianshou's `save_checkpoint_fn` has to return.
    """
    stored = {**_weights(algorithm), **_prefixed("optimizer", optimizer_tensors(_optimizer(algorithm)))}
    own = {"statistics": algorithm.rewards.statistics.state(), "identity": policy_identity(algorithm.policy)}
    save_tensors(path, stored, {"format": _FORMAT, **{name: exact_json(value) for name, value in own.items()}})
    return str(path)


def load(algorithm: DDPOReinforce | DDPOPPO, path: str | Path) -> None:
    """Put what `save` wrote into an algorithm that was made with the same arguments.

    Args:
        algorithm: the algorithm.
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, none of `save`'s, or of another policy.
    """
    tensors = load_tensors(path)
    metadata = tensors_metadata(path)
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"path={str(path)!r} is no file of diffusion_gym.agents.tianshou.save")
    require_same(parse_json(metadata.get("identity", "{}")), policy_identity(algorithm.policy), f"path={str(path)!r}")
    moments = {name.removeprefix("optimizer."): tensors.pop(name) for name in list(tensors) if name.startswith("optim")}
    weights = _weights(algorithm)
    if {name: value.shape for name, value in tensors.items()} != {k: v.shape for k, v in weights.items()}:
        raise ValueError(
            f"path={str(path)!r} holds the weights of another policy; check the model, trainable, lora_rank and "
            "value_network"
        )
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(tensors[name])
    restore_optimizer(_optimizer(algorithm), moments)
    algorithm.rewards.statistics.load(parse_json(metadata["statistics"]))


def _weights(algorithm: DDPOReinforce | DDPOPPO) -> dict[str, torch.Tensor]:
    weights = _prefixed("policy", dict(denoising_policy(algorithm.policy).trainable_parameters()))
    if isinstance(algorithm, DDPOPPO):
        weights |= _prefixed("critic", dict(algorithm.critic.named_parameters()))
    return weights


def _prefixed(prefix: str, named: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": value for name, value in named.items()}


def _optimizer(algorithm: DDPOReinforce | DDPOPPO) -> Any:
    """Tianshou's wrapper of the optimiser, which has the two methods that storing needs."""
    return algorithm.optim
