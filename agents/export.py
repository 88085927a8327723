"""The result of a run as files that plain diffusers loads."""

from __future__ import annotations

from pathlib import Path

from diffusion_gym.agents.policy import DenoisingPolicy


def export_policy(policy: DenoisingPolicy, folder: Path) -> str:
    """Write what the policy has learned to `folder`.

    Returns:
        The line of Python that loads it: `load_lora_weights` for adapters, `from_pretrained` for a full pipeline.
    """
    if policy.trainable == "lora":
        from diffusion_gym.models.lora import save_lora

        save_lora(folder, policy.unet)
        return f"pipe.load_lora_weights({str(folder)!r})"
    policy.model.save_pipeline(str(folder), policy.unet)
    return f"StableDiffusionPipeline.from_pretrained({str(folder)!r})"
