#!/usr/bin/env bash
# diffusers 0.42.1 with transformers 5.23.0: a Stable Diffusion folder saved in float16 and loaded without a dtype has
# its UNet and VAE in float32 (diffusers' default) and its text encoder in float16 (transformers keeps the file's), and
# the pipeline raises at its first call. With dtype=torch.float32 it runs.
# Seen: unet float32, vae float32, text_encoder float16
#       RuntimeError: mat1 and mat2 must have the same dtype, but got Half and Float
# Here: every part is loaded with the dtype that was asked for, float32 by default.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0
cd "$work"
"$work/venv/bin/python" - 2> errors <<'PYTHON' || { cat errors >&2; exit 1; }
import json
import sys
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
Path("vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
Path("merges.txt").write_text("#version: 0.2\n")
tokens = {"vocab_size": 54, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53, "max_position_embeddings": 8}
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
unet = UNet2DConditionModel(
    sample_size=8,
    block_out_channels=(8, 8),
    norm_num_groups=4,
    layers_per_block=1,
    attention_head_dim=4,
    cross_attention_dim=16,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
made = StableDiffusionPipeline(
    vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
    text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**tokens, **sizes)),
    tokenizer=transformers.CLIPTokenizer("vocab.json", "merges.txt", model_max_length=8),
    unet=unet,
    scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
    safety_checker=None,
    feature_extractor=None,
)
made.to(torch.float16).save_pretrained("pipeline")
print("diffusers", diffusers.__version__, "transformers", transformers.__version__)
raised = False
for keywords in ({}, {"dtype": torch.float32}):
    pipe = StableDiffusionPipeline.from_pretrained("pipeline", **keywords)
    print(keywords, {name: getattr(pipe, name).dtype for name in ("unet", "vae", "text_encoder")})
    try:
        pipe("a", num_inference_steps=1)
        print("runs")
    except RuntimeError as error:
        raised = not keywords
        print("RuntimeError:", error)
sys.exit(not raised)
PYTHON
