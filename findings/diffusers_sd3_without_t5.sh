#!/usr/bin/env bash
# diffusers 0.42.1: StableDiffusion3Pipeline runs with text_encoder_3=None and tokenizer_3=None, the documented way to
# do without T5, and save_pretrained writes them as [null, null] to model_index.json. from_pretrained of that folder
# raises ValueError unless both Nones are passed again: the two are not among the pipeline's optional components.
# Seen: {} ValueError: Pipeline ... expected [... 'text_encoder_3' ... 'tokenizer_3' ...], but only {...} were passed.
#       {'text_encoder_3': None, 'tokenizer_3': None} loads, with the image of the pipeline that was saved
# Here: Stable Diffusion 3 is loaded part by part, and both parts of T5 may be missing.
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
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
Path("vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
Path("merges.txt").write_text("#version: 0.2\n")
tokens = {"vocab_size": 54, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53, "max_position_embeddings": 8}
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def encoder():
    return CLIPTextModelWithProjection(CLIPTextConfig(**tokens, **sizes, projection_dim=16))


def tokenizer():
    return CLIPTokenizer("vocab.json", "merges.txt", model_max_length=8)


def image(pipe):
    latents = torch.ones(1, 4, 8, 8)
    return pipe("a", num_inference_steps=1, height=8, width=8, latents=latents, output_type="pt").images


without_t5 = {"text_encoder_3": None, "tokenizer_3": None}
torch.manual_seed(0)
made = StableDiffusion3Pipeline(
    transformer=SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    ),
    scheduler=FlowMatchEulerDiscreteScheduler(),
    vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, shift_factor=0.0),
    text_encoder=encoder(),
    tokenizer=tokenizer(),
    text_encoder_2=encoder(),
    tokenizer_2=tokenizer(),
    **without_t5,
)
expected = image(made)
made.save_pretrained("pipeline")
index = json.loads(Path("pipeline/model_index.json").read_text())
print("diffusers", diffusers.__version__, {name: index[name] for name in without_t5})
try:
    StableDiffusion3Pipeline.from_pretrained("pipeline")
    raised = False
except ValueError as error:
    raised = True
    print("{} ValueError:", error)
error = (image(StableDiffusion3Pipeline.from_pretrained("pipeline", **without_t5)) - expected).abs().max().item()
print(without_t5, "loads, error of the image", error)
sys.exit(not (raised and error < 1e-5))
PYTHON
