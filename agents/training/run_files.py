"""The JSON files of a run folder but for its lines of records: a schema for each kind, and who reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Strict, model_validator

from diffusion_gym.schemas import Count, Positive, Schema, read_checked

FORMAT: Final = "diffusion-gym-run-2"
OLD_FORMAT: Final = "diffusion-gym-run-1"  # which files of the first versions do not name

_NO_RUN: Final = (
    "it is no config of a diffusion-gym run that this version reads; pass the --out of a training run, or go on with "
    "the version that began it (`versions` in that file)"
)
_Number = float | None  # null is NaN
_Interval = Annotated[tuple[_Number, _Number], Strict(False)]


class RunConfig(Schema):
    """`config.json`.

    Attributes:
        format: of the settings; see `settings.ADDED`.
        settings: those of the run; see `RunSettings.from_json`.
        versions: of Python and the libraries, this package among them.
    """

    format: Literal["diffusion-gym-run-1", "diffusion-gym-run-2"] = OLD_FORMAT
    settings: dict[str, Any]
    versions: dict[str, str]


def read_config(folder: Path) -> RunConfig:
    """The `config.json` of a run folder.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: the file is truncated or of something else.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds no run (no config.json); pass the --out of a training run")
    return read_checked(RunConfig, path, _NO_RUN)


class _Result(Schema):
    reward: _Number
    base_reward: _Number
    success: _Number = None
    base_success: _Number = None


class _PromptResult(_Result):
    samples: Positive


class _Shown(_Result):
    prompt: str


class _Grids(Schema):
    size: Annotated[tuple[Positive, Positive], Strict(False)]
    pictures: list[_Shown]


class _Exploited(_Shown):
    probe: _Number
    base_probe: _Number


class _Probe(Schema):
    name: str
    mean: _Number
    base_mean: _Number
    change_ci95: _Interval
    size: Annotated[tuple[Positive, Positive], Strict(False)]
    pictures: list[_Exploited]  # what `exploited-before.png` and `exploited-after.png` show


class _Comparison(Schema):
    samples: Positive
    reward_mean: _Number
    reward_ci95: _Interval
    base_reward_mean: _Number
    base_reward_ci95: _Interval
    reward_change_ci95: _Interval = (None, None)
    success_change_ci95: _Interval = (None, None)
    vendi: _Number = None
    base_vendi: _Number = None
    probe: _Probe | None = None
    kl_to_base: _Number
    success: _Number = None
    success_ci95: _Interval = (None, None)
    base_success: _Number = None
    base_success_ci95: _Interval = (None, None)
    prompts: dict[str, _PromptResult]
    shown: _Grids | None = None  # what `before.png` and `after.png` show

    @model_validator(mode="after")
    def _success_is_whole(self) -> _Comparison:
        """The four numbers of the success, and its two in each prompt's row, come together."""
        for part, count in ((self, 4), *((row, 2) for row in self.prompts.values())):
            given = sorted(name for name in part.model_fields_set - {"success_change_ci95"} if "success" in name)
            if len(given) != (count if "success" in self.model_fields_set else 0):
                raise ValueError(f"fields={given!r} are not all {count} of the success, or are more than the others'")
        return self


class _Evaluation(_Comparison):
    env: str
    agent: str
    seed: Count
    iteration: Count
    reward_queries: Count
    held_out: _Comparison | None = None


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """The `eval.json` of a run folder; None where there is none.

    Raises:
        ValueError: the file is truncated or of something else.
    """
    path = folder / "eval.json"
    if not path.is_file():
        return None
    return read_checked(_Evaluation, path, "`diffusion-gym eval` writes it anew").model_dump(exclude_unset=True)
