"""Pictures for vision-language models."""

import numpy as np
import pytest
import torch


@pytest.fixture
def pictures():
    """Six pictures of noise, uint8 (6, 12, 10, 3)."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 12, 10, 3), dtype=np.uint8))
