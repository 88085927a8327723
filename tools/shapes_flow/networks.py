"""The networks of `ShapesFlow`: diffusers and transformers classes, in the roles of Stable Diffusion 3."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from diffusion_gym.models.repeated_token import RepeatedTokenAttention
from diffusion_gym.models.shapes import WEIGHTS
from tools.shapes.networks import LATENT_CHANNELS, MAX_TOKENS

TEXT_WIDTH: Final = 96
SECOND_WIDTH: Final = 8  # SD3 has two CLIP encoders; the second is as small as it can be
JOINT_WIDTH: Final = TEXT_WIDTH + SECOND_WIDTH
T5_TOKENS: Final = 256


def make_trained(tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    """The networks that are trained, fresh: `transformer`, `text_encoder` and `text_encoder_2`."""
    return nn.ModuleDict(
        {
            "transformer": make_transformer(),
            "text_encoder": make_text_encoder(tokenizer, TEXT_WIDTH, heads=4, layers=3),
            "text_encoder_2": make_text_encoder(tokenizer, SECOND_WIDTH, heads=1, layers=1),
        }
    )


def begin_with_shapes(networks: nn.ModuleDict) -> None:
    """Put Shapes' text encoder, whose two layers' output SD3 takes, into the first encoder's first layers."""
    taught = CLIPTextModel.from_pretrained(WEIGHTS, subfolder="text_encoder").state_dict()
    taught = {name.removeprefix("text_model."): value for name, value in taught.items()}
    missing, unexpected = networks["text_encoder"].text_model.load_state_dict(taught, strict=False)
    if unexpected or not all(name.startswith("encoder.layers.2.") for name in missing):
        raise ValueError("Shapes' text encoder is not the first two layers of this one; train with --no-teacher")


def make_transformer() -> SD3Transformer2DModel:
    """SD3's MMDiT of 6 layers of width 128 over (4, 8, 8) latents in patches of 2: 16 tokens of image, 16 of text."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=JOINT_WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=JOINT_WIDTH,
        pos_embed_max_size=8,
    )
    # DiT's start: every layer of the modulation at zero, so that blocks begin as the identity.
    for block in transformer.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    transformer.set_attn_processor(RepeatedTokenAttention(T5_TOKENS))
    return transformer


def make_text_encoder(tokenizer: CLIPTokenizer, width: int, *, heads: int, layers: int) -> CLIPTextModelWithProjection:
    """CLIP text transformer over `MAX_TOKENS` tokens, of which SD3 takes the last layer but one and the projection."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )


def embed(networks: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What SD3's pipeline feeds: context `(N, L + 1, D)`, whose last row are T5's zeros, and pooled `(N, D)`."""
    one = networks["text_encoder"](tokens, output_hidden_states=True)
    two = networks["text_encoder_2"](tokens, output_hidden_states=True)
    context = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
    pooled = torch.cat([one.text_embeds, two.text_embeds], dim=-1)
    return nn.functional.pad(context, (0, 0, 0, 1)), pooled


def load_autoencoder() -> AutoencoderKL:
    """The autoencoder of `Shapes`; SD3's pipeline adds its shift, which must be a number."""
    vae = AutoencoderKL.from_pretrained(WEIGHTS, subfolder="vae")
    vae.register_to_config(shift_factor=0.0)
    return vae.requires_grad_(False).eval()


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Rectified flow with evenly spaced times."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


def make_silent_t5(folder: Path) -> tuple[T5EncoderModel, T5TokenizerFast]:
    """A T5 whose weights are zeros, so that its output is zeros, and its tokenizer, written to `folder`.

    Diffusers' `from_pretrained` does not load an SD3 folder that has no T5 unless `text_encoder_3=None` is passed.
    """
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *(("▁" + letter, -2.0) for letter in string.ascii_lowercase),
    ]
    words = Tokenizer(models.Unigram(pieces, unk_id=2))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    words.save(str(folder / "tokenizer.json"))
    tokenizer = T5TokenizerFast.from_pretrained(folder, extra_ids=0, model_max_length=T5_TOKENS)
    encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=JOINT_WIDTH, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    )
    for weight in encoder.parameters():
        nn.init.zeros_(weight)
    return encoder.eval(), tokenizer
