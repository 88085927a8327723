"""LLaVA, or another image-text-to-text model of transformers, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from diffusion_gym.devices import device_called
from diffusion_gym.hub import located
from diffusion_gym.pretrained import Fingerprint, fingerprint, load_network
from diffusion_gym.quiet import quiet
from diffusion_gym.rewards.vlm.base import VLMError

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class LocalVLM:
    """Answers in batches, always with the likeliest token.

    The weights are loaded with the first question, once a device and dtype for all rewards of the process.

    Args:
        source: a hub id or a directory, with the model's processor and chat template.
        device: where it runs; by default where the pictures are.
        dtype: float32, float16 or bfloat16; by default float16 on a GPU and float32 on a CPU.
        batch_size: pictures at once.
        max_tokens: the longest answer, in tokens.

    Raises:
        FileNotFoundError: the model's files are not here and cannot be fetched.
        ValueError: an unknown dtype, a device that is not here, or a number below 1.
    """

    remote = False

    def __init__(
        self,
        source: str,
        *,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int = 8,
        max_tokens: int = 64,
    ) -> None:
        if dtype is not None and dtype not in _DTYPES:
            raise ValueError(f"dtype={dtype!r} must be one of {', '.join(_DTYPES)}")
        if batch_size < 1 or max_tokens < 1:
            raise ValueError(f"batch_size={batch_size!r} and max_tokens={max_tokens!r} must be at least 1")
        if device is not None:
            device_called(device)
        self.device, self.dtype = device, dtype
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.name = f"{source} ({dtype}, {max_tokens} tokens)"
        self.folder = located(source, argument="vlm")
        self._files = fingerprint(self.folder)

    def describe(self, pictures: torch.Tensor, questions: Sequence[str]) -> list[str | None]:
        """Answer one question a picture; see `VLM.describe`."""
        if pictures.ndim == 5:
            raise VLMError(
                f"vlm={self.name!r} runs in this process and is asked about one picture at a time; to compare two, "
                "give the URL of a chat server, such as vlm='http://127.0.0.1:8000/v1'"
            )
        device = torch.device(self.device or pictures.device)
        dtype = self.dtype or ("float32" if device.type == "cpu" else "float16")
        model = _load(self.folder, device, dtype, self._files)
        answers: list[str | None] = []
        for start in range(0, len(questions), self.batch_size):
            part = slice(start, start + self.batch_size)
            answers += model.answer(pictures[part], questions[part], self.max_tokens)
        return answers

    def cancel(self) -> None:
        """Nothing to give up: it computes, and does not wait."""


class _Loaded:
    def __init__(self, folder: str, device: torch.device, dtype: str) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor: Any = AutoProcessor.from_pretrained(folder)
        if getattr(self.processor, "chat_template", None) is None:
            raise ValueError(
                f"vlm={folder!r} has no chat template, so it cannot be asked; use an instruction-tuned model"
            )
        self.processor.tokenizer.padding_side = "left"  # the answer follows the question's last token
        if self.processor.tokenizer.pad_token is None:
            self.processor.tokenizer.pad_token = self.processor.tokenizer.eos_token
        kind = AutoModelForImageTextToText
        model = load_network(kind, folder, argument=f"vlm={folder!r}", dtype=_DTYPES[dtype])
        self.model: Any = model.to(device).requires_grad_(False).eval()

    @torch.no_grad()
    def answer(self, pictures: torch.Tensor, questions: Sequence[str], max_tokens: int) -> list[str]:
        from PIL import Image

        texts = [self._ask(question) for question in questions]
        inputs = self.processor(
            text=texts,
            images=[Image.fromarray(picture) for picture in pictures.cpu().numpy()],
            padding=True,
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)
        output = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens)
        written = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in written]

    def _ask(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        turns = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(turns, add_generation_prompt=True))


@lru_cache(maxsize=2)
def _load(folder: str, device: torch.device, dtype: str, files: Fingerprint) -> _Loaded:
    with quiet():
        return _Loaded(folder, device, dtype)
