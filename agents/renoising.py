"""Finished pictures noised anew, which carry nothing of the noise that they were sampled with.

A sampled transition credits the policy with the noise that it happened to draw at each step, which is most of the
variance of its gradient. Advantage Weighted Matching (AWM, arXiv:2509.25050) goes back to pretraining's states: the
finished picture x_0 with fresh noise, x_t = signal_t x_0 + noise_t eps. The action that fits such a state is the mean
of the sampler's step for this x_0 and eps, in which the policy puts its estimates of both; its log-probability is, up
to a constant, a denoising loss: -||mean(x_0, eps) - mean_theta||^2 / (2 sigma_t^2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from diffusion_gym.agents.rollout import Trajectories
from diffusion_gym.devices import to_device
from diffusion_gym.scheduling import Prediction, StepTable, add_noise, step_mean

Observation = dict[str, torch.Tensor]

# What a network should predict of x_t = signal x_0 + noise eps: the inverse of `scheduling.predict_x0`.
_TARGETS: Final[dict[Prediction, Callable[..., torch.Tensor]]] = {
    "epsilon": lambda x0, eps, signal, noise: eps,
    "sample": lambda x0, eps, signal, noise: x0,
    "v_prediction": lambda x0, eps, signal, noise: signal * eps - noise * x0,
    "flow": lambda x0, eps, signal, noise: eps - x0,
}


def fresh_noise(trajectories: Trajectories, number: int, seed: int) -> torch.Tensor:
    """Noise for `number` states, `(number, C, H, W)`, on the trajectories' device; the same for the same seed."""
    shape = (number, *trajectories.finished.shape[1:])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return to_device(noise, trajectories.finished.device)


def renoised_states(
    table: StepTable, trajectories: Trajectories, samples: torch.Tensor, steps: torch.Tensor, eps: torch.Tensor
) -> Observation:
    """Observations of M finished pictures noised anew.

    Args:
        table: the sampler's step table.
        trajectories: whose finished pictures they are.
        samples: which of them, int64 `(M,)`.
        steps: the step of the sampler whose noise level each gets, int64 `(M,)`.
        eps: the noise, `(M, C, H, W)`.
    """
    signal, noise = (column[steps].view(-1, 1, 1, 1) for column in (table.signal, table.noise))
    latents = add_noise(trajectories.finished[samples], eps, signal, noise)
    states = {"timestep": table.timesteps[steps][:, None], "step": steps, "latents": latents}
    return {**trajectories.conditions(samples), **states}


def renoised_transitions(
    table: StepTable, trajectories: Trajectories, samples: torch.Tensor, steps: torch.Tensor, eps: torch.Tensor
) -> tuple[Observation, torch.Tensor]:
    """Such observations and their actions `(M, C, H, W)`; arguments as for `renoised_states`."""
    observation = renoised_states(table, trajectories, samples, steps, eps)
    return observation, step_mean(table, steps, observation["latents"], trajectories.finished[samples], eps)


def prediction_targets(table: StepTable, steps: torch.Tensor, x0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """What the model's network should predict of noised pictures, `(M, C, H, W)`: noise, x_0 or velocity.

    Args:
        table: the sampler's step table, which says what the network predicts.
        steps: the step whose noise level each has, int64 `(M,)`.
        x0: the clean pictures, `(M, C, H, W)`.
        eps: the noise, the same shape.
    """
    signal, noise = (column[steps].view(-1, 1, 1, 1) for column in (table.signal, table.noise))
    return _TARGETS[table.prediction](x0, eps, signal, noise)


def squared_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over dimensions of the squared difference of two predictions `(M, C, H, W)`: `(M,)`."""
    return (prediction - target).square().flatten(1).mean(1)
