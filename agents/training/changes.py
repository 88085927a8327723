"""What a training changed besides its reward: how different pictures are, and a reward that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from diffusion_gym.agents.diversity import by_prompt, centred, has_features, model_features, vendi_score
from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.rollout import Trajectories
from diffusion_gym.envs.vector import DenoisingVectorEnv
from diffusion_gym.images import to_float
from diffusion_gym.rewards import Reward, evaluate
from diffusion_gym.rewards.base import reward_name

# The size of a picture as a JPEG: it tells of detail that is lost, needs no weights, and no prompt matters to it.
PROBE: Final = "Incompressibility"
_BATCH: Final = 64  # pictures that a probe scores at once
_EXPLOITED: Final = 8  # pictures shown


@dataclass(frozen=True)
class Probed:
    """What a reward that is not trained on makes of both models' pictures.

    Attributes:
        name: the reward.
        tuned: scores of the tuned policy's pictures `(N,)`.
        base: of the pretrained model's.
    """

    name: str
    tuned: torch.Tensor
    base: torch.Tensor

    def exploited(self, rise: torch.Tensor) -> list[int]:
        """The pictures whose reward rose most while the probe fell, by their places; the largest fall first in a tie.

        Args:
            rise: of the trained reward `(N,)`; what is not finite counts as none.
        """
        fall = (self.base - self.tuned).double().nan_to_num(0.0, 0.0, 0.0)
        rise = rise.double().nan_to_num(0.0, 0.0, 0.0)
        places = [index for index in range(len(rise)) if rise[index] > 0 and fall[index] > 0]
        return sorted(places, key=lambda index: (-float(rise[index]), -float(fall[index])))[:_EXPLOITED]


def probe_for(env: VectorEnv[Any, Any, Any], asked: str | None) -> str | None:
    """The probe that is asked for; by default `PROBE`, or none where the training is on the size of a JPEG too.

    Args:
        env: the environment.
        asked: a reward's name, or `none`; None for the default.
    """
    if asked is not None:
        return None if asked == "none" else asked
    trained = reward_name(cast(DenoisingVectorEnv, env.unwrapped).reward)
    return None if "compressibility" in trained.lower() else PROBE


def probed(env: VectorEnv[Any, Any, Any], reward: Reward, tuned: Trajectories, base: Trajectories) -> Probed:
    """Score the pictures of both models with another reward.

    Raises:
        RewardError: it failed.
    """
    prompts = cast(DenoisingVectorEnv, env.unwrapped).prompt_set

    def scores(part: Trajectories) -> torch.Tensor:
        found = []
        for first in range(0, len(part), _BATCH):
            asked = list(part.prompts[first : first + _BATCH])
            pictures = to_float(part.images[first : first + _BATCH])
            found.append(evaluate(reward, pictures, asked, prompts.metadata_of(asked)).scores.cpu())
        return torch.where(part.rewards.cpu().isfinite(), torch.cat(found), torch.nan)  # a picture with NaN is black

    return Probed(reward_name(reward), scores(tuned), scores(base))


def diversity(policy: DenoisingPolicy, tuned: Trajectories, base: Trajectories) -> dict[str, float]:
    """Vendi scores, within a prompt where prompts repeat, else of all pictures; none for a network without features.

    Returns:
        `vendi` and `base_vendi`: the effective number of different pictures among those of one prompt, or of all.
    """
    if not has_features(policy):
        return {}
    before = model_features(policy, base.finished)
    scored = {}
    for name, part, features in (
        ("vendi", tuned, centred(model_features(policy, tuned.finished), before)),
        ("base_vendi", base, centred(before, before)),
    ):
        within = by_prompt(features, part.prompts)["vendi"]
        scored[name] = within if np.isfinite(within) else vendi_score(features)
    return scored


def change_interval(tuned: torch.Tensor, base: torch.Tensor) -> tuple[float, float]:
    """Student's 95 % interval of the mean change, pair by pair; a pair that is not finite is left out."""
    difference = (tuned.double() - base.double()).cpu().numpy()
    return mean_interval(difference[np.isfinite(difference)])


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """Student's 95 % interval of a mean; the mean itself, twice, where nothing varies or there is nothing (NaN)."""
    from scipy import stats

    error = stats.sem(values) if len(values) > 1 else 0.0
    if not error > 0:
        mean = float(values.mean()) if len(values) else float("nan")
        return mean, mean
    low, high = stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=error)
    return float(low), float(high)


def rows_of(places: Sequence[int], prompts: Sequence[str], **values: torch.Tensor) -> list[dict[str, Any]]:
    """For each place its prompt and, by name, its value; those of a picture that is shown."""
    return [
        {"prompt": prompts[place], **{name: float(part[place]) for name, part in values.items()}} for place in places
    ]
