"""Checkpoints: one safetensors file each, with JSON and a checksum in its header; the last few are kept."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from diffusion_gym.agents.algorithms import Agent
from diffusion_gym.agents.identity import fingerprint
from diffusion_gym.agents.sharding import gathered
from diffusion_gym.schemas import Count, Schema, checked, parse_checked
from diffusion_gym.storage import exact_json, load_tensors, save_tensors, tensors_metadata

_FORMAT = "diffusion-gym-checkpoint-2"
_UNCHECKED = "diffusion-gym-checkpoint-1"  # without a checksum: of earlier versions


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    iteration: int = 0
    """Iterations done."""
    reward_queries: int = 0
    """Pictures scored in training."""


class DamagedCheckpoint(ValueError):
    """A checkpoint's file is truncated, changed, or of another program."""


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
            Diverged: what the agent learned is not finite; the same holds.
        """
        path = self.folder / f"iteration-{progress.iteration:06d}.safetensors"
        agent.check_finite(progress.iteration)
        state = exact_json({**vars(progress), "model": _model(agent), "agent": agent.state()})
        tensors = gathered(agent.tensors(), agent.processes)  # in every process
        if not agent.processes.main:
            return path
        save_tensors(path, tensors, {"format": _FORMAT, "state": state, "sha256": checksum(tensors, state)})
        for old in self.paths()[: -self.keep]:
            old.unlink()
        return path

    def load(self, agent: Agent, path: Path | None = None, *, older: bool = False) -> Progress:
        """Put the newest checkpoint, or the one at `path`, into `agent`.

        Args:
            agent: of the same model, policy and options; a file that is refused changes nothing of it.
            path: of a checkpoint.
            older: pass over damaged checkpoints to the newest one that is whole. Where there is one, those are renamed
                to `*.damaged`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is damaged, lacks a part or has an unknown one, or is of another model or policy.
        """
        if path is None:
            path, tensors, state = self._newest(older)
        else:
            tensors, state = _read(path)
        try:
            _require_model(state.model, agent)
            _require_same("state", state.agent, agent.state())
            learned = checked(agent.State, state.agent, "agent", _REMEDY).model_dump()
            with _as_a_whole(agent):
                agent.load_tensors(tensors)
                agent.load_state(learned)
                _require_same_tensors(tensors, agent.tensors())
            return Progress(state.iteration, state.reward_queries)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"checkpoint={str(path)!r} does not fit this run: {error}") from error

    def _newest(self, older: bool) -> tuple[Path, dict[str, torch.Tensor], _State]:
        """The newest checkpoint or, where that is damaged and `older` says so, the newest one that is whole."""
        damaged: list[Path] = []
        first: DamagedCheckpoint | None = None
        for path in reversed(self.paths()):
            try:
                tensors, state = _read(path)
            except DamagedCheckpoint as error:
                first = first or error
                damaged.append(path)
                continue
            if first is not None and not older:
                raise DamagedCheckpoint(
                    f"{first}; {path.name} is whole: go on from it with --resume --resume-from-older"
                ) from first
            for entry in damaged:  # they would be taken for newer ones than those to come
                entry.rename(entry.with_name(f"{entry.name}.damaged"))
            return path, tensors, state
        if first is not None:
            raise DamagedCheckpoint(f"{first}; no checkpoint of {self.folder} is whole") from first
        raise FileNotFoundError(f"{self.folder} holds no checkpoint; train without --resume to begin a run")


class _State(Schema):
    """What the header says of a run; `agent` is read by `Agent.State`."""

    iteration: Count
    reward_queries: Count
    model: str | None = None  # of which files of earlier versions say nothing
    agent: dict[str, Any]


_REMEDY: Final = "go on with the version that wrote it (`versions` in config.json)"


def _read(path: Path) -> tuple[dict[str, torch.Tensor], _State]:
    """The tensors and the state of a file.

    Raises:
        DamagedCheckpoint: it is truncated, changed since it was written, or of another program.
    """
    try:
        tensors, metadata = load_tensors(path), tensors_metadata(path)
    except ValueError as error:
        raise DamagedCheckpoint(str(error)) from error
    if metadata.get("format") not in (_FORMAT, _UNCHECKED):
        raise DamagedCheckpoint(f"checkpoint={str(path)!r} is no checkpoint of diffusion-gym; pass a run's own folder")
    text = metadata.get("state", "")
    if metadata["format"] == _FORMAT and metadata.get("sha256") != checksum(tensors, text):
        raise DamagedCheckpoint(f"checkpoint={str(path)!r} is not what was written: its checksum differs")
    try:
        return tensors, parse_checked(_State, text, f"checkpoint={str(path)!r}, state", _REMEDY)
    except ValueError as error:
        raise DamagedCheckpoint(str(error)) from error


def checksum(tensors: Mapping[str, torch.Tensor], state: str) -> str:
    """SHA-256 of names, types, shapes and bytes of tensors on the CPU, and of the state."""
    found = hashlib.sha256(state.encode())
    for name, value in sorted(tensors.items()):
        found.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _require_same(kind: str, stored: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """What a checkpoint holds is all that an agent would store, and nothing else."""
    for names, word in ((set(own) - set(stored), "lacks"), (set(stored) - set(own), "has the unknown")):
        if names:
            raise ValueError(f"it {word} {kind} {min(names)!r}")


def _require_same_tensors(stored: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> None:
    """The tensors of a checkpoint are those that an agent has taken, of the same shapes and types."""
    _require_same("tensor", stored, own)
    for name, value in own.items():
        found, wanted = ((tuple(part.shape), part.dtype) for part in (stored[name], value))
        if found != wanted:
            raise ValueError(f"its tensor {name!r} is {found[1]} {found[0]}, and has to be {wanted[1]} {wanted[0]}")


@contextmanager
def _as_a_whole(agent: Agent) -> Iterator[None]:
    """Within this context an agent changes as a whole: after a failure it is as it was."""
    tensors = {name: _kept(value.detach()) for name, value in agent.tensors().items()}
    state = copy.deepcopy(agent.state())
    try:
        yield
    except BaseException:
        agent.load_tensors(tensors)
        agent.load_state(state)
        raise


def _kept(value: torch.Tensor) -> torch.Tensor:
    """A copy on the host; of a tensor that is spread over processes, of this one's part where it is."""
    return value.clone() if hasattr(value, "to_local") else value.cpu().clone()


def _model(agent: Agent) -> str:
    return fingerprint(agent.policy.model, agent.policy.config)


def _require_model(stored: str | None, agent: Agent) -> None:
    """The pretrained model is the one that training began from; files of earlier versions do not say."""
    found = _model(agent)
    if stored not in (None, found):
        raise ValueError(
            f"model={agent.policy.model.name!r} is not as it was: its weights and schedule have fingerprint {found}, "
            f"the run's have {stored}; put the model back, or train anew"
        )
