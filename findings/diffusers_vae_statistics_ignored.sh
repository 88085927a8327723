#!/usr/bin/env bash
# diffusers 0.42.1: AutoencoderKL takes latents_mean, latents_std and shift_factor, each without the others, but
# StableDiffusionPipeline decodes as if none of them were there, and StableDiffusionXLPipeline honours the mean and the
# deviation only together: a lone one, or shift_factor, is ignored. Neither warns.
# Seen: the images equal those of a VAE without them bit for bit, except of SDXL with both mean and std (off by 0.02)
# Here: a VAE whose statistics its pipeline would ignore is refused, and SDXL's are followed where both are there.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0
cd "$work"
"$work/venv/bin/python" - 2> errors <<'PYTHON' || { cat errors >&2; exit 1; }
import sys

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

small = {
    "sample_size": 8,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}
torch.manual_seed(0)
unets = {"SD": UNet2DConditionModel(**small), "SDXL": UNet2DConditionModel(**small, **added)}
weights = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).state_dict()
latents, text, pooled = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 16), torch.randn(1, 16)


def images(kind, statistics):
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, **statistics)
    vae.load_state_dict(weights)
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    call = {"prompt_embeds": text, "latents": latents, "guidance_scale": 1.0, "num_inference_steps": 2}
    if kind == "SD":
        pipe = StableDiffusionPipeline(vae, None, None, unets[kind], scheduler, None, None)
    else:
        pipe = StableDiffusionXLPipeline(vae, None, None, None, None, unets[kind], scheduler, add_watermarker=False)
        call["pooled_prompt_embeds"] = pooled
    return pipe(**call, height=8, width=8, output_type="pt").images


mean, deviation, shift = {"latents_mean": [0.5] * 4}, {"latents_std": [2.0] * 4}, {"shift_factor": 0.5}
print("diffusers", diffusers.__version__)
effects = {}
for kind in unets:
    for statistics in (mean, deviation, mean | deviation, shift):
        effect = (images(kind, statistics) - images(kind, {})).abs().max().item()
        effects[kind, *statistics] = effect
        print(kind, statistics, "effect on the images", effect)
both = effects.pop(("SDXL", "latents_mean", "latents_std"))
sys.exit(not (both > 1e-3 and max(effects.values()) == 0))
PYTHON
