"""Weighted sums of rewards, each part standardised or as it is."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import torch
from pydantic import PositiveFloat, Strict

from diffusion_gym.registry import unknown_name
from diffusion_gym.rewards.base import Reward, RewardOutput, check_prompt, check_size, evaluate, needed_metadata
from diffusion_gym.rewards.differentiable import differentiable_scores, is_differentiable
from diffusion_gym.schemas import checked
from diffusion_gym.storage import read_json, write_json

_MeanStd = Annotated[tuple[Annotated[float, Strict()], Annotated[PositiveFloat, Strict()]], Strict(False)]
ZScores = str | Path | Mapping[str, Sequence[float]]
_NO_SPREAD: Final = 1e-6  # a standard deviation below it says nothing of the scale


class WeightedSum:
    """Sum of `weight * score`, or of `weight * (score - mean) / std` for the parts that are standardised.

    Mean and standard deviation are fixed numbers, given or estimated once: a reward whose scale moves with the policy
    would be another reward in evaluation, and after a resume.

    Args:
        rewards: reward and weight by name. A part of weight 0 is recorded only.
        z_scores: `[mean, std]` of the parts to standardise, by name; or a JSON file of such a mapping. A file that does
            not exist is written from the first batch scored, for all parts; a part without spread keeps std 1.
        default_prompts: the prompt set that goes with the sum.

    Attributes:
        background: whether a part is evaluated in the background; see `Reward`.
        needs_metadata: what the parts need, together.
        differentiable: whether all parts with a weight are; then the sum has a gradient where the pictures have one.

    Raises:
        ValueError: no parts, a weight that is no finite number, or means and deviations that do not fit the parts.
    """

    def __init__(
        self,
        rewards: Mapping[str, tuple[Reward, float]],
        *,
        z_scores: ZScores | None = None,
        default_prompts: str | None = None,
    ) -> None:
        if not rewards:
            raise ValueError("a weighted sum needs at least one reward; give {'Aesthetic': 1.0} or the like")
        self.rewards = {name: reward for name, (reward, _) in rewards.items()}
        self.weights = {name: _finite("weight", name, weight) for name, (_, weight) in rewards.items()}
        self.name = ",".join(f"{name}={weight:g}" for name, weight in self.weights.items())
        self.background = any(getattr(reward, "background", False) for reward in self.rewards.values())
        self.needs_metadata = tuple(dict.fromkeys(k for part in self.rewards.values() for k in needed_metadata(part)))
        counted = [part for name, part in self.rewards.items() if self.weights[name]]
        self.differentiable = bool(counted) and all(map(is_differentiable, counted))
        self.default_prompts = default_prompts
        self._unwritten: Path | None = None
        self._statistics: dict[str, tuple[float, float]] = {}
        if isinstance(z_scores, str | Path):
            self._open(Path(z_scores))
        elif z_scores is not None:
            self._statistics = self._checked(z_scores, "z_scores")

    def __call__(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        """Score `images`, float `(N, 3, H, W)` in [0, 1].

        Returns:
            The sum; in `info` each part's own score as `<name>`, before weight and standardisation, and its components
            as `<name>/<component>`. A part that could not be scored makes the sum NaN, unless its weight is 0.

        Raises:
            RewardError: a part failed.
        """
        outputs = {name: self._scored(name, images, prompts, metadata) for name in self.rewards}
        if self._unwritten is not None:
            self._estimate(self._unwritten, {name: output.scores for name, output in outputs.items()})
        total = torch.zeros(len(prompts), device=images.device)
        info: dict[str, torch.Tensor] = {}
        for name, output in outputs.items():
            if self.weights[name]:
                mean, std = self._statistics.get(name, (0.0, 1.0))
                total = total + self.weights[name] * ((output.scores - mean) / std)
            info[name] = output.scores
            info |= {f"{name}/{part}": value for part, value in output.info.items()}
        return RewardOutput(total, info)

    def _scored(
        self, name: str, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        """A part's output, with gradient where one is asked for and the part counts."""
        reward = self.rewards[name]
        if self.differentiable and self.weights[name] and images.requires_grad and torch.is_grad_enabled():
            return RewardOutput(differentiable_scores(reward, images, prompts, metadata))
        return evaluate(reward, images.detach(), prompts, metadata)

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        """Refuse a prompt that a part cannot judge."""
        for reward in self.rewards.values():
            check_prompt(reward, prompt, metadata)

    def check_size(self, height: int, width: int) -> None:
        """Refuse a size that a part cannot judge."""
        for reward in self.rewards.values():
            check_size(reward, height, width)

    def cancel(self) -> None:
        """Have the parts that wait give up."""
        for reward in self.rewards.values():
            if callable(cancel := getattr(reward, "cancel", None)):
                cancel()

    def _open(self, path: Path) -> None:
        if path.exists():
            self._statistics = self._read(path)
        elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"z_scores={str(path)!r} does not exist, and every process would estimate other numbers; write it in a "
                "run of one process first"
            )
        else:
            self._unwritten = path

    def _read(self, path: Path) -> dict[str, tuple[float, float]]:
        return self._checked(read_json(path), f"z_scores={str(path)!r}")

    def _checked(self, given: Any, where: str) -> dict[str, tuple[float, float]]:
        given = dict(given) if isinstance(given, Mapping) else given
        found = checked(dict[str, _MeanStd], given, where, "give [mean, std] by name of reward, with a std above 0")
        for name in found:
            if name not in self.rewards:
                raise ValueError(unknown_name("z_scores", name, list(self.rewards)))
        return found

    def _estimate(self, path: Path, scores: Mapping[str, torch.Tensor]) -> None:
        """Fix the numbers from one batch, or take those that another environment of the run wrote meanwhile."""
        if path.exists():
            self._statistics = self._read(path)
        else:
            found = {name: _mean_std(name, values) for name, values in scores.items()}
            write_json(path, found)
            self._statistics = found
            number = len(next(iter(scores.values())))
            warnings.warn(
                f"z_scores={str(path)!r} did not exist; mean and std were estimated from {number} pictures and written",
                stacklevel=2,
            )
        self._unwritten = None


def _mean_std(name: str, scores: torch.Tensor) -> tuple[float, float]:
    usable = scores[scores.isfinite()].double()
    if len(usable) < 2:
        raise ValueError(
            f"z_scores cannot be estimated for {name!r} from {len(usable)} scores; give [mean, std], or score a "
            "larger batch first"
        )
    std = float(usable.std(correction=0))
    return float(usable.mean()), std if std > _NO_SPREAD else 1.0


def _finite(what: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) == float("inf") or value != value:
        raise ValueError(f"{what}={value!r} of reward {name!r} must be a finite number")
    return float(value)
