"""The stochastic samplers of flow matching, for x_t = (1 - t) x0 + t eps: one function each, pure and in float64.

A step leads from t to s < t. The mean of all of them is (1 - s) x0 + coef_eps eps, with the x0 and eps that the
network's velocity stands for; they differ in coef_eps and in the standard deviation sigma of the noise that they add.
At noise level 0 each is Euler's method, coef_eps = s and sigma = 0.

Of the noise s in x_s, `cps` keeps the amount at any step size, coef_eps^2 + sigma^2 = s^2, as DDIM does: exact where
x0 and eps are known, as for data of one point. The other two discretise a stochastic differential equation by Euler
and Maruyama: their x_s has too much noise, by a variance of order (t - s)^2 a step, and their pictures are distributed
as the data in the limit of many steps. Those of `cps` at a fixed level are not: its noise a step does not shrink with
the step, and variety of the data is lost to the estimate of x0 (tests/test_samplers.py has numbers).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch

Coefficients = tuple[torch.Tensor, torch.Tensor]


def flow_sde(now: torch.Tensor, then: torch.Tensor, level: float) -> Coefficients:
    """Flow-GRPO's SDE, equation (9) of arXiv:2505.05470: coef_eps and sigma, float64 `(T,)`.

    With v = eps - x0, sigma_t = a sqrt(t / (1 - t)) and xi ~ N(0, I) its step is

        x_s = x_t + [v + sigma_t^2 / (2 t) (x_t + (1 - t) v)] (s - t) + sigma_t sqrt(t - s) xi,

    where x_t + (1 - t) v = eps. At t = 1, where sigma_t is infinite, 1 - s takes the place of 1 - t, as in the authors'
    code. The last step, s = 0, is as any other: it leaves noise of std a t / sqrt(1 - t), which is small because the
    last t is.

    Args:
        now: t of each step, `(T,)`.
        then: s of each step, `(T,)`.
        level: the noise level a.
    """
    rate = level**2 / (1 - torch.where(now >= 1, then, now))  # sigma_t^2 / t
    return then - (now - then) * rate / 2, (rate * now * (now - then)).sqrt()


def dance_sde(now: torch.Tensor, then: torch.Tensor, level: float) -> Coefficients:
    """DanceGRPO's SDE (arXiv:2505.07818), whose noise is the same at all t; arguments as `flow_sde`.

        x_s = x_t + [v + a^2 / (2 t) eps] (s - t) + a sqrt(t - s) xi,

    as -eps / t is the score. The last step, s = 0, is deterministic: the authors decode its x0 and train on the others.
    """
    last = then <= 0
    coef_eps = torch.where(last, 0.0, then - (now - then) * level**2 / (2 * now))
    return coef_eps, torch.where(last, 0.0, level * (now - then).sqrt())


def cps(now: torch.Tensor, then: torch.Tensor, level: float) -> Coefficients:
    """Coefficients-preserving sampling (arXiv:2509.05952); arguments as `flow_sde`, the level being at most 1.

        x_s = (1 - s) x0 + s cos(a pi / 2) eps + s sin(a pi / 2) xi,

    so that old and new noise together are those of x_s; at level 1 all noise is new. The last step, s = 0, is
    deterministic.
    """
    return then * math.cos(level * math.pi / 2), then * math.sin(level * math.pi / 2)


FLOW_SAMPLERS: Final[dict[str, Callable[[torch.Tensor, torch.Tensor, float], Coefficients]]] = {
    "flow_sde": flow_sde,
    "dance_sde": dance_sde,
    "cps": cps,
}
