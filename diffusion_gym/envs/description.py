"""What an environment says of itself: its spaces, its reward, its end and its infos, in place of its class's text."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Final

from gymnasium import spaces

from diffusion_gym.rewards.base import reward_name
from diffusion_gym.scheduling import TERMINAL

if TYPE_CHECKING:
    from diffusion_gym.envs.vector import DenoisingVectorEnv

_MEANINGS: Final = {
    "prompt": "token ids of the prompt c",
    "timestep": f"the scheduler's t of x_t; {TERMINAL} after the last step",
    "latents": "x_t",
}


def description(env: DenoisingVectorEnv) -> str:
    """The text of `help(env)` and `env.__doc__`.

    Args:
        env: the vector environment; what it says holds for one of its N processes.
    """
    model, prompts, sampler = env.model, env.prompt_set, env.sampler_config
    guided = f", guidance scale {sampler.guidance_scale:g}" if model.prompt_length else ""
    height, width, _ = getattr(model, "image_shape", ("H", "W", 3))  # which a model of somebody else's may not say
    parts: Any = env.single_observation_space
    observed = [f"  {name:10}{_space(space)}: {_MEANINGS[name]}" for name, space in parts.items()]
    lines = [
        f"The denoising process of {model.name}, rewarded by {reward_name(env.reward)}.",
        "",
        "Observation, a Dict:",
        *observed,
        "Action:",
        f"  {_space(env.single_action_space)}: x_{{t-1}}, which becomes the next x_t as it is",
        "Reward:",
        f"  0 until the last step; with it that of the picture. {_reward(env)}".rstrip(),
        "Episode:",
        f"  starts from a prompt and noise, terminates after T = {env.horizon} steps{guided}; it is never truncated",
        "Prompts:",
        f"  {_prompts(prompts.name, prompts.prompts) if model.prompt_length else 'none, the model is unconditional'}",
        "Info:",
        "  prompt, the string"
        + ("; metadata, what the prompt set says of it besides" if prompts.metadata else "")
        + f"; with the last step image, uint8 ({height}, {width}, 3), and reward_components",
        "Options of reset: prompt (a string) and latents (x_T) in place of what is drawn.",
        "Keywords of gym.make and gym.make_vec: help(type(env)).",
    ]
    return "\n".join(lines)


def _space(space: spaces.Space[object]) -> str:
    return f"{space.dtype} {space.shape}"


def _reward(env: DenoisingVectorEnv) -> str:
    """The first sentence of the reward's own text."""
    reward = getattr(env.reward, "reward", env.reward)  # the one behind a time limit
    text = inspect.getdoc(reward if inspect.isroutine(reward) else type(reward)) or ""
    return " ".join(text.partition("\n\n")[0].split())


def _prompts(name: str, prompts: tuple[str, ...]) -> str:
    return f"{name}, {len(prompts):,} of them, such as {prompts[0]!r}"
