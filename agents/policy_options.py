"""Options of a policy: what of it trains, and how its network computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffusion_gym.agents.finite import Options, require, require_choice

Trainable = Literal["lora", "full"]
Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class PolicyOptions(Options):
    """What of a policy trains, and how its network computes; the defaults are those of the DDPO paper, table F.6."""

    trainable: Trainable = "lora"
    """What trains: low-rank adapters on the attention layers, or all weights of the UNet."""
    lora_rank: int = 4
    """Rank of the adapters."""
    cfg_training: bool = True
    """Train both branches of the guided prediction; off trains the conditional one alone (DDPO, appendix G.1)."""
    mixed_precision: Precision = "no"
    """Compute the UNet in bf16 or fp16; latents, step maths and weights stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self, "trainable", Trainable)
        require_choice(self, "mixed_precision", Precision)
        require(self, "at least 1", "lora_rank")
