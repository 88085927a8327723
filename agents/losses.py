"""The losses of the policy-gradient agents, as pure functions of log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
