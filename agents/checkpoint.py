"""Checkpoints: one safetensors file each, with JSON in its header; written atomically, the last few kept."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_gym.agents.algorithms import Agent
from diffusion_gym.storage import exact_json, load_tensors, save_tensors, tensors_metadata

_FORMAT = "diffusion-gym-checkpoint-1"


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    iteration: int = 0
    """Iterations done."""
    reward_queries: int = 0
    """Pictures scored in training."""


class Checkpoints:
    """The `checkpoints/` folder of a run.

    Args:
        folder: the folder; made when first written to.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return sorted(self.folder.glob("iteration-*.safetensors"))

    def save(self, agent: Agent, progress: Progress) -> Path:
        """Write a checkpoint, then remove those beyond `keep`; every process calls it, the main one writes.

        Raises:
            OSError: the disk is full or not writable; the earlier checkpoints are as they were.
        """
        path = self.folder / f"iteration-{progress.iteration:06d}.safetensors"
        content = {**vars(progress), "agent": agent.state()}
        tensors = agent.tensors()  # in every process: what is spread over them is gathered
        if not agent.processes.main:
            return path
        save_tensors(path, tensors, {"format": _FORMAT, "state": exact_json(content)})
        for old in self.paths()[: -self.keep]:
            old.unlink()
        return path

    def load(self, agent: Agent, path: Path | None = None) -> Progress:
        """Put the newest checkpoint, or the one at `path`, into `agent`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is truncated, or from another program or policy.
        """
        if path is None:
            paths = self.paths()
            if not paths:
                raise FileNotFoundError(f"{self.folder} holds no checkpoint; train without --resume to begin a run")
            path = paths[-1]
        tensors, state = load_tensors(path), self._state(path)
        try:
            agent.load_tensors(tensors)
            agent.load_state(state["agent"])
            return Progress(state["iteration"], state["reward_queries"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"checkpoint={str(path)!r} does not fit this run: {error}") from error

    def _state(self, path: Path) -> dict[str, Any]:
        metadata = tensors_metadata(path)
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"checkpoint={str(path)!r} is no checkpoint of diffusion-gym; pass a run's own folder")
        state: dict[str, Any] = json.loads(metadata["state"])
        return state
