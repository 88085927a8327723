"""The hub ids that this project names, each once, and about how much disk they take."""

from __future__ import annotations

from typing import Final

MODEL_SOURCES: Final[dict[str, str]] = {
    "SD14": "CompVis/stable-diffusion-v1-4",
    "SD15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "SD35Medium": "stabilityai/stable-diffusion-3.5-medium",
    "FLUX1Dev": "black-forest-labs/FLUX.1-dev",
    "FLUX1Schnell": "black-forest-labs/FLUX.1-schnell",
    "FLUX2Klein": "black-forest-labs/FLUX.2-klein-4B",
    "QwenImage": "Qwen/Qwen-Image",
    "ZImageTurbo": "Tongyi-MAI/Z-Image-Turbo",
    "Sana": "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    "CelebaHQ": "google/ddpm-celebahq-256",
    "Church": "google/ddpm-church-256",
    "Bedroom": "google/ddpm-bedroom-256",
}

CLIP_L: Final = "openai/clip-vit-large-patch14"
AESTHETIC_HEAD: Final = "trl-lib/ddpo-aesthetic-predictor"
CLIP_H: Final = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
AGE_CLASSIFIER: Final = "nateraw/vit-age-classifier"
IMAGE_REWARD: Final = "THUDM/ImageReward"
BERT: Final = "google-bert/bert-base-uncased"
DEBERTA: Final = "microsoft/deberta-xlarge-mnli"
MASK2FORMER: Final = "facebook/mask2former-swin-small-coco-instance"
HPS: Final = "xswu/HPSv2"

REWARD_SOURCES: Final[dict[str, tuple[str, ...]]] = {
    "Aesthetic": (CLIP_L, AESTHETIC_HEAD),
    "CLIPScore": (CLIP_L,),
    "PickScore": ("yuvalkirstain/PickScore_v1", CLIP_H),
    "Over50": (AGE_CLASSIFIER,),
    "Under30": (AGE_CLASSIFIER,),
    "PromptAlignment": ("llava-hf/llava-1.5-7b-hf", DEBERTA),
    "ImageReward": (IMAGE_REWARD, BERT),
    "GenEval": (MASK2FORMER, CLIP_L),
    "HPSv2": (HPS, CLIP_H),
}

# Of these a reward needs the tokenizer and the preprocessing alone.
TOKENIZER_ONLY: Final = frozenset({CLIP_H, BERT})

# Of these the files are named, and read by us with `weights_only=True`: they are published as nothing but pickles.
NAMED_FILES: Final[dict[str, tuple[str, ...]]] = {
    AESTHETIC_HEAD: ("aesthetic-model.pth",),
    IMAGE_REWARD: ("ImageReward.pt",),
    HPS: ("HPS_v2.1_compressed.pt",),
}

# Of these `pytorch_model.bin` is read, with `weights_only=True`, where there are no safetensors.
MAYBE_PICKLED: Final = frozenset({DEBERTA})

# In 10^9 bytes, approximate: parameters times the bytes of the published type, float32 but for LLaVA (float16), and the
# flow-matching transformers with their language models (2 bytes, except Sana and the network of Z-Image, as far as we
# know). The parameters of those networks are in docs/models.md; T5's encoder has 4.8 G, Qwen2.5-VL 8.3 G, Qwen3 4.0 G,
# Gemma 2 2.6 G. The others, from the published configs: 1,066 M for the three networks of Stable Diffusion 1.x, 113.7 M
# for the DDPMs, 427.6 M for CLIP ViT-L/14, 986 M for PickScore, 86 M for ViT-B/16, 7.06 G for LLaVA 1.5, 0.75 G for
# DeBERTa XL (an upper bound: it may be stored as float16), 0.45 G for ImageReward, 69 M for
# Mask2Former with Swin-S, 986 M of HPSv2 in float16; a tokenizer's where it suffices.
# `diffusion-gym download` asks the hub for the exact size.
_GIGABYTES: Final[dict[str, float]] = {
    MODEL_SOURCES["SD14"]: 4.3,
    MODEL_SOURCES["SD15"]: 4.3,
    MODEL_SOURCES["SD35Medium"]: 16.3,
    MODEL_SOURCES["FLUX1Dev"]: 33.7,
    MODEL_SOURCES["FLUX1Schnell"]: 33.7,
    MODEL_SOURCES["FLUX2Klein"]: 16.0,
    MODEL_SOURCES["QwenImage"]: 57.7,
    MODEL_SOURCES["ZImageTurbo"]: 32.8,
    MODEL_SOURCES["Sana"]: 18.2,
    MODEL_SOURCES["CelebaHQ"]: 0.5,
    MODEL_SOURCES["Church"]: 0.5,
    MODEL_SOURCES["Bedroom"]: 0.5,
    CLIP_L: 1.7,
    AESTHETIC_HEAD: 0.01,
    "yuvalkirstain/PickScore_v1": 3.9,
    CLIP_H: 0.005,
    AGE_CLASSIFIER: 0.35,
    "llava-hf/llava-1.5-7b-hf": 14.0,
    DEBERTA: 3.0,
    IMAGE_REWARD: 1.8,
    MASK2FORMER: 0.28,
    HPS: 2.0,
    BERT: 0.001,
}


def size_text(source: str, variant: str | None = None) -> str:
    """About how much disk a hub id takes, in words; half of it for `fp16` and `bf16`."""
    if source not in _GIGABYTES:
        return "size unknown"
    gigabytes = _GIGABYTES[source] / (2 if variant in ("fp16", "bf16") else 1)
    return f"about {gigabytes:.1f} GB" if gigabytes >= 0.1 else f"about {1000 * gigabytes:.0f} MB"
