"""Finds objects by a network of transformers: Mask2Former, with masks, or RT-DETR and the like, with boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from numpy.typing import NDArray

from diffusion_gym.quiet import quiet
from diffusion_gym.rewards.geneval_rules import Detected, canonical
from diffusion_gym.rewards.vision import pretrained

_WITH_MASKS: Final = "Mask2FormerForUniversalSegmentation"
_ARGUMENT: Final = "reward_kwargs['detector']"


class Detector:
    """A detector with its image processor.

    Args:
        source: a local directory or a hub id of a `Mask2FormerForUniversalSegmentation` for instances, or of a network
            that `AutoModelForObjectDetection` takes.
        dtype: type of its weights.

    Attributes:
        classes: that it knows, by the names that are used here.

    Raises:
        FileNotFoundError: the files are not here and cannot be fetched.
        ValueError: they are of something else.
    """

    def __init__(self, source: str, dtype: str) -> None:
        from transformers import AutoConfig, AutoImageProcessor

        from diffusion_gym.hub import located

        folder = located(source, argument=_ARGUMENT)
        kinds = getattr(AutoConfig.from_pretrained(folder, local_files_only=True), "architectures", None) or [""]
        self._masks = kinds[0] == _WITH_MASKS
        kind = _WITH_MASKS if self._masks else "AutoModelForObjectDetection"
        try:
            self._network, _ = pretrained(kind, source, dtype, argument=_ARGUMENT)
            with quiet():
                processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
            name = "post_process_instance_segmentation" if self._masks else "post_process_object_detection"
            self._post_process = getattr(processor, name)
        except (AttributeError, OSError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(
                f"{_ARGUMENT}={source!r} is no detector that can be used ({reason}); give a Mask2Former for instances, "
                "such as facebook/mask2former-swin-small-coco-instance, or an RT-DETR, with their image processor"
            ) from error
        self._processor: Any = processor
        self._labels = {int(number): canonical(str(label)) for number, label in self._network.config.id2label.items()}
        self.classes = sorted(set(self._labels.values()))

    @torch.no_grad()
    def __call__(self, pictures: NDArray[Any], threshold: float, device: torch.device) -> list[list[Detected]]:
        """The objects in each picture.

        Args:
            pictures: uint8 `(n, H, W, 3)`.
            threshold: the least confidence.
            device: where the network runs.
        """
        inputs = self._processor(list(pictures), return_tensors="pt", input_data_format="channels_last")
        network = self._network.on(device)
        inputs = {name: value.to(device) for name, value in inputs.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(network.dtype)
        options: dict[str, Any] = {"threshold": threshold, "target_sizes": [pictures.shape[1:3]] * len(pictures)}
        found = self._post_process(
            network(**inputs), **options, **({"return_binary_maps": True} if self._masks else {})
        )
        return [self._with_masks(one) if self._masks else self._with_boxes(one) for one in found]

    def _with_masks(self, found: dict[str, Any]) -> list[Detected]:
        segments: Sequence[dict[str, Any]] = found["segments_info"]
        detected = []
        for segment, pixels in zip(segments, found["segmentation"] if segments else (), strict=True):
            mask = pixels.bool().cpu()
            rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
            box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            detected.append(Detected(self._labels[segment["label_id"]], segment["score"], box, mask))
        return detected

    def _with_boxes(self, found: dict[str, torch.Tensor]) -> list[Detected]:
        columns = (found[name].cpu().tolist() for name in ("labels", "scores", "boxes"))
        return [Detected(self._labels[label], score, tuple(box)) for label, score, box in zip(*columns, strict=True)]
