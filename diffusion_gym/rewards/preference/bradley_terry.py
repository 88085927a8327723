"""The Bradley-Terry model of choices, linear in frozen features: p(a over b) = sigmoid(w (f_a - f_b)).

Bradley and Terry 1952; the reward model of learning from human feedback (arXiv:1706.03741, equation 1). With so few
answers the head is linear and its weights have a Gaussian prior, so that the fit has one optimum and Laplace's
approximation of the posterior says how sure it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

_STEPS: Final = 100  # of Newton's method, which takes some ten
_PRECISIONS: Final = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of the prior, times the number of features


@dataclass(frozen=True)
class Posterior:
    """Weights of the head: their mode `(D,)` and covariance `(D, D)`, float64."""

    weights: torch.Tensor
    covariance: torch.Tensor

    def spread(self, features: torch.Tensor) -> torch.Tensor:
        """Standard deviation `(N,)` of the scores of features, or of their differences, `(N, D)`."""
        return torch.einsum("nd,de,ne->n", features, self.covariance, features).clamp(min=0).sqrt()


def fit(differences: torch.Tensor, shares: torch.Tensor, precision: float) -> Posterior:
    """The most probable weights, by Newton's method.

    Minimises -sum(s log p + (1 - s) log(1 - p)) + precision |w|^2 / 2 with p = sigmoid(differences w).

    Args:
        differences: f_a - f_b of each answer, float64 `(M, D)`; M may be 0.
        shares: s, 1 where a was chosen, 0 where b was, 1/2 where they are equal, `(M,)`.
        precision: of the prior, larger than 0.
    """
    width = differences.shape[1]
    if len(differences) < width:  # the mode is in the span of the answers, and beside it the prior is the posterior
        basis = _basis(differences)
        inner = fit(differences @ basis, shares, precision)
        beside = torch.eye(width, dtype=torch.float64) - basis @ basis.T
        return Posterior(basis @ inner.weights, basis @ inner.covariance @ basis.T + beside / precision)
    prior = precision * torch.eye(width, dtype=torch.float64)

    def loss(weights: torch.Tensor) -> torch.Tensor:
        logits = differences @ weights
        fitted = torch.nn.functional.binary_cross_entropy_with_logits(logits, shares, reduction="sum")
        return fitted + precision * weights.square().sum() / 2

    weights = torch.zeros(width, dtype=torch.float64)
    hessian, value = prior, loss(weights)
    for _ in range(_STEPS):
        chances = (differences @ weights).sigmoid()
        hessian = differences.T @ (differences * (chances * (1 - chances))[:, None]) + prior
        gradient = differences.T @ (chances - shares) + precision * weights
        step, size = torch.linalg.solve(hessian, gradient), 1.0
        while loss(weights - size * step) > value and size > 1e-6:
            size /= 2
        weights = weights - size * step
        before, value = value, loss(weights)
        if before - value <= 1e-10 * (1 + value.abs()):
            break
    return Posterior(weights, torch.linalg.inv(hessian))


def _basis(differences: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns `(D, M)` in whose span the M rows of `differences` are."""
    return torch.linalg.qr(differences.T).Q


def chosen_precision(
    differences: torch.Tensor, shares: torch.Tensor, groups: Sequence[int], width: int | None = None
) -> float:
    """The precision of the prior whose fits predict held-out answers best, by their log-likelihood in five folds.

    Args:
        differences: float64 `(M, D)`.
        shares: `(M,)`.
        groups: answers of one group are held out together, M numbers.
        width: number of features, where `differences` are in a basis of fewer; by default D.
    """
    width = width or differences.shape[1]

    def unlikely(precision: float) -> float:
        logits = held_out_logits(differences, shares, groups, 5, precision)
        return float(torch.nn.functional.binary_cross_entropy_with_logits(logits, shares, reduction="sum"))

    return min((factor * width for factor in _PRECISIONS), key=unlikely)


def held_out_logits(
    differences: torch.Tensor, shares: torch.Tensor, groups: Sequence[int], folds: int, precision: float | None = None
) -> torch.Tensor:
    """The logit `(M,)` of each answer under a fit that has not seen it, nor another one of its group.

    Args:
        differences: float64 `(M, D)`.
        shares: `(M,)`.
        groups: M numbers.
        folds: into how many parts the groups are dealt.
        precision: of the prior; None chooses it anew in each part from the rest, so that nothing held out decides it.
    """
    width = differences.shape[1]
    if len(differences) < width:
        differences = differences @ _basis(differences)
    logits = torch.zeros(len(shares), dtype=torch.float64)
    fold = torch.tensor(groups) % folds
    for part in fold.unique():
        rest, held = fold != part, fold == part
        own = [group for group, stays in zip(groups, rest.tolist(), strict=True) if stays]
        ranked = {group: place for place, group in enumerate(dict.fromkeys(own))}
        places = [ranked[group] for group in own]
        used = precision or chosen_precision(differences[rest], shares[rest], places, width)
        logits[held] = differences[held] @ fit(differences[rest], shares[rest], used).weights
    return logits
