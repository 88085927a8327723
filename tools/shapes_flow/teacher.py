"""Shapes' denoiser, read as the velocity of a rectified flow: what ShapesFlow is distilled from.

Both models noise the same latents by x = a x0 + b eps; a rectified flow has (a, b) = (1 - t, t), Shapes the square
roots of (1 - abar) for b and of abar for a. Where b / a agree, x differs by a factor alone, so one model's posterior
mean of (x0, eps) is the other's. As a target it has the expectation of eps - x0 and none of its variance.
"""

from __future__ import annotations

from typing import Final

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel

from diffusion_gym.models.shapes import WEIGHTS

LAST: Final = 0.9  # beyond this t an error of eps is ten times as large in the velocity; there the data is the target


class Teacher:
    """The velocity E[eps - x0 | x_t, caption] by Shapes' networks.

    Args:
        device: where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(WEIGHTS, subfolder="unet").to(device).eval()
        self.text_encoder = CLIPTextModel.from_pretrained(WEIGHTS, subfolder="text_encoder").to(device).eval()
        self.unet.requires_grad_(False)
        self.text_encoder.requires_grad_(False)
        abar = DDIMScheduler.from_pretrained(WEIGHTS, subfolder="scheduler").alphas_cumprod.double()
        self.log_ratios = ((1 - abar) / abar).sqrt().log().float().to(device)

    @torch.no_grad()
    def velocity(
        self, x: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor, empty: torch.Tensor, guidance: float
    ) -> torch.Tensor:
        """The velocity at `x` `(N, C, H, W)`, of times `t` `(N,)` in (0, 1), for captions of `tokens` `(N, L)`.

        It is guided by `guidance` away from the caption `empty` `(1, L)`, unless that is 1.
        """
        t = t.clamp(1e-3, LAST)
        size = ((1 - t).square() + t.square()).sqrt()[:, None, None, None]
        noisy, timestep = x / size, self.timestep(t)
        if guidance != 1:
            tokens = torch.cat([tokens, empty.expand_as(tokens)])
            noisy, timestep = noisy.repeat(2, 1, 1, 1), timestep.repeat(2)
        text = self.text_encoder(tokens).last_hidden_state
        eps = self.unet(noisy, timestep, encoder_hidden_states=text, return_dict=False)[0]
        if guidance != 1:
            conditional, unconditional = eps.chunk(2)
            eps = unconditional + guidance * (conditional - unconditional)
        return (eps - x) / (1 - t)[:, None, None, None]

    def timestep(self, t: torch.Tensor) -> torch.Tensor:
        """The (fractional) timestep of Shapes at which noise and signal are as at `t`."""
        wanted = (t / (1 - t)).log()
        above = torch.searchsorted(self.log_ratios, wanted).clamp(1, len(self.log_ratios) - 1)
        low, high = self.log_ratios[above - 1], self.log_ratios[above]
        return above - 1 + ((wanted - low) / (high - low)).clamp(0, 1)
