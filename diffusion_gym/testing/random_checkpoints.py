"""Checkpoints with random weights for the rewards that need weights, for tests and benchmarks; downloads nothing.

Run `python -m diffusion_gym.testing.random_checkpoints NAME OUT`: it prints the `reward_kwargs` as JSON, and on
standard error as options of `diffusion-gym train`. They are tiny, or with `--size published` of the published model's
exact shape, to measure time and memory.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import torch

from diffusion_gym.testing.random_shapes import head_shapes, image_reward_shapes, open_clip_shapes

_SIZE, _PATCH = 32, 16  # pixels, of the tiny networks
_GAIN: Final = 1.5  # of each matrix
_TINY: Final = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def clip_config(tokenizer: Any, *, published: bool = False) -> Any:
    """The shape of a tiny CLIP, or of the published ViT-L/14 (428 M parameters), for the ids of `tokenizer`."""
    from transformers import CLIPConfig

    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    if not published:
        text = {**_TINY, "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
        vision = {**_TINY, "image_size": _SIZE, "patch_size": _PATCH}
        return CLIPConfig(text_config={**text, **ids}, vision_config=vision, projection_dim=16)
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    return CLIPConfig(
        text_config={**text, "vocab_size": 49408, "max_position_embeddings": 77, "projection_dim": 768, **ids},
        vision_config={**large, "image_size": 224, "patch_size": 14, "projection_dim": 768},
        projection_dim=768,
    )


def _write_clip(folder: Path, published: bool = False) -> str:
    """Write a `CLIPModel` with its tokenizer and image processor to `folder`; returns the folder."""
    from diffusion_gym.quiet import quiet
    from diffusion_gym.storage import write_folder

    with quiet():
        from transformers import CLIPModel

        from diffusion_gym.testing.tokenizer import write_tokenizer

        config = clip_config(write_tokenizer(folder), published=published)
        write_folder(folder, _randomised(CLIPModel(config)).save_pretrained)
    _write_clip_processor(folder, config.vision_config.image_size)
    return str(folder)


def _write_clip_processor(folder: Path, size: int) -> None:
    _write_image_processor(
        folder,
        image_processor_type="CLIPImageProcessor",
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
    )


def _age(folder: Path) -> dict[str, Any]:
    """A tiny `ViTForImageClassification` of the nine age classes."""
    from diffusion_gym.quiet import quiet
    from diffusion_gym.rewards.age import AGES
    from diffusion_gym.storage import write_folder

    with quiet():
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            **_TINY,
            image_size=_SIZE,
            patch_size=_PATCH,
            id2label=dict(enumerate(AGES)),
            label2id={label: index for index, label in enumerate(AGES)},
        )
        write_folder(folder, _randomised(ViTForImageClassification(config)).save_pretrained)
    _write_image_processor(
        folder,
        image_processor_type="ViTImageProcessor",
        size={"height": _SIZE, "width": _SIZE},
        resample=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return {"classifier": str(folder)}


def _aesthetic(folder: Path, published: bool = False) -> dict[str, Any]:
    from diffusion_gym.storage import save_tensors

    head = _random_tensors(head_shapes(768 if published else 16))
    save_tensors(folder / "head.safetensors", head)
    return {"clip": _write_clip(folder / "clip", published), "head": str(folder / "head.safetensors")}


def _clip_score(folder: Path, published: bool = False) -> dict[str, Any]:
    return {"clip": _write_clip(folder, published)}


def _pick_score(folder: Path) -> dict[str, Any]:
    clip = _write_clip(folder)
    return {"clip": clip, "processor": clip}


def _image_reward(folder: Path, published: bool = False) -> dict[str, Any]:
    from diffusion_gym.storage import save_tensors
    from diffusion_gym.testing.random_vlm import write_random_bert

    tiny = image_reward_shapes(vision=128, text=128, layers=(2, 2), growth=2, size=_SIZE, tokens=(200, 64))
    shapes = image_reward_shapes() if published else tiny
    save_tensors(folder / "ImageReward.safetensors", _random_tensors(shapes))
    tokenizer = write_random_bert(folder / "bert", max_length=None)
    return {"weights": str(folder / "ImageReward.safetensors"), "tokenizer": str(tokenizer)}


def _hpsv2(folder: Path, published: bool = False) -> dict[str, Any]:
    from diffusion_gym.storage import save_tensors
    from diffusion_gym.testing.tokenizer import write_tokenizer

    tokenizer = write_tokenizer(folder / "processor")
    tokens = (len(tokenizer), tokenizer.model_max_length)
    tiny = open_clip_shapes(vision=160, text=64, layers=(2, 2), growth=2, size=_SIZE, patch=_PATCH, tokens=tokens)
    weights = _random_tensors(open_clip_shapes() if published else tiny)
    save_tensors(folder / "HPSv2.safetensors", {**weights, "logit_scale": torch.tensor(4.6)})
    _write_clip_processor(folder / "processor", 224 if published else _SIZE)
    return {"weights": str(folder / "HPSv2.safetensors"), "processor": str(folder / "processor")}


def _geneval(folder: Path) -> dict[str, Any]:
    from diffusion_gym.testing.random_detector import write_random_mask2former

    return {"detector": str(write_random_mask2former(folder / "detector")), "clip": _write_clip(folder / "clip")}


def _prompt_alignment(folder: Path) -> dict[str, Any]:
    from diffusion_gym.testing.random_vlm import random_prompt_alignment

    return random_prompt_alignment(folder)


CHECKPOINTS: Final[dict[str, Callable[[Path], dict[str, Any]]]] = {
    "Aesthetic": _aesthetic,
    "CLIPScore": _clip_score,
    "PickScore": _pick_score,
    "Over50": _age,
    "Under30": _age,
    "ImageReward": _image_reward,
    "HPSv2": _hpsv2,
    "GenEval": _geneval,
    "PromptAlignment": _prompt_alignment,
}
PUBLISHED: Final[dict[str, Callable[[Path], dict[str, Any]]]] = {
    "Aesthetic": partial(_aesthetic, published=True),
    "CLIPScore": partial(_clip_score, published=True),
    "ImageReward": partial(_image_reward, published=True),
    "HPSv2": partial(_hpsv2, published=True),
}


def _random_tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Values larger than a fresh network's, so that scores differ by more than rounding; the norms' scales near 1."""
    generator = torch.Generator().manual_seed(0)

    def values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            return _GAIN * noise / noise[0].numel() ** 0.5
        return 0.2 * noise + (1.0 if name.endswith(".weight") else 0.0)

    return {name: values(name, shape) for name, shape in shapes.items()}


def _randomised(network: Any) -> Any:
    shapes = {name: tuple(value.shape) for name, value in network.named_parameters() if value.ndim}
    network.load_state_dict(_random_tensors(shapes), strict=False)  # what has no dimension, CLIP's scale, stays
    return network.eval()


def _write_image_processor(folder: Path, **values: Any) -> None:
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    from diffusion_gym.storage import write_json

    clip = {
        "resample": 3,
        "image_mean": OPENAI_CLIP_MEAN,
        "image_std": OPENAI_CLIP_STD,
        "do_center_crop": "crop_size" in values,
    }
    steps = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
    write_json(folder / "preprocessor_config.json", {**clip, **steps, **values})


def main(name: str, out: Path, size: Literal["tiny", "published"] = "tiny") -> None:
    """Write the checkpoint of reward `name` to the folder `out` and print the `reward_kwargs`.

    Raises:
        ValueError: no reward that needs weights, or none whose published shape is known here.
    """
    known = CHECKPOINTS if size == "tiny" else PUBLISHED
    if name not in known:
        raise ValueError(f"name={name!r} is not to be had in size={size!r}; use one of {', '.join(known)}")
    out.mkdir(parents=True, exist_ok=True)
    keywords = known[name](out)
    print(json.dumps(keywords))
    words = [word for key, value in keywords.items() for word in (key, str(value))]
    print(f"--env.reward-kwargs {shlex.join(words)}", file=sys.stderr)


if __name__ == "__main__":
    import tyro

    try:
        tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))
    except (ValueError, OSError) as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        raise SystemExit(2) from None
