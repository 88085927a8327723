"""Writes tiny Qwen-Image, Z-Image and FLUX.2 [klein] pipelines with random weights; downloads nothing.

They read prompts with language models of Qwen's classes. The tokenizer's only tokens are bytes and marks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch

from diffusion_gym.models.quiet import quiet
from diffusion_gym.models.saving import export_pipeline
from diffusion_gym.testing.random_parts import autoencoder

_CHAT: Final = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if not enable_thinking %}<think>\n{% endif %}"
)
_WIDTH: Final = 16  # of a language model


def write_random_qwen_image(folder: str | Path, seed: int = 0) -> Path:
    """Write a pipeline of Qwen-Image's classes: 4 channels of latents, pictures of any multiple of 4 pixels.

    Args:
        folder: where to.
        seed: seed of the weights.

    Returns:
        The folder.
    """
    with quiet():
        from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel

        tokenizer = _tokenizer(Path(folder) / "tokenizer")
        torch.manual_seed(seed)
        pipeline = QwenImagePipeline(
            scheduler=_scheduler(shift_terminal=0.02),
            vae=AutoencoderKLQwenImage(
                base_dim=8,
                z_dim=4,
                dim_mult=[1, 1],
                num_res_blocks=1,
                temperal_downsample=[False],
                latents_mean=[0.1, -0.2, 0.3, 0.0],
                latents_std=[1.0, 0.5, 2.0, 1.5],
            ),
            text_encoder=_vision_language_model(len(tokenizer)),
            tokenizer=tokenizer,
            transformer=QwenImageTransformer2DModel(
                in_channels=16,
                out_channels=4,
                num_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=_WIDTH,
                axes_dims_rope=(4, 6, 6),
            ),
        )
    return _export(folder, pipeline)


def write_random_z_image(folder: str | Path, seed: int = 0) -> Path:
    """Write a pipeline of Z-Image's classes: 16 channels of latents, pictures of any multiple of 4 pixels.

    Arguments and result as `write_random_qwen_image`.
    """
    with quiet():
        from diffusers import ZImagePipeline, ZImageTransformer2DModel
        from transformers import Qwen3Model

        tokenizer = _tokenizer(Path(folder) / "tokenizer")
        torch.manual_seed(seed)
        pipeline = ZImagePipeline(
            scheduler=_scheduler(),
            vae=autoencoder(16, False, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False),
            text_encoder=Qwen3Model(_language_config(len(tokenizer), layers=2)),
            tokenizer=tokenizer,
            transformer=ZImageTransformer2DModel(
                dim=32,
                n_layers=1,
                n_refiner_layers=1,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=_WIDTH,
                axes_dims=[4, 6, 6],
                axes_lens=[1024, 64, 64],
            ),
        )
    return _export(folder, pipeline)


def write_random_flux2_klein(folder: str | Path, seed: int = 0, *, is_distilled: bool = False) -> Path:
    """Write a pipeline of FLUX.2 [klein]'s classes: 16 channels of latents, pictures of any multiple of 4 pixels.

    Args:
        folder: where to.
        seed: seed of the weights.
        is_distilled: what the pipeline says of its network, which is the same.

    Returns:
        The folder.
    """
    with quiet():
        from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
        from transformers import Qwen3ForCausalLM

        tokenizer = _tokenizer(Path(folder) / "tokenizer")
        torch.manual_seed(seed)
        vae = AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            mid_block_add_attention=False,
        )
        torch.nn.init.normal_(vae.bn.running_mean)
        torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
        pipeline = Flux2KleinPipeline(
            scheduler=_scheduler(),
            vae=vae,
            text_encoder=Qwen3ForCausalLM(_language_config(len(tokenizer), layers=27)),  # it gives its 9th, 18th, 27th
            tokenizer=tokenizer,
            transformer=Flux2Transformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=3 * _WIDTH,
                axes_dims_rope=(4, 4, 4, 4),
                guidance_embeds=False,
            ),
            is_distilled=is_distilled,
        )
    return _export(folder, pipeline)


def _export(folder: str | Path, pipeline: Any) -> Path:
    export_pipeline(folder, pipeline)
    return Path(folder)


def _scheduler(**options: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **options)


def _tokenizer(folder: Path) -> Any:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate([*sorted(ByteLevel.alphabet()), *marks])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=marks[1:], chat_template=_CHAT)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _language_config(words: int, layers: int) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(vocab_size=words, num_hidden_layers=layers, head_dim=8, num_key_value_heads=1, **_SIZES)


_SIZES: Final[dict[str, Any]] = {
    "hidden_size": _WIDTH,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "max_position_embeddings": 1024,
}


def _vision_language_model(words: int) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        **_SIZES,
        "vocab_size": words,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": _WIDTH}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
