"""Writes tiny detectors with random weights, for tests and trials; downloads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_SIZE = 64  # pixels of a picture in the network


def write_random_mask2former(folder: str | Path, classes: Sequence[str] = (), *, seed: int = 0) -> Path:
    """Write a tiny `Mask2FormerForUniversalSegmentation` with its image processor.

    Args:
        folder: where to.
        classes: that it knows; those of the prompt set `geneval-like` by default.
        seed: seed of the weights.

    Returns:
        The folder.
    """
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    swin = SwinConfig(
        image_size=_SIZE,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        **_labels(classes),
    )
    processor = Mask2FormerImageProcessorPil(size={"height": _SIZE, "width": _SIZE})
    return _write(folder, Mask2FormerForUniversalSegmentation, config, processor, seed)


def write_random_rt_detr(folder: str | Path, classes: Sequence[str] = (), *, seed: int = 0) -> Path:
    """Write a tiny `RTDetrForObjectDetection` with its image processor; arguments as `write_random_mask2former`."""
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig
    from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil

    resnet = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrConfig(
        backbone_config=resnet,
        encoder_hidden_dim=16,
        encoder_in_channels=[8, 16, 16],
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        d_model=16,
        num_queries=6,
        decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=32,
        decoder_layers=1,
        decoder_attention_heads=2,
        **_labels(classes),
    )
    processor = RTDetrImageProcessorPil(size={"height": _SIZE, "width": _SIZE})
    return _write(folder, RTDetrForObjectDetection, config, processor, seed)


def _labels(classes: Sequence[str]) -> dict[str, Any]:
    from diffusion_gym.prompts import make_prompts

    told = make_prompts("geneval-like").metadata.values()
    known = classes or sorted({clause["class"] for entry in told for clause in entry["include"]})
    return {"id2label": dict(enumerate(known)), "label2id": {name: number for number, name in enumerate(known)}}


def _write(folder: str | Path, kind: Any, config: Any, processor: Any, seed: int) -> Path:
    from diffusion_gym.quiet import quiet
    from diffusion_gym.storage import write_folder

    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = kind(config).eval()
        with torch.no_grad():  # a fresh network's classes and masks hardly differ
            for value in network.parameters():
                if value.ndim > 1:
                    value.normal_(0, 1.5 / value[0].numel() ** 0.5)
        write_folder(Path(folder), network.save_pretrained)
        write_folder(Path(folder), processor.save_pretrained)
    return Path(folder)
