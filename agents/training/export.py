"""The result of a run as files that plain diffusers loads."""

from __future__ import annotations

from pathlib import Path

import torch

from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.storage import read_json


def export_policy(policy: DenoisingPolicy, folder: Path) -> str:
    """Write what the policy has learned to `folder`: the adapters, or a full pipeline.

    A model whose pipeline in diffusers loads no adapters, such as `DDPMPipeline`, is saved with them merged into its
    weights.

    Returns:
        The line of Python that loads it: `load_lora_weights` for adapters, `from_pretrained` for a full pipeline, with
            the dtype of the weights where that is not float32.
    """
    unet = policy.unet
    if policy.trainable == "lora":
        if save_lora := getattr(policy.model, "save_lora", None):
            save_lora(folder, unet)
            return f"pipe.load_lora_weights({str(folder)!r})"
        from diffusion_gym.models.lora import merged

        unet = merged(unet)
    policy.model.save_pipeline(str(folder), unet)
    kind = read_json(folder / "model_index.json")["_class_name"]
    dtype = next(unet.parameters()).dtype
    # Without it diffusers would load its networks as float32, and transformers its own as they are stored.
    half = "" if dtype == torch.float32 else f", torch_dtype={dtype}"
    return f"{kind}.from_pretrained({str(folder)!r}{half})"
