"""Keywords of a reward on the command line: `--env.reward-kwargs key value ...`, and `serve-reward`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

import tyro

from diffusion_gym.rewards import make_reward
from diffusion_gym.rewards.server.app import check_address, serve
from diffusion_gym.rewards.server.limits import Limits
from diffusion_gym.rewards.server.wire import TOKEN
from diffusion_gym.rewards.vlm.chat import API_KEY
from diffusion_gym.storage import parse_json

_SECRETS: Final = {"token": TOKEN, "api_key": API_KEY}


@dataclass(frozen=True)
class ServeRewardOptions:
    """Serve a reward over HTTP, for `--env.reward http://HOST:PORT` elsewhere."""

    reward: Annotated[str, tyro.conf.Positional]
    """A reward by name, module:attribute, or a weighted sum such as Aesthetic=1,Compressibility=0.1."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    host: str = "127.0.0.1"
    """Address to listen on; one that other machines reach needs a token."""
    token: str | None = None
    """What clients must know; better given in the environment variable DIFFUSION_GYM_REWARD_TOKEN, which does not show
    in the list of processes."""
    reward_kwargs: dict[str, str] | None = None
    """Keywords of the reward: names and values in turn, values as JSON where they are JSON."""
    limits: Annotated[Limits, tyro.conf.arg(name="")] = field(default_factory=Limits)
    """What the server takes."""


def serve_reward(options: ServeRewardOptions) -> None:
    """Build the reward and serve it until Ctrl-C.

    Raises:
        ValueError: the reward or an option is wrong.
        OSError: the port is taken.
    """
    token = os.environ.get(TOKEN) if options.token is None else options.token
    check_address(options.host, options.port, token)
    reward = make_reward(options.reward, **parse_keywords(options.reward_kwargs or {}))
    serve(reward, host=options.host, port=options.port, token=token, limits=options.limits)


def parse_keywords(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords with the values of their JSON; what is no JSON is a string, `"1"` in quotes is one too."""
    return {key.replace("-", "_"): _parsed(value) for key, value in given.items()}


def check_no_secrets(keywords: Mapping[str, Any], argument: str) -> None:
    """Refuse keywords that a run folder's `config.json` must not hold.

    Args:
        keywords: of rewards.
        argument: what the user calls them.

    Raises:
        ValueError: a token or key, at any depth.
    """
    for key, value in keywords.items():
        if key in _SECRETS and value is not None:
            raise ValueError(
                f"{argument} holds {key!r}, which would be written to config.json; set {_SECRETS[key]} in the "
                "environment instead"
            )
        if isinstance(value, Mapping):
            check_no_secrets(value, argument)


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(value, value)
