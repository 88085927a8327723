"""The Gaussian over x_{t-1}: entropies, which Stable-Baselines3 and Tianshou ask for."""

import pytest
import torch
from torch.distributions import Independent, Normal

from diffusion_gym.agents import DenoisingDistribution


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_entropies_are_pytorchs_and_0_at_deterministic_steps(reduction):
    mean, std = torch.randn(3, 4, 2, 2), torch.tensor([0.3, 0.0, 2.0]).view(3, 1, 1, 1)
    entropy = DenoisingDistribution(mean, std, reduction).entropy()
    expected = Independent(Normal(mean[::2], std[::2].expand(2, 4, 2, 2)), 3).entropy()
    torch.testing.assert_close(entropy[::2], expected / (16 if reduction == "mean" else 1))
    assert entropy[1] == 0
