"""Command lines that stand for a run's settings."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from diffusion_gym.agents.algorithms import AGENTS, AgentConfig
from diffusion_gym.agents.training.settings import RunSettings, starting_point
from diffusion_gym.agents.training.unread import unread

_ALWAYS: Final = ("env", "agent", "preset", "seed", "total_reward_queries")
_LEFT_OUT: Final = (*_ALWAYS, "out", "resume", "resume_from_older", "trust", "token_to", "env_options", "agent_options")


def quoted(value: Path | str) -> str:
    """A value as one word of a shell command."""
    return shlex.quote(str(value))


def train_command(settings: RunSettings, out: str) -> str:
    """The `diffusion-gym train` command of a run, an option a line: what its preset and the defaults do not say.

    The defaults of an agent that is not registered are in its module, which is not imported: all its options are given.

    Args:
        settings: of the run.
        out: the run folder, quoted for the shell.

    Raises:
        ValueError: this version does not know the run's preset.
    """
    registered = settings.agent in AGENTS
    config = None if registered else AgentConfig
    start = starting_point(settings.env, settings.agent, settings.preset, settings.env_options.model, config)
    words = [
        " ".join(_option("", name, getattr(settings, name))) for name in _ALWAYS if getattr(settings, name) is not None
    ]
    words.append(f"--out {out}")
    words += _changed("", settings, start, _LEFT_OUT)
    words += _changed("env.", settings.env_options, start.env_options)
    agent = settings.agent_options
    words += _changed("agent.", agent, start.agent_options if registered else None, tuple(unread(agent)))
    return " \\\n  ".join(["diffusion-gym train", *words])


def _changed(prefix: str, options: Any, start: Any, left_out: tuple[str, ...] = ()) -> Iterator[str]:
    for entry in fields(options):
        value = getattr(options, entry.name)
        if entry.name in left_out or (start is not None and value == getattr(start, entry.name)):
            continue
        if entry.type == "bool":
            yield f"--{prefix}{'' if value else 'no-'}{entry.name.replace('_', '-')}"
        else:
            yield " ".join(_option(prefix, entry.name, value))


def _option(prefix: str, name: str, value: object) -> Iterator[str]:
    yield f"--{prefix}{name.replace('_', '-')}"
    yield from map(quoted, value if isinstance(value, tuple) else (str(value),))
