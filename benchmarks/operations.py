"""Where the operations of Stable Diffusion 1.4 go, counted on networks that have shapes and no weights.

    python benchmarks/operations.py          # prints the table
    python benchmarks/operations.py --page   # writes it to docs/gpu.md

Nothing is computed and no card is needed. What a part costs bounds what hiding or leaving it out can save.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import tyro
from matrix_rate import operations

from diffusion_gym.agents.report.marked import markdown_table, write_marked
from diffusion_gym.models.lora import with_lora
from diffusion_gym.testing.random_sd14 import SD14, Widths, sd14_networks

ROOT: Final = Path(__file__).resolve().parent.parent
_TOKENS: Final = 77
_DTYPE: Final = torch.bfloat16  # of a GPU's frozen weights, where adapters are not summed with them


@dataclass(frozen=True)
class Options:
    """Count the operations of one picture, and of training on it."""

    steps: int = 50
    """Denoising steps T."""
    lora_rank: int = 4
    """Rank of the adapters."""
    page: bool = False
    """Write the table to docs/gpu.md instead of printing it."""


def picture(steps: int, lora_rank: int = 4, widths: Widths = SD14) -> dict[str, int]:
    """Floating-point operations of each part, for one picture under guidance, which doubles the UNet's.

    Args:
        steps: denoising steps T.
        lora_rank: rank of the adapters.
        widths: sizes of the networks.
    """
    with torch.device("meta"):
        networks = (sd14_networks(widths)[part]() for part in ("unet", "vae", "text_encoder"))
        unet, vae, text_encoder = (network.to(_DTYPE) for network in networks)
        latents = torch.empty(2, 4, widths.latents, widths.latents, dtype=_DTYPE)
        state = (latents, torch.ones(2, dtype=torch.int64), torch.empty(2, _TOKENS, widths.text, dtype=_DTYPE))
        tokens = torch.zeros(1, _TOKENS, dtype=torch.int64)

        def trained(network: torch.nn.Module) -> int:
            return operations(lambda: network(*state).sample.sum().backward())

        with torch.no_grad():
            found = {
                "text encoder, one prompt": operations(lambda: text_encoder(tokens)),
                f"rollout, {steps} steps": steps * operations(lambda: unet(*state)),
                "decoding": operations(lambda: vae.decode(latents[:1])),
            }
        adapted = with_lora(unet.requires_grad_(False), lora_rank)
        found[f"training on its {steps} transitions, LoRA"] = steps * trained(adapted)
        found[f"training on its {steps} transitions, all weights"] = steps * trained(unet.requires_grad_(True))
    return found


def table(found: dict[str, int]) -> str:
    """The parts in 10^12 operations and as a share of the rollout."""
    rollout = next(count for part, count in found.items() if part.startswith("rollout"))
    rows = [(part, f"{count / 1e12:.2f}", f"{count / rollout:.1%}") for part, count in found.items()]
    return markdown_table(("one 512 x 512 picture, guided", "10¹² operations", "of the rollout"), rows)


def main(options: Options | None = None) -> None:
    """Count, and print or write the table."""
    options = options or tyro.cli(Options)
    text = table(picture(options.steps, options.lora_rank))
    if options.page:
        write_marked(ROOT / "docs" / "gpu.md", {"operations": text})
    else:
        print(text)


if __name__ == "__main__":
    main()
