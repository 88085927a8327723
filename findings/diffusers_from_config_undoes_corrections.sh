#!/usr/bin/env bash
# diffusers 0.42.1: StableDiffusionPipeline's constructor sets its scheduler's clip_sample to False and steps_offset to
# 1. Where the scheduler had them as defaults (a fresh one, or a file that does not name them), the documented way to
# exchange it, from_config(pipe.scheduler.config), brings the class's defaults back without a warning: the config still
# lists the corrected names in `_use_default_values`, and from_config drops what is listed there. Saving the scheduler
# to a folder and loading it from there keeps the corrections.
# Seen: the pipeline's (False, 1, [751, 501, 251, 1]), from_config's (True, 0, [750, 500, 250, 0])
# Here: schedulers are made of all values that a pipeline's has, `_use_default_values` left out.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0
cd "$work"
"$work/venv/bin/python" - 2> errors <<'PYTHON' || { cat errors >&2; exit 1; }
import json
import sys
import warnings
from pathlib import Path

import diffusers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel


def values(scheduler):
    scheduler.set_timesteps(4)
    return scheduler.config.clip_sample, scheduler.config.steps_offset, scheduler.timesteps.tolist()


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
vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
Path("old").mkdir()
Path("old/scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler", "beta_end": 0.012}))
print("diffusers", diffusers.__version__, "(clip_sample, steps_offset, timesteps)")
seen = True
for name, scheduler in (("fresh", DDIMScheduler()), ("of a file", DDIMScheduler.from_pretrained("old"))):
    pipe = StableDiffusionPipeline(vae, None, None, unet, scheduler, None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exchanged = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.save_pretrained("saved")
    corrected, undone, loaded = map(values, (pipe.scheduler, exchanged, DDIMScheduler.from_pretrained("saved")))
    print(name, "in the pipeline", corrected, "from_config", undone, "saved and loaded", loaded)
    seen &= corrected[:2] == loaded[:2] == (False, 1) and undone[:2] == (True, 0) and undone[2] != corrected[2]
sys.exit(not seen)
PYTHON
