"""The losses of the agents, as pure functions of log-probabilities and distributions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from diffusion_gym.agents.distribution import DenoisingDistribution
from diffusion_gym.scheduling import gaussian_kl

KLForm = Literal["squared_log_ratio", "closed_form", "unscaled"]


@dataclass(frozen=True)
class Surrogate:
    """A surrogate loss and what it tells about the update; all `(N,)` and, but for `loss`, without gradient.

    Attributes:
        loss: to be averaged and minimised.
        ratio: pi_theta / pi_old.
        clipped: 1 where the clipped branch was taken, so that the gradient is zero.
        approx_kl: (log ratio)^2 / 2, an estimate of the KL divergence to the old policy.
    """

    loss: torch.Tensor
    ratio: torch.Tensor
    clipped: torch.Tensor
    approx_kl: torch.Tensor

    def rows(self) -> dict[str, torch.Tensor]:
        """The loss and what goes to the metrics, each `(N,)`."""
        return {"loss": self.loss, "clip_fraction": self.clipped, "approx_kl": self.approx_kl}


def score_function_loss(log_prob: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """REINFORCE: -A log pi, `(N,)`, whose gradient is the score-function estimator of DDPO, equation (3).

    Args:
        log_prob: of the actions under the policy that sampled them, `(N,)`.
        advantage: `(N,)`.
    """
    return -advantage * log_prob


def kl_penalty(
    policy: DenoisingDistribution, reference: DenoisingDistribution, action: torch.Tensor, form: KLForm
) -> torch.Tensor:
    """How far the policy's step is from the pretrained model's, `(N,)`, with gradient: in nats, scaled for a loss.

    The scale is that of log-probabilities: 1 with `sum`, 1/D with `mean` over D dimensions. So a weight of the penalty
    beside advantages is in advantages a nat, whatever the reduction and the size of the latents: loss and weight are
    those of the reward A - weight * KL, KL being the divergence of the step.

    Args:
        policy: pi_theta(.|s).
        reference: the pretrained model's distribution for the same states, without gradient.
        action: the actions x_{t-1} that were taken, `(N, C, H, W)`.
        form: `squared_log_ratio`, (l_theta - l_ref)^2 / 2 with l in nats (DDPO_ISKL, algorithm 5, here for each step),
            which estimates the divergence from one action; `closed_form`, ||mu - mu_ref||^2 / (2 sigma^2), the
            divergence (DPOK, lemma 4.2); `unscaled`, ||mu - mu_ref||^2, which is not in nats.

    Raises:
        ValueError: an unknown form.
    """
    if form not in get_args(KLForm):
        raise ValueError(f"kl_form={form!r} must be one of {', '.join(get_args(KLForm))}")
    if form == "squared_log_ratio":
        return 0.5 * _size(policy) * (policy.log_prob(action) - reference.log_prob(action)) ** 2
    scaled = form == "closed_form"
    return gaussian_kl(policy.mean, reference.mean, policy.std, policy.reduction, denominator=scaled)


def with_kl_penalty(
    rows: Mapping[str, torch.Tensor],
    policy: DenoisingDistribution,
    reference: DenoisingDistribution,
    action: torch.Tensor,
    form: KLForm,
    weight: float,
) -> dict[str, torch.Tensor]:
    """The rows of a loss with the penalty in `loss`, and with `kl_penalty` `(N,)`, which is whole: in nats a step.

    Args:
        rows: with `loss`, `(N,)`.
        policy: as `kl_penalty`'s.
        reference: as `kl_penalty`'s.
        action: as `kl_penalty`'s.
        form: as `kl_penalty`'s.
        weight: in advantages a nat.
    """
    penalty = kl_penalty(policy, reference, action, form)
    return {**rows, "loss": rows["loss"] + weight * penalty, "kl_penalty": _size(policy) * penalty.detach()}


def _size(policy: DenoisingDistribution) -> int:
    """By how much log-probabilities are reduced."""
    return policy.dimensions if policy.reduction == "mean" else 1


def clipped_surrogate(
    log_prob: torch.Tensor, old_log_prob: torch.Tensor, advantage: torch.Tensor, clip_range: float
) -> Surrogate:
    """PPO's clipped objective with importance weights: DDPO_IS, equation (4) and appendix F.1.

    Args:
        log_prob: of the actions under the policy that is trained, `(N,)`.
        old_log_prob: under the policy that sampled them, `(N,)`.
        advantage: `(N,)`.
        clip_range: the ratio counts within [1 - clip_range, 1 + clip_range].
    """
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    free = -advantage * ratio
    bounded = -advantage * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(free, bounded)
    return Surrogate(loss, ratio.detach(), (bounded > free).float().detach(), 0.5 * log_ratio.detach() ** 2)


def normalized_surrogate(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    divergence: torch.Tensor,
    std: torch.Tensor,
    interval: torch.Tensor,
    advantage: torch.Tensor,
    clip_range: float,
) -> Surrogate:
    """GRPO-Guard's clipped objective, whose ratios are alike at all steps (arXiv:2510.22319, equation 8).

    A ratio of Gaussians has a log-mean of -D and a spread that goes with 1 / std. The normalised one,
    exp[(l - l_old + D) std], has a log-mean of 0 and the spread of the means' distance, so that one clip range fits all
    steps; the loss is divided by the step's length in time, which evens out the steps' gradients.

    Args:
        log_prob: of the actions under the policy that is trained, `(N,)`.
        old_log_prob: under the policy that sampled them, `(N,)`.
        divergence: D, of the two policies' Gaussians, `(N,)`, reduced like log-probabilities.
        std: of a step, `(N,)`.
        interval: length of a step in units of the whole process, `(N,)`.
        advantage: `(N,)`.
        clip_range: the normalised ratio counts within [1 - clip_range, 1 + clip_range].
    """
    normalized = (log_prob - old_log_prob + divergence) * std
    found = clipped_surrogate(normalized, torch.zeros_like(normalized), advantage, clip_range)
    return Surrogate(found.loss / interval, found.ratio, found.clipped, divergence.detach())


def masked_surrogate(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    divergence: torch.Tensor,
    advantage: torch.Tensor,
    bound: float,
) -> Surrogate:
    """Flow-DPPO's objective: the exact divergence, not the ratio, says where to stop (arXiv:2606.11025, equation 18).

    A transition has no gradient where D reaches the bound and its own update would lead further away: ratio > 1 with a
    positive advantage, or ratio < 1 with a negative one.

    Args:
        log_prob: of the actions under the policy that is trained, `(N,)`.
        old_log_prob: under the policy that sampled them, `(N,)`.
        divergence: D, of the two policies' Gaussians, `(N,)`, reduced like log-probabilities.
        advantage: `(N,)`.
        bound: the largest divergence, in the same unit.
    """
    log_ratio = log_prob - old_log_prob
    ratio, loss = log_ratio.exp(), -advantage * log_ratio.exp()
    onward = torch.where(advantage > 0, ratio > 1, (ratio < 1) & (advantage < 0))
    stopped = (divergence >= bound) & onward
    loss = torch.where(stopped, loss.detach(), loss)
    return Surrogate(loss, ratio.detach(), stopped.float(), divergence.detach())
