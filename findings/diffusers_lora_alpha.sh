#!/usr/bin/env bash
# diffusers 0.42.1 with peft 0.21.2: save_lora_weights(folder, unet_lora_layers=...) writes the adapters without their
# alpha unless unet_lora_adapter_metadata is given too, and load_lora_adapter takes alpha = rank for a file without one,
# so adapters of rank 4 and alpha 16 come back at scale 1 in place of 4. Nothing is said on either way.
# Seen: scale 4.0 saved, 1.0 loaded; the output is off by 3.45 where the adapters' whole effect is 3.52
# Here: exports state alpha in the file, and `--agent.init-from` reads it from there.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cd "$work"
"$work/venv/bin/python" - 2> errors <<'PYTHON' || { cat errors >&2; exit 1; }
import sys

import diffusers
import peft
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict


def made():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def scales(unet):
    return {scale for part in unet.modules() if hasattr(part, "scaling") for scale in part.scaling.values()}


torch.manual_seed(1)
latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 16)
tuned, loaded = made(), made()
with torch.no_grad():
    plain = tuned(latents, 10, text).sample
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    tuned.add_adapter(peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(tuned))
    StableDiffusionPipeline.save_lora_weights("lora", unet_lora_layers=layers)
    loaded.load_lora_adapter("lora", weight_name="pytorch_lora_weights.safetensors", prefix="unet", use_safetensors=True)
    expected, found = tuned(latents, 10, text).sample, loaded(latents, 10, text).sample
effect, error = (expected - plain).norm().item(), (found - expected).norm().item()
print("diffusers", diffusers.__version__, "peft", peft.__version__, "scale", scales(tuned), "loaded", scales(loaded))
print(f"the adapters' effect {effect:.2f}, error after loading {error:.2f}")
sys.exit(not (scales(loaded) == {1.0} and error > 0.1 * effect))
PYTHON
