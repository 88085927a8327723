"""One resumable training loop for the parts of the `Shapes` model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from diffusion_gym.agents.optimizer_state import optimizer_tensors, restore_optimizer
from diffusion_gym.storage import (
    load_tensors,
    read_json,
    save_tensors,
    write_json,
)


def warm_cosine(step: int, steps: int, warm_up: int = 100) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to 2 %."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


class Stage:
    """Trains `modules` with AdamW and keeps an exponential moving average of their weights.

    The state is saved to `folder` every `save_every` steps, and `run` goes on from there. Each step draws its
    randomness from a generator seeded by (seed, step), so a resumed run equals an uninterrupted one.

    Args:
        name: the name of the state's files and of the progress bar.
        modules: what is trained.
        folder: where the state is kept.
        lr: peak learning rate.
        ema: decay of the moving average.
        seed: the seed.
        save_every: steps between two saved states.
    """

    def __init__(
        self,
        name: str,
        modules: nn.ModuleDict,
        folder: Path,
        *,
        lr: float,
        ema: float,
        seed: int,
        save_every: int = 500,
    ) -> None:
        self.name, self.modules, self.folder = name, modules, folder
        self.lr, self.ema, self.seed, self.save_every = lr, ema, seed, save_every
        self.optimizer = torch.optim.AdamW(modules.parameters(), lr=lr, weight_decay=1e-4)
        self.average = {key: value.clone() for key, value in modules.state_dict().items()}
        self.step = 0
        self._resume()

    def run(
        self,
        steps: int,
        loss: Callable[[int, torch.Generator], torch.Tensor],
        after: Callable[[int], None] | None = None,
        schedule: int | None = None,
    ) -> None:
        """Train up to `steps` steps.

        Args:
            steps: the step to reach, counted from the very first.
            loss: step and generator -> the loss to differentiate.
            after: called with the step's number whenever the state is saved.
            schedule: length of the learning-rate schedule; `steps` by default.
        """
        bar = tqdm(total=steps, initial=self.step, desc=self.name, mininterval=5)
        while self.step < steps:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
            value = loss(self.step, generator)
            self.optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * warm_cosine(self.step, schedule or steps)
            self.optimizer.step()
            self._update_average()
            self.step += 1
            bar.update()
            if self.step % 50 == 0:
                bar.set_postfix(loss=f"{value.item():.4f}")
            if self.step % self.save_every == 0 or self.step == steps:
                self.save()
                if after is not None:
                    after(self.step)
        bar.close()

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.ema, (1 + self.step) / (10 + self.step))
        for key, value in self.modules.state_dict().items():
            self.average[key].lerp_(value, 1 - decay) if value.is_floating_point() else self.average[key].copy_(value)

    def save(self) -> None:
        """Write weights, average and optimiser state as one file, and the step count inside its name's JSON."""
        parts = {"now": self.modules.state_dict(), "average": self.average, "adam": optimizer_tensors(self.optimizer)}
        tensors = {f"{part}:{key}": value for part, row in parts.items() for key, value in row.items()}
        save_tensors(self.folder / f"{self.name}-{self.step}.safetensors", tensors)
        write_json(self.folder / f"{self.name}.json", {"step": self.step, "seed": self.seed})
        for old in self.folder.glob(f"{self.name}-*.safetensors"):
            if old.stem != f"{self.name}-{self.step}":
                old.unlink()

    def _resume(self) -> None:
        pointer = self.folder / f"{self.name}.json"
        if not pointer.exists():
            return
        self.step = int(read_json(pointer)["step"])
        stored = load_tensors(self.folder / f"{self.name}-{self.step}.safetensors")
        parts: dict[str, dict[str, torch.Tensor]] = {"now": {}, "average": {}, "adam": {}}
        for name, value in stored.items():
            part, key = name.split(":", 1)
            parts[part][key] = value
        self.modules.load_state_dict(parts["now"])
        device = next(self.modules.parameters()).device
        self.average = {key: value.to(device) for key, value in parts["average"].items()}
        restore_optimizer(self.optimizer, parts["adam"])

    def use_average(self) -> None:
        """Put the averaged weights into the modules."""
        self.modules.load_state_dict(self.average)
