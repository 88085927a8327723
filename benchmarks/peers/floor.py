"""The work that no implementation of DDPO can leave out: the UNet's, the decoder's and the reward's.

    python benchmarks/peers/floor.py PIPELINE [--lora]

A rollout is T guided forwards without gradient, the decoding and the JPEGs. Training is guided forwards and backwards
of all transitions, clipping and AdamW. There is no sampler, log-probability, advantage or storage: latents are noise
and the loss is the mean square of the prediction. With `--lora` the rollout has no adapters, as if they were merged.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from workload import Meter, Workload, draw_prompt, main, negative_jpeg_kb

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class LowRank(nn.Module):
    """W x + B A x with W frozen."""

    def __init__(self, linear: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, rank, bias=False, device=linear.weight.device)
        self.up = nn.Linear(rank, linear.out_features, bias=False, device=linear.weight.device)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The adapters compute in float32, as peft's do."""
        return self.linear(x) + self.up(self.down(x.to(self.up.weight.dtype))).to(x.dtype)


def with_adapters(unet: nn.Module) -> nn.Module:
    """A copy with adapters at the attention projections."""
    adapted = copy.deepcopy(unet)
    for name, module in list(adapted.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(TARGETS):
            adapted.set_submodule(name, LowRank(module))
    return adapted


def measure(workload: Workload) -> dict[str, Any]:
    """Time the bare UNet work, decoding and JPEGs."""
    workload.prepare()
    if workload.passed_at_once < 1:
        raise ValueError(f"micro_batch={workload.micro_batch} must be at least 1: the floor finds none by itself")
    floor, meter = Floor(workload), Meter(workload)
    for _ in range(workload.warmup + workload.epochs):
        meter.next_iteration()
        with meter.phase("rollout"):
            floor.roll_out(meter)
        with meter.phase("train"):
            floor.train()
    return meter.line("floor", sum(parameter.numel() for parameter in floor.parameters))


class Floor:
    """The networks of a pipeline, and the bare work with them."""

    def __init__(self, workload: Workload) -> None:
        from diffusers import StableDiffusionPipeline

        self.workload, self.device = workload, torch.device(workload.device)
        pipe = StableDiffusionPipeline.from_pretrained(workload.pipeline, safety_checker=None)
        pipe.scheduler.set_timesteps(workload.steps)
        self.timesteps = pipe.scheduler.timesteps[: workload.steps].to(self.device)
        self.vae = pipe.vae.to(self.device, workload.dtype).requires_grad_(False)
        pipe.text_encoder.to(self.device, workload.dtype)
        # What trains stays float32 under autocast; what is frozen is stored in the precision.
        stored = workload.dtype if workload.lora else torch.float32
        self.sampling = pipe.unet.to(self.device, stored).requires_grad_(not workload.lora).eval()
        self.training = with_adapters(self.sampling) if workload.lora else self.sampling
        self.parameters = [parameter for parameter in self.training.parameters() if parameter.requires_grad]
        self.adam = torch.optim.AdamW(self.parameters, lr=workload.lr, weight_decay=1e-4)
        self.embed = _encoder(pipe, self.device)
        self.shape = (pipe.unet.config.in_channels, *(pipe.unet.config.sample_size,) * 2)

    def _autocast(self) -> AbstractContextManager[Any]:
        precision = self.workload.precision
        return nullcontext() if precision == "no" else torch.autocast(self.device.type, self.workload.dtype)

    def _predict(self, unet: nn.Module, count: int, timesteps: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        latents = torch.randn(count, *self.shape, device=self.device, dtype=next(self.vae.parameters()).dtype)
        with self._autocast():
            output = unet(torch.cat([latents, latents]), timesteps, embeddings, return_dict=False)[0]
        unguided, conditional = output.float().chunk(2)
        return unguided + self.workload.guidance * (conditional - unguided)

    @torch.no_grad()
    def roll_out(self, meter: Meter) -> None:
        """T guided predictions for each sample, and the rewards of pictures."""
        count = self.workload.sample_batch
        decode, reward = meter.part("decode", self._decode), meter.part("reward", negative_jpeg_kb)
        for _ in range(self.workload.samples // count):
            embeddings = self.embed(count)
            for timestep in self.timesteps:
                latents = self._predict(self.sampling, count, timestep, embeddings)
            reward(decode(latents))

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        latents = latents.to(next(self.vae.parameters()).dtype).clamp(-4, 4) / self.vae.config.scaling_factor
        return (self.vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def train(self) -> None:
        """A forward and backward pass for every transition; `trajectories` of them are behind an update."""
        work = self.workload
        total = work.trajectories * work.steps
        embeddings = self.embed(work.passed_at_once)
        for _ in range(work.samples // work.trajectories):
            self.adam.zero_grad()
            for times in self.timesteps.repeat(work.trajectories).split(work.passed_at_once):
                both = torch.cat([part[: len(times)] for part in embeddings.chunk(2)])
                output = self._predict(self.training, len(times), torch.cat([times, times]), both)
                (output.square().mean() * len(times) / total).backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.adam.step()


def _encoder(pipe: Any, device: torch.device) -> Callable[[int], torch.Tensor]:
    """Draws N prompts: embeddings `(2 N, L, D)`, those of the empty prompt first. Each text is encoded once."""
    known: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def encoded(text: str) -> torch.Tensor:
        if text not in known:
            ids = pipe.tokenizer([text], padding="max_length", truncation=True, return_tensors="pt").input_ids
            known[text] = pipe.text_encoder(ids.to(device))[0][0]
        return known[text]

    return lambda count: torch.stack([*[encoded("")] * count, *(encoded(draw_prompt()) for _ in range(count))])


if __name__ == "__main__":
    main(measure)
