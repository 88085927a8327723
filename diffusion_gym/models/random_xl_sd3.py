"""Writes SDXL and Stable Diffusion 3 pipeline directories with random weights, for tests; downloads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffusion_gym.models.saving import export_pipeline
from diffusion_gym.quiet import quiet


def write_random_sdxl(folder: str | Path, seed: int = 0, *, force_zeros_for_empty_prompt: bool = True) -> Path:
    """Write a tiny pipeline of the same classes as Stable Diffusion XL: 4x4 latents, 8x8 pictures.

    Args:
        folder: where to.
        seed: seed of the weights.
        force_zeros_for_empty_prompt: whether zeros stand for the embedding of the empty prompt, as in the base model.

    Returns:
        The folder.
    """
    folder = Path(folder)
    with quiet():
        from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        tokenizer, tokenizer_2 = _tokenizers(folder)
        torch.manual_seed(seed)
        pipeline = StableDiffusionXLPipeline(
            vae=_autoencoder(4, scaling_factor=0.13025, force_upcast=True),
            text_encoder=CLIPTextModel(_clip_config(tokenizer, width=16)),
            text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokenizer_2, width=24)),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=_unet(cross_attention_dim=16 + 24, pooled_width=24),
            scheduler=EulerDiscreteScheduler.from_config(_SDXL_SCHEDULER),
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=False,
        )
    export_pipeline(folder, pipeline)
    return folder


def write_random_sd3(folder: str | Path, seed: int = 0, *, t5: bool = True) -> Path:
    """Write a tiny pipeline of the same classes as Stable Diffusion 3: 16x4x4 latents, 8x8 pictures.

    Args:
        folder: where to.
        seed: seed of the weights.
        t5: with the third text encoder, or without.

    Returns:
        The folder.
    """
    folder = Path(folder)
    with quiet():
        from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
        from transformers import CLIPTextModelWithProjection

        tokenizer, tokenizer_2 = _tokenizers(folder)
        tokenizer_3 = _t5_tokenizer(folder / "tokenizer_3") if t5 else None
        torch.manual_seed(seed)
        pipeline = StableDiffusion3Pipeline(
            transformer=_transformer(pooled_width=16 + 24),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_autoencoder(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False),
            text_encoder=CLIPTextModelWithProjection(_clip_config(tokenizer, width=16)),
            tokenizer=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokenizer_2, width=24)),
            tokenizer_2=tokenizer_2,
            text_encoder_3=_t5_encoder(tokenizer_3) if t5 else None,
            tokenizer_3=tokenizer_3,
        )
    export_pipeline(folder, pipeline)
    return folder


# As the base model is published: with options of other schedulers, DDIM among them.
_SDXL_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
_JOINT_WIDTH = 48  # of SD3's text embeddings: at least the two CLIP widths together


def _tokenizers(folder: Path) -> tuple[Any, Any]:
    from diffusion_gym.models.shapes.vocabulary import write_tokenizer

    return write_tokenizer(folder / "tokenizer"), write_tokenizer(folder / "tokenizer_2")


def _clip_config(tokenizer: Any, width: int) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _unet(cross_attention_dim: int, pooled_width: int) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=(2, 4),
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=pooled_width + 6 * 8,
    )


def _transformer(pooled_width: int) -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=_JOINT_WIDTH,
        pooled_projection_dim=pooled_width,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )


def _autoencoder(latent_channels: int, **config: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=latent_channels,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=8,
        mid_block_add_attention=False,
        **config,
    )


def _t5_tokenizer(folder: Path) -> Any:
    """A fast tokenizer whose pieces are letters and words, without sentencepiece's own files."""
    import string

    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    from diffusion_gym.models.shapes.vocabulary import words

    pieces = ["▁", *string.ascii_lowercase, *("▁" + word for word in words())]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -2.0) for piece in dict.fromkeys(pieces))]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return T5TokenizerFast.from_pretrained(folder, extra_ids=0, model_max_length=512)


def _t5_encoder(tokenizer: Any) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=_JOINT_WIDTH,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )
