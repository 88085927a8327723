"""Text embeddings and the guidance scale as the tensors that networks take."""

from __future__ import annotations

import torch
from torch.nn.functional import pad


def guidance_embedding(scale: float, width: int) -> torch.Tensor:
    """What a network that takes the guidance scale itself is told of it, `(1, width)`: sines and cosines of w - 1.

    That of diffusers' pipelines, for networks distilled as in arXiv:2210.03142 and arXiv:2310.04378.

    Args:
        scale: w.
        width: the network's `time_cond_proj_dim`.
    """
    half = width // 2
    rates = torch.exp(torch.arange(half) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = (torch.tensor(scale - 1.0) * 1000.0)[None, None] * rates
    return pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


def pack_pooled(hidden: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """Text embeddings as one tensor, which the policy caches and stacks: `pooled` as further rows of `hidden`.

    Args:
        hidden: of each token, `(N, L, D)`.
        pooled: of the prompt, `(N, P)`.

    Returns:
        `(N, L + ceil(P / D), D)`; zeros fill the last row.
    """
    number, _, width = hidden.shape
    rows = -(-pooled.shape[1] // width)
    return torch.cat([hidden, pad(pooled, (0, rows * width - pooled.shape[1])).view(number, rows, width)], dim=1)


def unpack_pooled(packed: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`hidden` `(N, L, D)` and `pooled` `(N, width)` of what `pack_pooled` made."""
    rows = -(-width // packed.shape[2])
    return packed[:, :-rows], packed[:, -rows:].flatten(1)[:, :width]


def valid_tokens(padded: torch.Tensor) -> torch.Tensor:
    """Which rows of embeddings `(N, L, D)` are of tokens, bool `(N, L)`; the others are zeros, as no encoder makes."""
    return (padded != 0).any(-1)
