"""The shell's completion of `diffusion-gym`, by tyro: all commands with their options, as one parser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, make_dataclass
from importlib import import_module
from typing import Annotated, Any, Final

import tyro

FLAGS: Final = ("--tyro-print-completion", "--tyro-write-completion")
SHELLS: Final = ("bash", "zsh", "fish", "tcsh")
# Each command's options; a name alone is of `cli`.
_OPTIONS: Final = {
    "envs": "cli:EnvsOptions",
    "presets": "presets_table:PresetsOptions",
    "train": "training.settings:RunSettings",
    "eval": "cli:EvalOptions",
    "report": "cli:ReportOptions",
    "bench": "benchmark.command:BenchOptions",
    "download": "downloads:DownloadOptions",
    "push": "publishing:PushOptions",
    "label": "label.command:LabelOptions",
    "fit-preferences": "label.command:FitOptions",
    "serve-reward": "training.reward_options:ServeRewardOptions",
    "demo": "demo:DemoOptions",
}


def print_completion(args: Sequence[str]) -> None:
    """Print or write the completion script that tyro makes.

    Args:
        args: one of `FLAGS`, a shell and, to write it, a path.

    Raises:
        ValueError: another flag or shell, or too few words.
    """
    flag, *rest = args
    if flag not in FLAGS:
        raise ValueError(f"option={flag!r} is unknown; completion is by {' or '.join(FLAGS)}")
    if len(rest) != 1 + FLAGS.index(flag) or rest[0] not in SHELLS:
        place = " PATH" if FLAGS.index(flag) else ""
        raise ValueError(f"{flag} {' '.join(rest)!r} must be {flag} SHELL{place}, the shell one of {', '.join(SHELLS)}")
    tyro.extras.subcommand_cli_from_dict(_commands(), prog="diffusion-gym", args=list(args))


def _commands() -> dict[str, Any]:
    """The class of options of each command; those of `train` with the options of its own agent."""
    from diffusion_gym.agents.algorithms import agent_class
    from diffusion_gym.agents.training.settings import RunSettings

    found = dict[str, Any]()
    for command, place in _OPTIONS.items():
        module, name = place.split(":")
        found[command] = getattr(import_module(f"diffusion_gym.agents.{module}"), name)
    options: Any = Annotated[agent_class(RunSettings.agent).Config, tyro.conf.arg(name="agent")]
    default: Any = field(default_factory=agent_class(RunSettings.agent).Config)
    found["train"] = make_dataclass(
        "RunSettings", [("agent_options", options, default)], bases=(found["train"],), frozen=True
    )
    return found
