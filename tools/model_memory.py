"""What training adapters takes for each family of models, counted on tensors without memory; writes docs/models.md.

    python -m tools.model_memory

The shapes are the published ones as far as we know them, written down from the classes of diffusers 0.42, whose
defaults are those of FLUX.1 dev, Qwen-Image, Z-Image and Sana 1.6B; Stable Diffusion 3.5 medium's are those of
`diffusion_gym.testing.random_xl_sd3`; FLUX.2 [klein] 4B has 5 + 20 blocks of width 3072 and three layers of Qwen3 4B.
No published config.json was at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional

from diffusion_gym.agents.report.marked import markdown_table, write_marked
from diffusion_gym.models import FAMILIES
from diffusion_gym.models.lora import with_lora

ROOT = Path(__file__).resolve().parents[1]
RANK = 32
SIDES = (512, 1024)


@dataclass(frozen=True)
class Published:
    """A published model's network.

    Attributes:
        model: its name here.
        family: its pipeline's class.
        network: its class in diffusers.
        config: what is not the class's default.
        inputs: the keywords of a call for one picture, by its side in pixels, in bfloat16 on the meta device.
    """

    model: str
    family: str
    network: str
    config: dict[str, Any]
    inputs: Callable[[int], dict[str, Any]]


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def _sd3(side: int) -> dict[str, Any]:
    hidden = {"encoder_hidden_states": _empty(1, 333, 4096), "pooled_projections": _empty(1, 2048)}
    return {"hidden_states": _empty(1, 16, side // 8, side // 8), "timestep": _empty(1), **hidden}


def _flux(side: int) -> dict[str, Any]:
    patches = (side // 16) ** 2
    text = {"encoder_hidden_states": _empty(1, 512, 4096), "pooled_projections": _empty(1, 768), "guidance": _empty(1)}
    places = {"txt_ids": _empty(512, 3), "img_ids": _empty(patches, 3)}
    return {"hidden_states": _empty(1, patches, 64), "timestep": _empty(1), **text, **places}


def _klein(side: int) -> dict[str, Any]:
    patches = (side // 16) ** 2
    places = {"txt_ids": _empty(1, 512, 4), "img_ids": _empty(1, patches, 4)}
    text = {"encoder_hidden_states": _empty(1, 512, 7680)}
    return {"hidden_states": _empty(1, patches, 128), "timestep": _empty(1), "guidance": None, **text, **places}


def _qwen(side: int) -> dict[str, Any]:
    patches = (side // 16) ** 2
    text = {"encoder_hidden_states": _empty(1, 128, 3584), "img_shapes": [[(1, side // 16, side // 16)]]}
    return {"hidden_states": _empty(1, patches, 64), "timestep": _empty(1), **text}


def _z_image(side: int) -> dict[str, Any]:
    return {"x": [_empty(16, 1, side // 8, side // 8)], "t": _empty(1), "cap_feats": [_empty(128, 2560)]}


def _sana(side: int) -> dict[str, Any]:
    text = {"encoder_hidden_states": _empty(1, 300, 2304)}
    return {"hidden_states": _empty(1, 32, side // 32, side // 32), "timestep": _empty(1), **text}


_SD35 = {
    **{"sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536},
    **{"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "out_channels": 16},
    **{"dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"},
}
_KLEIN = {
    **{"in_channels": 128, "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24},
    **{"joint_attention_dim": 7680, "guidance_embeds": False},
}
MODELS = (
    Published("SD35Medium", "StableDiffusion3Pipeline", "SD3Transformer2DModel", _SD35, _sd3),
    Published("FLUX1Dev", "FluxPipeline", "FluxTransformer2DModel", {"guidance_embeds": True}, _flux),
    Published("FLUX2Klein", "Flux2KleinPipeline", "Flux2Transformer2DModel", _KLEIN, _klein),
    Published("QwenImage", "QwenImagePipeline", "QwenImageTransformer2DModel", {}, _qwen),
    Published("ZImageTurbo", "ZImagePipeline", "ZImageTransformer2DModel", {}, _z_image),
    Published("Sana", "SanaPipeline", "SanaTransformer2DModel", {}, _sana),
)


@contextmanager
def saved_bytes(weights: set[int]) -> Iterator[list[int]]:
    """Within this context the bytes are listed that autograd keeps for the backward pass, each tensor once."""
    sizes: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # so that no address is used twice
    total = [0]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in sizes and address not in weights:
            sizes[address] = tensor.numel() * tensor.element_size()
            kept.append(tensor)
            total[0] += sizes[address]
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield total


class _FusedAttention(torch.autograd.Function):
    """What fused kernels keep for the backward pass: no matrix of all pairs of tokens, which the plain one would."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Save the inputs, the output and one float32 number a row."""
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, torch.empty(query.shape[:-1], device=query.device))
        return output


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    found: torch.Tensor = _FusedAttention.apply(query, key, value)
    return found


def counted(published: Published) -> dict[str, float]:
    """Numbers of a model: parameters, those of its adapters, and bytes by size of the pictures."""
    import diffusers

    with torch.device("meta"):
        network: nn.Module = getattr(diffusers, published.network)(**published.config).to(torch.bfloat16)
    network.requires_grad_(False)
    family: Any = FAMILIES[published.family]
    tuned: Any = with_lora(network, RANK, targets=family.lora_targets)
    trained = sum(each.numel() for each in tuned.parameters() if each.requires_grad)
    found = {"network": float(sum(each.numel() for each in network.parameters())), "adapters": float(trained)}
    weights = {each.untyped_storage()._cdata for each in [*tuned.parameters(), *tuned.buffers()]}
    blocks = [each for name, each in tuned.named_children() if isinstance(each, nn.ModuleList)]
    number = sum(map(len, blocks))
    for side in SIDES:
        for checkpointing in (True, False):
            if checkpointing:
                tuned.enable_gradient_checkpointing()
            else:
                tuned.disable_gradient_checkpointing()
            fused = patch.object(functional, "scaled_dot_product_attention", _attention)
            with fused, saved_bytes(weights) as total, torch.autocast("cpu", dtype=torch.bfloat16):
                tuned(**published.inputs(side), return_dict=False)
            found[f"{side}-{'checkpointed' if checkpointing else 'whole'}"] = float(total[0])
        found[f"{side}-checkpointed"] += found[f"{side}-whole"] / number  # of the block that is computed again
    return found


def table(rows: dict[str, dict[str, float]]) -> str:
    """The table of the page, in GiB: adapters in float32 with their gradient and AdamW's two moments."""
    sizes = [f"{side} px, {kind}" for side in SIDES for kind in ("checkpointed", "whole")]
    head = [
        "model",
        "network, 10^9",
        f"adapters of rank {RANK}, 10^6",
        "weights",
        "adapters, gradients, moments",
        *sizes,
    ]
    lines = []
    for model, row in rows.items():
        memory = [row[f"{side}-{kind}"] / 2**30 for side in SIDES for kind in ("checkpointed", "whole")]
        fixed = [2 * row["network"] / 2**30, 16 * row["adapters"] / 2**30]
        numbers = [f"{row['network'] / 1e9:.2f}", f"{row['adapters'] / 1e6:.1f}", *(f"{x:.1f}" for x in fixed + memory)]
        lines.append([f"`{model}`", *numbers])
    return markdown_table(head, lines)


if __name__ == "__main__":
    made = table({each.model: counted(each) for each in MODELS})
    print(made)
    write_marked(ROOT / "docs" / "models.md", {"memory": made})
