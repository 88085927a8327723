"""The command line of `train`: its settings, and a help that shows the options of a first run."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Final, get_type_hints

import tyro

from diffusion_gym.agents.command_line import HELP, parsed

HELP_ALL: Final = "--help-all"
# The options that `--help` shows: what a first run of one's own may change. The others wait behind `--help-all`.
_SHOWN: Final = {
    "run": (
        *("env", "out", "agent", "preset", "seed", "total_reward_queries", "samples_per_iteration", "rollout_batch"),
        *("threads", "track", "resume"),
    ),
    "env_options": ("model", "reward", "prompts", "num_inference_steps", "guidance_scale", "device"),
    "agent_options": ("learning_rate", "clip_range", "trainable", "lora_rank"),
}


def parse_train(args: Sequence[str], shown: bool = True) -> Any:
    """The settings that a `train` command line stands for.

    The options of the agent, and the defaults, depend on `--agent`, `--preset`, `--env` and `--resume`, so these are
    looked at first.

    Args:
        args: the command line.
        shown: whether help, and errors of the command line's form, are printed.

    Raises:
        ValueError: an option that does not exist; with `--resume`, one that differs from the run's own.
    """
    from diffusion_gym.agents.training.runs import load_settings
    from diffusion_gym.agents.training.settings import RunSettings, check_option_names, starting_point
    from diffusion_gym.agents.training.unread import check_read

    asked = [*HELP.intersection(args), *(word for word in args if word == HELP_ALL)]
    resume = "--resume" in args
    if resume:
        if option_value(args, "--out") is None:
            raise ValueError("--resume goes on with the run in --out, which is missing; give --out DIR")
        start = replace(load_settings(Path(str(option_value(args, "--out"))), "--trust" in args), resume=True)
    else:
        env = option_value(args, "--env")
        if env is None and not asked:
            raise ValueError("--env is missing; give an environment id, `diffusion-gym envs` lists them")
        start = starting_point(
            env or "DiffusionDenoise-Shapes-Composition-v0",  # whose defaults the help shows
            option_value(args, "--agent") or "ddpo_is",
            option_value(args, "--preset"),
            option_value(args, "--env.model"),
        )
        start = start if env else replace(start, env=tyro.MISSING)
    if HELP_ALL in args:
        args = ["--help" if word == HELP_ALL else word for word in args]
    check_option_names(args, start)
    with ExitStack() as unseen:
        if not shown:
            unseen.enter_context(redirect_stdout(io.StringIO()))
            unseen.enter_context(redirect_stderr(io.StringIO()))
        if asked and HELP_ALL not in asked:
            _show_help(args, start)
        settings = parsed(RunSettings, args, "train", start, explained=HELP_ALL)
    if resume:
        _check_same(start, settings)
    elif settings.trust:
        raise ValueError("trust=True is for the folder of a run that goes on; give --resume and --out, or leave it out")
    else:
        check_read(start.agent_options, settings.agent_options)
    return settings


def _show_help(args: Sequence[str], start: Any) -> None:
    """Print the options of `_SHOWN` with what `start` has for them, and end the program."""
    parts = {"env_options": "env", "agent_options": "agent"}
    kinds = {name: _shortened(type(getattr(start, name)), _SHOWN[name]) for name in parts}
    given = {name: kind(**vars(getattr(start, name))) for name, kind in kinds.items()}
    changed = {name: Annotated[kind, tyro.conf.arg(name=parts[name])] for name, kind in kinds.items()}
    kind = _shortened(type(start), _SHOWN["run"], changed)
    options = [len(fields(getattr(start, name))) for name in parts]
    number = len(fields(start)) - len(parts) + sum(options)
    kind.__doc__ = (
        f"Train an agent on a denoising environment and write a run folder.\n\nThe options of a first run, of {number} "
        f"in all: `diffusion-gym train {HELP_ALL}` explains every one; with --agent NAME those of that agent."
    )
    parsed(kind, args, "train", kind(**{**vars(start), **given}))


def _shortened(kind: type[Any], shown: Sequence[str], changed: Mapping[str, Any] | None = None) -> type[Any]:
    """A class of options as `kind`, of which a command line has only those of `shown`.

    Args:
        kind: a frozen dataclass.
        shown: names of its fields.
        changed: fields with other types.
    """
    hints, changed = get_type_hints(kind, include_extras=True), changed or {}
    body: dict[str, Any] = {"__doc__": kind.__doc__, "__module__": kind.__module__, "__annotations__": {}}
    for entry in fields(kind):
        if entry.name in changed or entry.name not in shown:
            hidden: Any = Annotated[hints[entry.name], tyro.conf.Suppress]
            body["__annotations__"][entry.name] = changed.get(entry.name, hidden)
            body[entry.name] = field(default=entry.default, default_factory=entry.default_factory)  # type: ignore[misc]
    return dataclass(frozen=True)(type(kind.__name__, (kind,), body))


def option_value(args: Sequence[str], name: str) -> str | None:
    """The value of an option on a command line; of several the last one, as everywhere."""
    value = None
    for index, argument in enumerate(args):
        if argument == name and index + 1 < len(args):
            value = args[index + 1]
        elif argument.startswith(name + "="):
            value = argument.split("=", 1)[1]
    return value


def _check_same(stored: Any, asked: Any) -> None:
    free = {
        "total_reward_queries",
        "checkpoint_every",
        "pictures_every",
        "keep_checkpoints",
        "development_every",
        "track",
        "profile",
        "threads",
        "resume",
        "trust",
        "token_to",
        "resume_from_older",
        "out",
    }
    seconds = asked.env_options.reward_seconds
    stored = replace(stored, env_options=replace(stored.env_options, reward_seconds=seconds))
    for entry in fields(stored):
        before, now = getattr(stored, entry.name), getattr(asked, entry.name)
        if entry.name not in free and before != now:
            raise ValueError(
                f"{entry.name}={now!r} differs from the run's own {before!r}; leave it out with --resume, "
                "or begin a new run in another --out"
            )
