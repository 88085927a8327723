"""The pictures that are labelled: of a pretrained model, or of what a run has made of it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import gymnasium as gym
import numpy as np
import torch

from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.rollout import collect
from diffusion_gym.agents.training.checkpoint import Checkpoints
from diffusion_gym.agents.training.runs import build_agent, load_settings
from diffusion_gym.envs.registration import GENERIC_ID
from diffusion_gym.prompts import prompts_of_words
from diffusion_gym.rewards import REWARDS
from diffusion_gym.rewards.preference.labels import Labels, Source

if TYPE_CHECKING:
    from diffusion_gym.agents.label.command import LabelOptions

_LABELLED: Final = 4  # second entry of a seed path, after the seed: neither training's nor an evaluation's
_SAMPLER: Final = ("num_inference_steps", "guidance_scale", "eta")  # what an option may choose
_BATCH: Final = 64  # pictures at once, but for larger groups


class _Unrewarded:
    """Stands in for the reward of a run, which may need weights or a server, and is not asked here."""

    name = "none"

    def __init__(self, env: str) -> None:
        reward: Any = gym.spec(env).kwargs.get("reward")
        self.default_prompts = REWARDS.default_prompts(reward) if reward in REWARDS else None

    def __call__(self, images: torch.Tensor, prompts: Any, metadata: Any) -> torch.Tensor:
        return torch.zeros(len(images))


def add_pictures(options: LabelOptions, folder: Path) -> Labels:
    """Labels in `folder` with the pictures of the run or model that the options name, made where they are not there.

    Raises:
        ValueError: an option is wrong, or the labels are of another model.
        FileNotFoundError: there is no such run or model.
        Untrusted: the run was not made here, and names something.
    """
    settings = None if options.run is None else load_settings(options.run, options.trust)
    keywords: dict[str, Any] = {"model": options.model} if settings is None else settings.env_options.keywords()
    id_ = GENERIC_ID if settings is None else settings.env
    for name in ("reward", "reward_kwargs", "reward_seconds", "strict"):
        keywords.pop(name, None)
    if options.prompts is not None:
        keywords["prompts"] = prompts_of_words(options.prompts)
    sampler = {name: value for name in _SAMPLER if (value := getattr(options, name)) is not None}
    keywords |= {**sampler, "reward": _Unrewarded(id_), "device": options.device, "autoreset_mode": "Disabled"}
    groups = options.pictures // options.group
    at_once = max(number for number in range(1, groups + 1) if not groups % number and number <= _most(options.group))
    env: Any = gym.make_vec(id_, num_envs=at_once * options.group, **keywords)
    made_of = {name: value for name, value in env.unwrapped.model_kwargs.items() if name in ("revision", "variant")}
    labels = Labels.begin(folder, Source(model=env.unwrapped.model.name, **made_of))
    averaged: Any = nullcontext()
    if settings is None:
        policy, made_by = DenoisingPolicy.from_env(env), str(options.model)
    else:
        agent = build_agent(settings, env, from_checkpoint=True)
        done = Checkpoints(Path(str(options.run), "checkpoints")).load(agent)
        policy, averaged, made_by = agent.policy, agent.averaged(), f"{options.run}, iteration {done.iteration}"
    made_by += "".join(f", {name} {value}" for name, value in {**sampler, "seed": options.seed}.items())
    if any(picture.made_by == made_by for picture in labels.pictures.values()):
        return labels
    print(f"Making {options.pictures} pictures ...", flush=True)
    with averaged:
        pictures, prompts = _sampled(env, policy, options, reference=settings is None)
    labels.add_pictures(pictures, prompts, made_by)
    return labels


def _most(group: int) -> int:
    """Groups at once."""
    return max(1, _BATCH // group)


def _sampled(
    env: Any, policy: DenoisingPolicy, options: LabelOptions, reference: bool
) -> tuple[torch.Tensor, list[str]]:
    """Groups of pictures, uint8 `(N, H, W, 3)`, and their prompts: as many groups of each prompt as can be."""
    rng = np.random.default_rng([options.seed, _LABELLED])
    known = list(dict.fromkeys(env.unwrapped.prompt_set.prompts))
    order = rng.permutation(len(known))
    chosen = [known[order[group % len(known)]] for group in range(options.pictures // options.group)]
    prompts = [prompt for prompt in chosen for _ in range(options.group)]
    pictures = []
    for start in range(0, len(prompts), env.num_envs):
        noise, seed = (int(number) for number in rng.integers(2**31, size=2))
        generator = torch.Generator(policy.device).manual_seed(noise)
        asked = {"prompt": prompts[start : start + env.num_envs]}
        pictures.append(collect(env, policy, generator, seed=seed, options=asked, reference=reference).images)
    return torch.cat(pictures), prompts
