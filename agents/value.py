"""A value function V(x_t, t, c): the expected reward of the picture that a state leads to (DPOK's baseline)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from diffusion_gym.agents.policy import DenoisingPolicy

_FREQUENCIES = 32
_STATE = ("latents", "timestep")


class ValueNetwork(nn.Module):
    """Convolutions over x_t, then a perceptron over their mean, the time and the prompt.

    Args:
        channels: C of the latents.
        prompt_features: D of the text embeddings; 0 for an unconditional model.
        num_train_timesteps: length of the noise schedule.
        width: channels of the convolutions and units of the perceptron.
    """

    def __init__(self, channels: int, prompt_features: int, num_train_timesteps: int, width: int = 64) -> None:
        super().__init__()
        self.prompt_features, self.num_train_timesteps = prompt_features, num_train_timesteps
        self.picture = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(2),  # keeps a notion of where things are
            nn.Flatten(),
        )
        self.head = nn.Sequential(
            nn.Linear(4 * width + 2 * _FREQUENCIES + prompt_features, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 1),
        )

    @classmethod
    def of(cls, policy: DenoisingPolicy) -> ValueNetwork:
        """A network for the states of a policy, on its device."""
        model = policy.model
        features = policy.embed(model.tokenize([""])).shape[-1] if model.prompt_length else 0
        return cls(model.latent_shape[0], features, model.num_train_timesteps).to(policy.device)

    def values(self, policy: DenoisingPolicy, observation: Mapping[str, Any]) -> torch.Tensor:
        """Values `(N,)` of N states, as `DenoisingPolicy.distribution` takes them; the policy embeds their prompts."""
        latents, timesteps = (torch.as_tensor(observation[name], device=policy.device) for name in _STATE)
        return self(latents, timesteps.reshape(-1), policy.embeddings_of(observation))

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, embeddings: torch.Tensor | None) -> torch.Tensor:
        """Values `(N,)`.

        Args:
            latents: x_t, float32 `(N, C, H, W)`.
            timesteps: the scheduler's t, int64 `(N,)`.
            embeddings: text embeddings `(N, L, D)`, averaged over the tokens; None for an unconditional model.
        """
        time = timesteps.float() / self.num_train_timesteps
        rates = torch.exp(torch.linspace(0, math.log(100), _FREQUENCIES, device=time.device))
        angles = math.pi * time[:, None] * rates
        parts = [self.picture(latents), angles.sin(), angles.cos()]
        if embeddings is not None:
            parts.append(embeddings.float().mean(1))
        return self.head(torch.cat(parts, dim=1)).squeeze(1)
