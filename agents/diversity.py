"""How different the pictures of a model are: the Vendi score and the mean distance of pairs, in a feature space.

Mode collapse is a fall of both (thesis, section 5.4).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion_gym.agents.advantages import rows_by_prompt
from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.models.middle import middle_block, middle_features

Features = NDArray[np.float64]


def has_features(policy: DenoisingPolicy) -> bool:
    """Whether a policy's pretrained network can be asked by `model_features`: a UNet, or a transformer of blocks."""
    return middle_block(policy.model.unet) is not None


@torch.no_grad()
def model_features(policy: DenoisingPolicy, finished: torch.Tensor, batch: int = 64) -> Features:
    """Features of finished latents by the pretrained network itself: what its middle block makes of them.

    The network sees x_0 at the sampler's last timestep and the empty prompt; its middle block, of a transformer the
    middle one of its blocks, is averaged over space (diffusion models' inner activations as image features: Baranchuk
    et al., arXiv:2112.03126).

    Args:
        policy: whose pretrained network is asked.
        finished: x_0, float32 `(N, C, H, W)`.
        batch: pictures at once.

    Returns:
        `(N, D)`.

    Raises:
        ValueError: the network has no middle block.
    """
    model = policy.model
    if not has_features(policy):
        raise ValueError(f"{type(model.unet).__name__} has no middle block to take features from")
    null = policy.embed(model.tokenize([""])) if model.prompt_length else None
    features = []
    for part in finished.split(batch):
        embeddings = None if null is None else null.expand(len(part), *null.shape[1:])
        timesteps = policy.table.network_timesteps[-1].expand(len(part))
        features.append(middle_features(model, part, timesteps, embeddings, parts=1))
    return torch.cat(features).double().cpu().numpy()


def vendi_score(features: Features) -> float:
    """Effective number of different pictures, 1 to N (Friedman and Dieng, arXiv:2210.02410), by cosine similarity.

    exp of the entropy of the eigenvalues of K / N.

    Args:
        features: `(N, D)`.
    """
    unit = _unit(features)
    # The N x N kernel and the D x D one have the same eigenvalues but for zeros.
    kernel = (unit.T @ unit if unit.shape[1] < len(unit) else unit @ unit.T) / len(unit)
    eigenvalues = np.linalg.eigvalsh(kernel)
    eigenvalues = eigenvalues[eigenvalues > 1e-12]
    return float(np.exp(-(eigenvalues * np.log(eigenvalues)).sum()))


def pairwise_distance(features: Features) -> float:
    """Mean cosine distance of two different pictures, 0 to 2; NaN where there is but one.

    Args:
        features: `(N, D)`.
    """
    number, unit = len(features), _unit(features)
    if number < 2:
        return float("nan")
    similarity = (np.square(unit.sum(0)).sum() - number) / (number * (number - 1))
    return float(1 - similarity)


def by_prompt(features: Features, prompts: Sequence[str]) -> dict[str, float]:
    """Both measures within the pictures of one prompt, averaged over the prompts that have at least two.

    Args:
        features: `(N, D)`.
        prompts: the N prompts.

    Returns:
        `vendi` and `distance`; NaN where no prompt has two pictures.
    """
    groups = [features[rows] for rows in rows_by_prompt(prompts).values() if len(rows) > 1]
    if not groups:
        return {"vendi": float("nan"), "distance": float("nan")}
    return {
        "vendi": float(np.mean([vendi_score(group) for group in groups])),
        "distance": float(np.mean([pairwise_distance(group) for group in groups])),
    }


def centred(features: Features, base: Features) -> Features:
    """Features minus the mean of the pretrained model's, so that what all pictures share does not hide differences."""
    return features - base.mean(0)


def _unit(features: Features) -> Features:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
