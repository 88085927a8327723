"""Options of a policy: what of it trains, and how its network computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from diffusion_gym.agents.finite import Options, require, require_choice
from diffusion_gym.models import DenoisingModel

Trainable = Literal["lora", "full"]
Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class ShardedNetwork:
    """What a policy has besides its network once that is spread over processes.

    Attributes:
        reference: the pretrained network, spread as well.
        skeleton: the network as it was, its weights without numbers.
    """

    reference: nn.Module
    skeleton: nn.Module


def require_whole(model: DenoisingModel) -> None:
    """Raise a ValueError for a model whose network a policy has spread over processes, so that none else can."""
    if getattr(model.unet, "sharded_by", None) is not None:
        raise ValueError(
            f"model={model.name!r} has its network spread over processes by another policy, sharding='fsdp2'; make a "
            "new environment once that policy is gone"
        )


@dataclass(frozen=True)
class PolicyOptions(Options):
    """What of a policy trains, and how its network computes; the defaults are those of the DDPO paper, table F.6."""

    trainable: Trainable = "lora"
    """What trains: low-rank adapters on the attention layers, or all weights of the network."""
    lora_rank: int = 4
    """Rank of the adapters."""
    lora_alpha: float | None = None
    """What an adapter adds is alpha / rank times its product; by default alpha is the rank."""
    lora_targets: tuple[str, ...] | None = None
    """The linear layers that get adapters, by the ends of their names; by default those of the model's family."""
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
        if self.lora_alpha is not None:
            require(self, "larger than 0", "lora_alpha")
        if self.lora_targets is not None and not self.lora_targets:
            raise ValueError("lora_targets=() names no layer; name some, such as to_q, or leave it out")

    @property
    def trained_part(self) -> dict[str, Any]:
        """The options of what trains, by which a `DenoisingPolicy` is made."""
        return {name: getattr(self, name) for name in ("trainable", "lora_rank", "lora_alpha", "lora_targets")}

    @property
    def computation(self) -> dict[str, Any]:
        """The options of how the network computes, as `DenoisingPolicy.set_training` takes them."""
        return {name: getattr(self, name) for name in ("cfg_training", "mixed_precision", "gradient_checkpointing")}
