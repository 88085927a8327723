"""Checks of what comes into an environment; each error names the argument, its value and the remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from diffusion_gym.devices import to_device
from diffusion_gym.models import DenoisingModel
from diffusion_gym.prompts import PromptSet
from diffusion_gym.registry import unknown_name
from diffusion_gym.rewards import Reward
from diffusion_gym.rewards.base import check_prompt, check_size, needed_metadata, reward_name
from diffusion_gym.storage import json_text

_OPTIONS = ["prompt", "latents", "reset_mask"]


def named_choice(name: str, value: Any, choices: Sequence[Any]) -> Any:
    """`value` if it is one of `choices` (or equals the value of one that is an enum member)."""
    for choice in choices:
        if value == choice or (value is not None and value == getattr(choice, "value", None)):
            return choice
    known = ", ".join(repr(getattr(choice, "value", choice)) for choice in choices)
    raise ValueError(f"{name}={value!r} must be one of {known}")


def check_render_mode(render_mode: Any) -> Any:
    """None or `rgb_array`.

    Raises:
        ValueError: another mode, such as `human`, whose window Gymnasium opens for `gym.make` alone.
    """
    try:
        return named_choice("render_mode", render_mode, [None, "rgb_array"])
    except ValueError as error:
        if render_mode != "human":
            raise
        raise ValueError(f"{error}; gym.make with render_mode='human' shows one environment in a window") from None


def check_num_envs(num_envs: Any) -> int:
    """N as a Python integer: NumPy's small ones wrap around."""
    if not isinstance(num_envs, int | np.integer) or num_envs < 1:
        raise ValueError(f"num_envs={num_envs!r} must be a whole number of at least 1")
    return int(num_envs)


def merged(name: str, mapping: Mapping[str, Any] | None, **given: Any) -> dict[str, Any]:
    """The keywords in `mapping`, the argument `name`, with those that were `given` by themselves and are not None."""
    found = dict(mapping or {})
    for key, value in given.items():
        if value is not None and found.setdefault(key, value) != value:
            raise ValueError(f"{key}={value!r} contradicts {name}[{key!r}]={found[key]!r}; give one of them")
    return found


@dataclass(frozen=True)
class ResetOptions:
    """What a reset is to do, checked as a whole before anything changes.

    Attributes:
        mask: the envs to reset, bool `(N,)`.
        prompts: one for each env, or None to draw them.
        latents: x_T, float32 `(N, C, H, W)` on the environment's device, or None to draw it.
    """

    mask: np.ndarray
    prompts: list[str] | None
    latents: torch.Tensor | None


def check_options(options: dict[str, Any] | None, shape: tuple[int, ...], device: torch.device) -> ResetOptions:
    """The options of a reset.

    Args:
        options: by name, or None.
        shape: `(N, C, H, W)`.
        device: the environment's device.

    Raises:
        ValueError: an option that is unknown or of the wrong kind.
    """
    for name in options or {}:
        if name not in _OPTIONS:
            raise ValueError(unknown_name("options", name, _OPTIONS))
    given = {name: value for name, value in (options or {}).items() if value is not None}
    return ResetOptions(
        check_reset_mask(given.get("reset_mask"), shape[0]),
        check_prompts(given["prompt"], shape[0]) if "prompt" in given else None,
        check_latents(given["latents"], shape, device) if "latents" in given else None,
    )


def check_seeds(seed: Any, num_envs: int) -> list[int | None]:
    """One seed an env: `seed + i`, or `seed[i]`; None for an env that goes on with its generator."""
    if seed is None:
        return [None] * num_envs
    listed = not isinstance(seed, int | np.integer)
    if listed and not (isinstance(seed, Sequence) or (isinstance(seed, np.ndarray) and seed.ndim == 1)):
        raise ValueError(f"seed={seed!r} must be None, a whole number, or a list with one for each of {num_envs} envs")
    seeds = list(seed) if listed else [int(seed) + index for index in range(num_envs)]
    if len(seeds) != num_envs:
        raise ValueError(f"seed={seed!r} lists {len(seeds)} seeds for num_envs={num_envs}; give one each")
    for one in seeds:
        if one is not None and (not isinstance(one, int | np.integer) or one < 0):
            raise ValueError(f"seed={seed!r} holds {one!r}; a seed is None or a whole number of at least 0")
    return [None if one is None else int(one) for one in seeds]


def check_prompts(prompts: Any, num_envs: int) -> list[str]:
    """One prompt an env from `options["prompt"]`, a string for all or one each."""
    given = [prompts] * num_envs if isinstance(prompts, str) else prompts
    listed = isinstance(given, Sequence | np.ndarray) and len(given) == num_envs
    if not listed or not all(isinstance(entry, str) for entry in given):
        each = f", or a list of {num_envs}, one for each env" if num_envs > 1 else ""
        raise ValueError(f"options['prompt']={prompts!r} must be a string{each}")
    for entry in given:
        try:
            entry.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"options['prompt']={entry!r} holds half a character, which no tokenizer reads ({error.reason}); "
                "write it as whole Unicode text"
            ) from None
    return [str(entry) for entry in given]


def check_reset_mask(mask: Any, num_envs: int) -> np.ndarray:
    """A bool `(N,)` mask with at least one true entry; all true where None is given."""
    if mask is None:
        return np.ones(num_envs, dtype=bool)
    array = mask.cpu().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)
    if array.dtype != np.bool_ or array.shape != (num_envs,) or not array.any():
        raise ValueError(
            f"options['reset_mask']={mask!r} must be a bool array of shape ({num_envs},) with at least one True"
        )
    return array


def check_metadata(reward: Reward, prompt_set: PromptSet, prompts: Sequence[str], argument: str) -> None:
    """Refuse prompts that the reward cannot judge, as for a key that their metadata lack, before a picture is made.

    Args:
        reward: the reward.
        prompt_set: holds the metadata.
        prompts: those to look at.
        argument: where the prompts come from, for errors.

    Raises:
        ValueError: the reward, the key, the first prompt that lacks it and what to write.
    """
    needed = needed_metadata(reward)
    if not needed and not hasattr(reward, "check_prompt"):
        return
    for prompt, told in zip(prompts, prompt_set.metadata_of(prompts), strict=True):
        if lacking := [key for key in needed if key not in told]:
            raise ValueError(
                f"reward={reward_name(reward)!r} needs {lacking[0]!r} in the metadata of each prompt, and {argument}: "
                f"{prompt!r} has {', '.join(map(repr, told)) or 'none'}; give a .jsonl file with lines such as "
                f'{{"prompt": {json_text(prompt)}, {json_text(lacking[0])}: ...}} (docs/prompts.md)'
            )
        try:
            check_prompt(reward, prompt, told)
        except ValueError as error:
            raise ValueError(f"reward={reward_name(reward)!r} with {argument}: {error}") from error


def check_prompt_set(reward: Reward, prompts: PromptSet) -> None:
    """`check_metadata` of all prompts of a set."""
    check_metadata(reward, prompts, (*prompts.prompts, *prompts.held_out), f"prompts={prompts.name!r}")


def check_picture_size(reward: Reward, model: DenoisingModel) -> None:
    """Refuse a model whose pictures have a size that the reward cannot judge, before one is made.

    Raises:
        ValueError: the size, the reward and what it says.
    """
    height, width = getattr(model, "image_shape", (0, 0))[:2]  # a model of one's own may leave it out
    if not height:
        return
    try:
        check_size(reward, height, width)
    except ValueError as error:
        raise ValueError(f"height={height}, width={width} with reward={reward_name(reward)!r}: {error}") from error


def check_latents(latents: Any, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Finite x_T for each env, float32 `(N, C, H, W)`, from `options["latents"]`, one for all or one each."""
    known = f"give {shape[1:]}" + (f" or {shape}" if shape[0] > 1 else "")
    try:
        given = torch.as_tensor(latents, dtype=torch.float32, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"options['latents'] is {type(latents).__name__}, no array of numbers; {known}") from error
    if tuple(given.shape) not in (shape[1:], shape):
        raise ValueError(f"options['latents'] has shape {tuple(given.shape)}; {known}")
    if not bool(given.isfinite().all()):
        raise ValueError("options['latents'] hold NaN or infinite values")
    return given.expand(shape)


def check_action(actions: Any, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The actions as a float32 tensor on `device`.

    Args:
        actions: a tensor on `device`, or a NumPy array.
        shape: `(N, C, H, W)`, or `(C, H, W)` of a single environment.
        device: the environment's device.

    Raises:
        ValueError: wrong type, shape, dtype or device.
    """
    if not isinstance(actions, torch.Tensor | np.ndarray):
        raise ValueError(f"actions={type(actions).__name__} must be a torch tensor or a NumPy array")
    if tuple(actions.shape) != shape:
        raise ValueError(f"actions have shape {tuple(actions.shape)}; x_(t-1) must have shape {shape}")
    if actions.dtype not in (torch.float32, np.dtype(np.float32)):
        raise ValueError(f"actions have dtype {actions.dtype}; convert them to float32")
    if isinstance(actions, np.ndarray):
        # A copy: PyTorch warns of arrays that are read-only, and refuses negative strides.
        return to_device(np.array(actions, order="C"), device)
    if actions.device.type != device.type:
        raise ValueError(f"actions are on {actions.device}, the environment is on {device}; move them there")
    return actions.detach()
