"""Names and shapes of published weights that are tensors in a file, not a model of transformers."""

from __future__ import annotations

from typing import Final

_PATCH: Final = 16  # pixels


def image_reward_shapes(
    *,
    vision: int = 1024,
    text: int = 768,
    layers: tuple[int, int] = (24, 12),
    growth: int = 4,
    size: int = 224,
    tokens: tuple[int, int] = (30524, 512),
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of ImageReward's published weights, of the published size by default.

    Args:
        vision: width of the vision transformer, a multiple of 64.
        text: width of the text encoder, a multiple of 64.
        layers: of the two.
        growth: width of a hidden layer, times that of the network.
        size: of the pictures, in pixels.
        tokens: how many there are, and the most in a prompt.
    """
    see, read = "blip.visual_encoder", "blip.text_encoder"
    shapes: dict[str, tuple[int, ...]] = {
        f"{see}.cls_token": (1, 1, vision),
        f"{see}.pos_embed": (1, (size // _PATCH) ** 2 + 1, vision),
        **_linear(f"{see}.patch_embed.proj", vision, 3, _PATCH, _PATCH),
        **_norm(f"{see}.norm", vision),
        f"{read}.embeddings.word_embeddings.weight": (tokens[0], text),
        f"{read}.embeddings.position_embeddings.weight": (tokens[1], text),
        **_norm(f"{read}.embeddings.LayerNorm", text),
    }
    for layer in range(layers[0]):
        block = f"{see}.blocks.{layer}"
        shapes |= _norm(f"{block}.norm1", vision) | _norm(f"{block}.norm2", vision)
        shapes |= _linear(f"{block}.attn.qkv", 3 * vision, vision) | _linear(f"{block}.attn.proj", vision, vision)
        shapes |= _linear(f"{block}.mlp.fc1", growth * vision, vision)
        shapes |= _linear(f"{block}.mlp.fc2", vision, growth * vision)
    for layer in range(layers[1]):
        block = f"{read}.encoder.layer.{layer}"
        for attention, source in (("attention", text), ("crossattention", vision)):
            shapes |= _linear(f"{block}.{attention}.self.query", text, text)
            shapes |= _linear(f"{block}.{attention}.self.key", text, source)
            shapes |= _linear(f"{block}.{attention}.self.value", text, source)
            shapes |= _linear(f"{block}.{attention}.output.dense", text, text)
            shapes |= _norm(f"{block}.{attention}.output.LayerNorm", text)
        shapes |= _linear(f"{block}.intermediate.dense", growth * text, text)
        shapes |= _linear(f"{block}.output.dense", text, growth * text) | _norm(f"{block}.output.LayerNorm", text)
    return shapes | {f"mlp.{name}": shape for name, shape in head_shapes(text).items()}


def open_clip_shapes(
    *,
    vision: int = 1280,
    text: int = 1024,
    layers: tuple[int, int] = (32, 24),
    growth: int = 4,
    size: int = 224,
    patch: int = 14,
    tokens: tuple[int, int] = (49408, 77),
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of open_clip's ViT-H/14, of which HPSv2's published weights are, of that size by default.

    Args:
        vision: width of the vision transformer, a multiple of 80.
        text: width of the text encoder, a multiple of 64, and of the embeddings.
        layers: of the two.
        growth: width of a hidden layer, times that of the network.
        size: of the pictures, in pixels.
        patch: of the patches, in pixels.
        tokens: how many there are, and the most in a prompt.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (vision,),
        "visual.positional_embedding": ((size // patch) ** 2 + 1, vision),
        "visual.conv1.weight": (vision, 3, patch, patch),
        "visual.proj": (vision, text),
        "positional_embedding": (tokens[1], text),
        "token_embedding.weight": (tokens[0], text),
        "text_projection": (text, text),
        **_norm("visual.ln_pre", vision),
        **_norm("visual.ln_post", vision),
        **_norm("ln_final", text),
    }
    for tower, width, depth in (("visual.transformer", vision, layers[0]), ("transformer", text, layers[1])):
        for layer in range(depth):
            block = f"{tower}.resblocks.{layer}"
            shapes |= _norm(f"{block}.ln_1", width) | _norm(f"{block}.ln_2", width)
            shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
            shapes |= _linear(f"{block}.attn.out_proj", width, width)
            shapes |= _linear(f"{block}.mlp.c_fc", growth * width, width)
            shapes |= _linear(f"{block}.mlp.c_proj", width, growth * width)
    return shapes


def head_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the head on embeddings of `width` numbers."""
    from diffusion_gym.rewards.score_mlp import ScoreMLP

    return {name: tuple(value.shape) for name, value in ScoreMLP(width).state_dict().items()}


def _linear(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
