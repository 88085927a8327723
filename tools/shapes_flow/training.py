"""Rectified flow: the loss, and a loop that keeps everything on the device and stops by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from diffusion_gym.agents.optimizer_state import optimizer_tensors, restore_optimizer
from diffusion_gym.storage import load_tensors, save_tensors, tensors_metadata
from tools.shapes.training import warm_cosine
from tools.shapes_flow.data import TrainingSet
from tools.shapes_flow.networks import embed
from tools.shapes_flow.teacher import LAST, Teacher

CAPTION_DROPOUT: Final = 0.1  # share of captions replaced by the empty one, for classifier-free guidance
POOL: Final = 2**18
STRETCH: Final = 100  # steps that one seed serves: the loop can be stopped and resumed between two stretches


@dataclass(frozen=True)
class Phase:
    """A part of the training.

    Attributes:
        start: its first step.
        cosine: step at which the learning rate would be at its least, were this phase to go on until there.
        shares: chance of each kind of caption.
        time_mean: of the logit of t; above 0 the noisy end is drawn more often.
        guidance: scale of the teacher's guidance.
    """

    start: int
    cosine: int
    shares: Mapping[str, float]
    time_mean: float
    guidance: float = 1.0


@dataclass(frozen=True)
class Schedule:
    """Of the training.

    Attributes:
        steps: where the training ends.
        batch: latents a step.
        lr: peak learning rate.
        ema: decay of the moving average.
        phases: from the first step on.
        time_std: of the logit of t, the share of noise in x_t.
    """

    steps: int
    batch: int
    lr: float
    ema: float
    phases: Sequence[Phase]
    time_std: float


class Trainer:
    """Trains `networks` on `data` and keeps a moving average; state and average are on the device of the networks.

    Args:
        networks: of `make_trained`.
        data: the training set.
        schedule: how.
        folder: where the state is kept; a state there is resumed.
        seed: seed of the draws.
        graph: on CUDA, whether a step is one recorded graph.
        teacher: whose velocities are the targets where it knows them; none to train on the data alone.
    """

    def __init__(
        self,
        networks: nn.ModuleDict,
        data: TrainingSet,
        schedule: Schedule,
        folder: Path,
        *,
        seed: int,
        graph: bool,
        teacher: Teacher | None,
    ) -> None:
        self.networks, self.schedule, self.folder, self.seed = networks, schedule, folder, seed
        self.teacher = teacher
        self.weights = list(networks.parameters())
        self.device = self.weights[0].device
        self.cuda = self.device.type == "cuda"
        self.wants_graph, self.graph = graph and self.cuda, None
        self.data, self.kinds_pool = data, torch.zeros(POOL, dtype=torch.int64, device=self.device)
        self.latents, self.tokens = data.latents.to(self.device), data.tokens.to(self.device)
        self.empty = data.empty.to(self.device)
        self.rate, self.follow, self.loss, self.time_mean = (torch.zeros((), device=self.device) for _ in range(4))
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=self.rate, weight_decay=1e-2, betas=(0.9, 0.98), fused=True, capturable=self.cuda
        )
        self.average = [weight.detach().clone() for weight in self.weights]
        self.step, self.phase, self.guidance = 0, -1, 1.0
        self._resume()

    def run(self, deadline: float, after: Callable[[int], bool], every: int) -> None:
        """Train to the schedule's end, or until `time.monotonic()` is `deadline`; saves the state at the end.

        Args:
            deadline: on the monotonic clock.
            after: called with the step's number every `every` steps, and at the end; true ends the training.
            every: a multiple of `STRETCH`.
        """
        stream = None
        if self.cuda:  # a graph is recorded off the default stream, and so is what comes before it
            torch.cuda.synchronize()
            stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            self._run(deadline, after, every)

    def _run(self, deadline: float, after: Callable[[int], bool], every: int) -> None:
        shown, shown_at = self.step, time.monotonic()
        while self.step < self.schedule.steps and time.monotonic() < deadline:
            self._stretch()
            now = time.monotonic()
            if now - shown_at > 5:
                loss = float(self.loss) / STRETCH
                print(
                    f"step {self.step}: loss {loss:.4f}, {(self.step - shown) / (now - shown_at):.1f} steps/s",
                    flush=True,
                )
                shown, shown_at = self.step, time.monotonic()
            if self.step % every == 0 and self.step < self.schedule.steps:
                self.save()
                if after(self.step):
                    return
        self.save()
        after(self.step)

    def _stretch(self) -> None:
        """`STRETCH` steps; no result is read back by the host."""
        torch.manual_seed(self.seed * 1_000_003 + self.step)
        phase = self._enter_phase()
        self.loss.zero_()
        for _ in range(STRETCH):
            self.rate.fill_(self.schedule.lr * warm_cosine(self.step, phase.cosine, 300))
            self.follow.fill_(1 - min(self.schedule.ema, (1 + self.step) / (10 + self.step)))
            if self.wants_graph and self.graph is None and self.step % STRETCH == 10:
                self._record()
            self.graph.replay() if self.graph is not None else self._one()
            self.step += 1

    def _enter_phase(self) -> Phase:
        number = max(i for i, phase in enumerate(self.schedule.phases) if phase.start <= self.step)
        phase = self.schedule.phases[number]
        if number != self.phase:
            self.phase = number
            generator = torch.Generator().manual_seed(self.seed + number)
            self.kinds_pool.copy_(self.data.pool(phase.shares, POOL, generator))
            self.time_mean.fill_(phase.time_mean)
            self.guidance, self.graph = phase.guidance, None
        return phase

    def _record(self) -> None:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                self._one()
            self.graph = graph
            print("a step is one CUDA graph", flush=True)
        except RuntimeError as error:
            self.wants_graph = False
            torch.cuda.synchronize()
            print(f"no CUDA graph ({error}); going on without", flush=True)

    def _one(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.cuda, cache_enabled=False):
            loss = self._flow_loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            moves = torch._foreach_sub(self.weights, self.average)
            torch._foreach_mul_(moves, self.follow)
            torch._foreach_add_(self.average, moves)
            self.loss.add_(loss.detach())

    def _flow_loss(self) -> torch.Tensor:
        """E ||v(x_t, t, c) - (eps - x0)||^2 with x_t = (1 - t) x0 + t eps, or the teacher's velocity for eps - x0."""
        number, device = self.schedule.batch, self.device
        chosen = self.kinds_pool[torch.randint(POOL, (number,), device=device)]
        x0 = self.latents[chosen].float()
        noise = torch.randn_like(x0)
        t = torch.sigmoid(self.time_mean + self.schedule.time_std * torch.randn(number, device=device))
        dropped = torch.rand(number, 1, device=device) < CAPTION_DROPOUT
        tokens = torch.where(dropped, self.empty, self.tokens[chosen])
        context, pooled = embed(self.networks, tokens)
        mix = t[:, None, None, None]
        noisy, target = (1 - mix) * x0 + mix * noise, noise - x0
        if self.teacher is not None:
            taught = self.teacher.velocity(noisy, t, tokens, self.empty, self.guidance)
            target = torch.where(mix < LAST, taught, target)
        velocity = self.networks["transformer"](
            hidden_states=noisy,
            timestep=1000 * t,
            encoder_hidden_states=context,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return (velocity.float() - target).square().mean()

    # --- state ----------------------------------------------------------------------------------------------------

    def averaged(self) -> dict[str, torch.Tensor]:
        """The averaged weights, on the CPU, by their names in `networks`."""
        names = [name for name, _ in self.networks.named_parameters()]
        return {name: value.cpu() for name, value in zip(names, self.average, strict=True)}

    def save(self) -> None:
        """Write weights, average and optimiser state, with the step's number, as one file."""
        names = [name for name, _ in self.networks.named_parameters()]
        parts: dict[str, Mapping[str, Any]] = {
            "now": dict(zip(names, self.weights, strict=True)),
            "average": dict(zip(names, self.average, strict=True)),
            "adam": optimizer_tensors(self.optimizer),
        }
        tensors = {f"{part}:{key}": value.detach() for part, row in parts.items() for key, value in row.items()}
        save_tensors(self.folder / "state.safetensors", tensors, {"step": str(self.step)})

    def _resume(self) -> None:
        path = self.folder / "state.safetensors"
        if not path.exists():
            return
        self.step = int(tensors_metadata(path)["step"])
        parts: dict[str, dict[str, torch.Tensor]] = {"now": {}, "average": {}, "adam": {}}
        for name, value in load_tensors(path).items():
            part, key = name.split(":", 1)
            parts[part][key] = value
        with torch.no_grad():
            for (name, weight), average in zip(self.networks.named_parameters(), self.average, strict=True):
                weight.copy_(parts["now"][name])
                average.copy_(parts["average"][name])
        restore_optimizer(self.optimizer, parts["adam"])
        self.optimizer.param_groups[0]["lr"] = self.rate  # which loading replaces by a copy
        print(f"resumed at step {self.step}", flush=True)
