"""The workload with the DDPOTrainer of TRL 0.23.1, the last release that has one.

It needs a virtual environment of its own, without diffusion_gym:

    python -m venv TRL
    TRL/bin/pip install torch==2.13.0 trl==0.23.1 diffusers==0.35.2 transformers==4.56.2 accelerate==1.10.1 \
        peft==0.17.1 pillow tyro
    TRL/bin/python benchmarks/peers/trl_ddpo.py PIPELINE [--lora]
"""

from __future__ import annotations

from typing import Any

import torch
from workload import Meter, Workload, draw_prompt, main, negative_jpeg_kb


def measure(workload: Workload) -> dict[str, Any]:
    """Time TRL's DDPOTrainer."""
    workload.prepare()
    from accelerate import PartialState
    from trl import DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    class Measured(DDPOTrainer):  # type: ignore[misc]
        """Says where rollouts end and training begins."""

        def step(self, epoch: int, global_step: int) -> int:
            meter.next_iteration()
            meter.begin("rollout")
            after: int = super().step(epoch, global_step)
            meter.end("train")
            updates.append(after - global_step)
            return after

        def _train_batched_samples(self, *args: Any) -> int:
            meter.end("rollout")
            meter.begin("train")
            after: int = super()._train_batched_samples(*args)
            return after

    PartialState(cpu=workload.device == "cpu")  # the trainer's warnings need it before the trainer makes it
    meter, updates = Meter(workload), list[int]()
    pipeline = DefaultDDPOStableDiffusionPipeline(workload.pipeline, use_lora=workload.lora)
    pipeline.vae.decode = meter.part("decode", pipeline.vae.decode)
    Measured(_config(workload), meter.part("reward", _reward), lambda: (draw_prompt(), {}), pipeline).train()
    trained = sum(parameter.numel() for parameter in pipeline.unet.parameters() if parameter.requires_grad)
    return meter.line("TRL", trained, updates=updates[-1])


def _reward(images: torch.Tensor, prompts: Any, metadata: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    return torch.tensor(negative_jpeg_kb(images)), {}


def _config(workload: Workload) -> Any:
    from trl import DDPOConfig

    return DDPOConfig(
        seed=workload.seed,
        num_epochs=workload.warmup + workload.epochs,
        save_freq=workload.warmup + workload.epochs,  # no checkpoint
        mixed_precision=workload.precision,
        accelerator_kwargs={"cpu": workload.device == "cpu"},
        sample_num_steps=workload.steps,
        sample_eta=workload.eta,
        sample_guidance_scale=workload.guidance,
        sample_batch_size=workload.sample_batch,
        sample_num_batches_per_epoch=workload.samples // workload.sample_batch,
        train_batch_size=workload.train_batch,
        train_gradient_accumulation_steps=workload.accumulation,
        train_learning_rate=workload.lr,
        train_clip_range=workload.clip,
        per_prompt_stat_tracking=True,
        per_prompt_stat_tracking_buffer_size=32,
    )


if __name__ == "__main__":
    main(measure)
