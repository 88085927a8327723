"""Tokenizers, text encoders and autoencoders of random pipelines, which several families have."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

JOINT_WIDTH: Final = 48  # of T5's embeddings: at least the widths of two CLIP encoders together


def clip_config(tokenizer: Any, width: int) -> Any:
    """Of a tiny CLIP text encoder for a tokenizer."""
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


def autoencoder(latent_channels: int, exact: bool, **config: Any) -> Any:
    """A tiny autoencoder that compresses twice, or one of the published widths."""
    from diffusers import AutoencoderKL

    widths = (128, 256, 512, 512) if exact else (8, 8)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        latent_channels=latent_channels,
        layers_per_block=2 if exact else 1,
        norm_num_groups=32 if exact else 4,
        sample_size=512 if exact else 8,
        mid_block_add_attention=exact,
        **config,
    )


def t5_tokenizer(folder: Path) -> Any:
    """A fast tokenizer whose pieces are letters and words, without sentencepiece's own files."""
    import string

    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    from diffusion_gym.shapes.captions import words

    pieces = ["▁", *string.ascii_lowercase, *("▁" + word for word in words())]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -2.0) for piece in dict.fromkeys(pieces))]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return T5TokenizerFast.from_pretrained(folder, extra_ids=0, model_max_length=512)


def t5_encoder(tokenizer: Any) -> Any:
    """A tiny T5 encoder for a tokenizer."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=JOINT_WIDTH,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )
