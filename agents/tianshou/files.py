"""What Tianshou's algorithms have learned, in safetensors files in place of Tianshou's pickles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffusion_gym.agents.adapters import load_learned, save_learned
from diffusion_gym.agents.identity import require_same
from diffusion_gym.agents.optimizer_state import optimizer_tensors, restore_optimizer
from diffusion_gym.agents.tianshou.ddpo import DDPOPPO, DDPOReinforce
from diffusion_gym.agents.tianshou.policy import denoising_policy, policy_identity
from diffusion_gym.storage import joined, part_of, restore_parameters

_FORMAT = "diffusion-gym-tianshou-1"


def save(algorithm: DDPOReinforce | DDPOPPO, path: str | Path) -> str:
    """Write what trains, the optimiser and the prompts' statistics as one safetensors file, without pickle.

    `OnPolicyTrainerParams(save_best_fn=lambda algorithm: save(algorithm, path))` keeps the best policy.

    Args:
        algorithm: the algorithm.
        path: the file.

    Returns:
        The path, which Tianshou's `save_checkpoint_fn` has to return.
    """
    tensors = {**_weights(algorithm), **joined({"optimizer": optimizer_tensors(_optimizer(algorithm))})}
    content = {"statistics": algorithm.rewards.statistics.state(), "identity": policy_identity(algorithm.policy)}
    save_learned(path, _FORMAT, tensors, content)
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
    owner, (tensors, content) = f"path={str(path)!r}", load_learned(path, _FORMAT, "diffusion_gym.agents.tianshou.save")
    require_same(content.get("identity", {}), policy_identity(algorithm.policy), owner)
    stored = {name: value for name, value in tensors.items() if not name.startswith("optimizer.")}
    restore_parameters(_weights(algorithm), stored, owner)
    restore_optimizer(_optimizer(algorithm), part_of(tensors, "optimizer"))
    algorithm.rewards.statistics.load(content["statistics"])


def _weights(algorithm: DDPOReinforce | DDPOPPO) -> dict[str, torch.nn.Parameter]:
    critic = dict(algorithm.critic.named_parameters()) if isinstance(algorithm, DDPOPPO) else {}
    parts: Any = {"policy": denoising_policy(algorithm.policy).trainable_parameters(), "critic": critic}
    weights: Any = joined(parts)
    return weights


def _optimizer(algorithm: DDPOReinforce | DDPOPPO) -> torch.optim.Optimizer:
    """PyTorch's optimiser within Tianshou's wrapper, which has no name for it and hides the parameters' shapes."""
    optimizer: torch.optim.Optimizer = algorithm.optim._optim
    return optimizer
