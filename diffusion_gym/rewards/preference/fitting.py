"""From a folder of labels to a reward: the fit, and how well it predicts answers that it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from diffusion_gym.rewards.preference.bradley_terry import Posterior, chosen_precision, fit, held_out_logits
from diffusion_gym.rewards.preference.labels import Labels

LEAST_ANSWERS: Final = 50  # that choose a picture; with fewer the interval of the accuracy is wider than 0.25
_FOLDS: Final = 10
_NO_SPREAD: Final = 1e-6  # a feature of a smaller deviation is the same everywhere
_AT_ONCE: Final = 64  # pictures
Features = Callable[[torch.Tensor, Sequence[str]], torch.Tensor]


@dataclass(frozen=True)
class Scaling:
    """Mean and deviation of each feature over the labelled pictures, float64 `(D,)`."""

    mean: torch.Tensor
    std: torch.Tensor

    @staticmethod
    def of(features: torch.Tensor) -> Scaling:
        """That of features `(N, D)`; what does not vary keeps deviation 1, and is 0 then."""
        std = features.std(0, correction=0)
        return Scaling(features.mean(0), torch.where(std > _NO_SPREAD, std, 1.0))

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Features `(N, D)` with mean 0 and deviation 1."""
        return (features.double() - self.mean.to(features.device)) / self.std.to(features.device)


@dataclass(frozen=True)
class Fitted:
    """A head, and what is known of it.

    Attributes:
        scaling: of the features.
        posterior: of its weights.
        answers: answers that it is fitted to.
        choices: of these, those that choose a picture.
        accuracy: share of the choices that fits without them predict.
        interval: Wilson's 95 % interval of that share.
    """

    scaling: Scaling
    posterior: Posterior
    answers: int
    choices: int
    accuracy: float
    interval: tuple[float, float]


def picture_features(labels: Labels, names: Sequence[str], features: Features, device: torch.device) -> torch.Tensor:
    """Features of pictures of a folder, float64 `(N, D)` on the CPU.

    Raises:
        FileNotFoundError: the file of a picture is missing.
    """
    parts = []
    for start in range(0, len(names), _AT_ONCE):
        part = names[start : start + _AT_ONCE]
        prompts = [labels.pictures[name].prompt for name in part]
        parts.append(features(labels.images(part).to(device), prompts).double().cpu())
    return torch.cat(parts)


def fit_labels(labels: Labels, features: Features, device: torch.device) -> Fitted:
    """Fit a head to the answers of a folder.

    Args:
        labels: the folder.
        features: of pictures `(n, 3, H, W)` and their n prompts, float `(n, D)`.
        device: where the features are computed.

    Raises:
        ValueError: too few answers choose a picture.
        FileNotFoundError: the file of a picture is missing.
    """
    from scipy import stats

    answers = labels.all_answers()
    decided = torch.tensor([answer.answer != "equal" for answer in answers], dtype=torch.bool)
    choices = int(decided.sum())
    if choices < LEAST_ANSWERS:
        raise ValueError(
            f"labels={str(labels.folder)!r} holds {choices} answers that choose a picture, and a fit needs "
            f"{LEAST_ANSWERS}; go on with `diffusion-gym label --out {labels.folder}`"
        )
    names = sorted({name for answer in answers for name in answer.pair})
    found = picture_features(labels, names, features, device)
    scaling, row = Scaling.of(found), {name: place for place, name in enumerate(names)}
    scaled = scaling(found)
    first, second = (torch.tensor([row[getattr(answer, side)] for answer in answers]) for side in ("first", "second"))
    differences = scaled[first] - scaled[second]
    shares = torch.tensor([answer.share for answer in answers], dtype=torch.float64)
    place = {pair: number for number, pair in enumerate(dict.fromkeys(answer.pair for answer in answers))}
    groups = [place[answer.pair] for answer in answers]
    right = (held_out_logits(differences, shares, groups, _FOLDS) > 0) == (shares == 1.0)
    hits = int(right[decided].sum())
    low, high = stats.binomtest(hits, choices).proportion_ci(0.95, method="wilson")
    posterior = fit(differences, shares, chosen_precision(differences, shares, groups))
    return Fitted(scaling, posterior, len(answers), choices, hits / choices, (float(low), float(high)))
