"""The JSON files of a benchmark: the record of a run, and the points that a run has behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, ConfigDict, Field

from diffusion_gym.agents.training.folders import check_name
from diffusion_gym.schemas import Count, Positive, Schema, checked, read_checked
from diffusion_gym.storage import read_json

FORMAT: Final = "diffusion-gym-benchmark-2"
OLD_FORMAT: Final = "diffusion-gym-benchmark-1"  # its settings lack options that came to be since; see settings.ADDED
POINTS: Final = "points.json"

Record = dict[str, Any]
_Seconds = Annotated[float, Field(ge=0)]


def file_name(agent: str) -> str:
    """An agent's name as a part of file names: without the colon of `module:Class` and the slash of `library/agent`."""
    return agent.replace(":", ".").replace("/", ".")


def check_agent(agent: str) -> str:
    """`agent`, of which file names are made.

    Raises:
        ValueError: it could name a file elsewhere.
    """
    check_name("agent", file_name(agent))
    return agent


TaskName = Annotated[str, AfterValidator(lambda name: check_name("task", name))]
AgentName = Annotated[str, AfterValidator(check_agent)]


class _Point(Schema):
    """A measurement; null is NaN. What is not declared is a component of the reward or a measure."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | None]
    reward_queries: Count
    seconds: _Seconds
    network_evaluations: Count | None  # none in records of runs that did not count them
    reward: float | None


class _Settings(Schema):
    """Those of the run, compared as a whole; only what a report shows is declared."""

    model_config = ConfigDict(extra="allow")
    total_reward_queries: Positive
    env_options: dict[str, Any]
    agent_options: dict[str, Any]


class _Run(Schema):
    format: Literal["diffusion-gym-benchmark-1", "diffusion-gym-benchmark-2"]
    task: TaskName
    agent: AgentName
    seed: Count
    threads: Count


class _Finished(_Run):
    versions: dict[str, str]
    hardware: dict[str, str | Count | None]
    suite: str
    trained: str
    settings: _Settings
    points: Annotated[list[_Point], Field(min_length=1)]
    peak_memory_mb: float
    total_seconds: _Seconds


class _Failed(_Run):
    """It holds what was known when the run failed."""

    error: str
    traceback: list[str] = []
    versions: dict[str, str] = {}
    hardware: dict[str, str | Count | None] = {}
    suite: str = ""
    trained: str = ""
    settings: _Settings | None = None
    total_seconds: _Seconds = 0.0


def read_record(path: Path) -> Record:
    """The record of a run; one that failed has `error`, the others `points`.

    Raises:
        ValueError: the file is truncated or of something else.
    """
    stored = read_json(path)
    schema: type[Schema] = _Failed if isinstance(stored, dict) and "error" in stored else _Finished
    remedy = "remove the file, and the same `diffusion-gym bench` runs it again"
    return checked(schema, stored, str(path), remedy).model_dump(exclude_unset=True)


def read_points(folder: Path) -> list[dict[str, Any]]:
    """The points that the run in a folder has behind it; none before the first.

    Raises:
        ValueError: the file is truncated or of something else.
    """
    path = folder / POINTS
    if not path.is_file():
        return []
    remedy = "remove the file, and the same `diffusion-gym bench` begins this run anew"
    return [point.model_dump(exclude_unset=True) for point in read_checked(list[_Point], path, remedy)]
