"""The development set: fixed noises whose pictures and rewards are followed through a training (thesis, appendix A)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.processes import Processes
from diffusion_gym.agents.training.checkpoint import Progress
from diffusion_gym.agents.training.denoised_path import denoised_path
from diffusion_gym.agents.training.pictures import compared_sheet, drop_pictures_after, png_bytes
from diffusion_gym.agents.training.records import append_record, drop_records_after, read_development
from diffusion_gym.agents.training.sampling import DEVELOPMENT, finite_mean, sample
from diffusion_gym.agents.training.tracking import Picture, Tracker
from diffusion_gym.devices import require_memory
from diffusion_gym.envs.vector import DenoisingVectorEnv
from diffusion_gym.images import to_float
from diffusion_gym.rewards import Reward, evaluate
from diffusion_gym.schemas import parse_checked
from diffusion_gym.storage import exact_json, load_tensors, save_tensors, tensors_metadata, write_bytes

_COLUMNS: Final = ("original", "current", "original_reward", "current_reward", "difference", "prompt", "reward_path")


class _Stopped(Exception):
    """The run is to end."""


@dataclass(frozen=True)
class Samples:
    """What a model makes of the fixed noises.

    Attributes:
        prompts: of the N pictures.
        images: uint8 `(N, H, W, 3)`.
        rewards: float32 `(N,)`; NaN or infinite where the reward failed.
        path: rewards of the denoised estimates x0~ of x_T to x_1 and of x_0, for the first M, float32 `(T + 1, M)`.
    """

    prompts: tuple[str, ...]
    images: torch.Tensor
    rewards: torch.Tensor
    path: torch.Tensor


@dataclass(frozen=True)
class Evaluation:
    """The tuned policy's samples beside those of the pretrained model, from the same noises."""

    original: Samples
    current: Samples

    @property
    def difference(self) -> torch.Tensor:
        """Current less original reward `(N,)`; NaN where either is not finite."""
        difference = (self.current.rewards - self.original.rewards).double()
        return torch.where(difference.isfinite(), difference, torch.nan)

    def summary(self) -> dict[str, Any]:
        """Means over the finite values, None where there are none; the paths' are lists of T + 1, empty for M = 0."""
        finite = self.difference[self.difference.isfinite()]
        return {
            "reward_mean": _mean(self.current.rewards),
            "base_reward_mean": _mean(self.original.rewards),
            "difference_mean": _mean(finite),
            "improved": _mean((finite > 0).double()),
            "reward_path": _means(self.current.path),
            "base_reward_path": _means(self.original.path),
        }

    def curve(self, samples: slice = slice(None)) -> Picture:
        """A chart of the mean reward along the trajectories of some samples, original and current."""
        return _chart([_means(part.path[:, samples]) for part in (self.original, self.current)])

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """The rows of the table of figure A.1, in the order of its columns."""
        for index, prompt in enumerate(self.current.prompts):
            values = (part.rewards[index].item() for part in (self.original, self.current))
            charted = self.curve(slice(index, index + 1)) if index < self.current.path.shape[1] else None
            pictures = (part.images[index].numpy() for part in (self.original, self.current))
            yield (*pictures, *values, self.difference[index].item(), prompt, charted)


@dataclass
class DevelopmentSet:
    """Follows fixed noises through a training; the pretrained model's pictures are sampled once and kept.

    Writes `development.safetensors`, the pretrained model's; `development.jsonl`, a record an evaluation; and
    `images/development-*.png`. The noises depend on the seed and on the sizes here, never on the training.

    Args:
        env: a denoising vector environment of its own; `samples` is a multiple of its `num_envs`.
        folder: the run folder.
        seed: of the run.
        samples: the noises, N.
        paths: for how many of them the reward is computed at every step, M.
        processes: that run the network in step, all of which sample then; the main one alone reads and writes.
        probes: rewards by name that are evaluated on the same pictures and never trained on, to see over-optimisation
            (DDPO, section 6.4).

    Raises:
        ValueError: `samples` is no multiple of `env.num_envs`, or more than memory holds.
    """

    env: VectorEnv[Any, Any, Any]
    folder: Path
    seed: int = 0
    samples: int = 64
    paths: int = 16
    processes: Processes = field(default_factory=Processes)
    probes: Mapping[str, Reward] = field(default_factory=dict)
    _original: Samples | None = field(default=None, init=False)
    _original_probes: dict[str, float | None] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.samples % self.env.num_envs:
            raise ValueError(
                f"development_samples={self.samples} must be a multiple of the environment's num_envs, "
                f"{self.env.num_envs}"
            )
        base: Any = self.env.unwrapped
        require_memory(
            f"development_samples={self.samples}",
            self.samples * math.prod(base.model.latent_shape),
            torch.device("cpu"),
            "follow fewer",
        )

    def go_back(self, iteration: int) -> None:
        """Drop what was written after an iteration, that of the checkpoint from which the run goes on."""
        if self._records.exists():
            drop_records_after(self._records, iteration)
        drop_pictures_after(self.folder / "images", "development", iteration)

    def track(
        self,
        policy: DenoisingPolicy,
        progress: Progress,
        tracker: Tracker,
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Evaluate the policy, write the record and the sheet, and show them; nothing if that record is there.

        Args:
            policy: the policy.
            progress: how far the training has come.
            tracker: where numbers and pictures are shown.
            stop: asked before each batch; where it says so nothing is written.

        Returns:
            Whether the record is there.

        Raises:
            RewardError: the reward failed.
            ValueError: the run's prompts or reward paths are no longer those of the stored pictures.
        """
        if self.processes.of_main(any(row["iteration"] == progress.iteration for row in self._read())):
            return True
        started = time.perf_counter()
        try:
            evaluation = self.evaluate(policy, stop)
        except _Stopped:
            return False
        if not self.processes.main:
            return True
        sheet = compared_sheet(
            evaluation.original.images,
            evaluation.current.images,
            evaluation.original.rewards.tolist(),
            evaluation.current.rewards.tolist(),
            evaluation.current.prompts,
        )
        write_bytes(self.folder / "images" / f"development-{progress.iteration:06d}.png", png_bytes(sheet))
        queries, summary = progress.reward_queries, {**evaluation.summary(), **self._probed(evaluation)}
        tracker.scalars(summary, queries, "development/")
        tracker.picture("development/pictures", np.asarray(sheet), queries)
        if self.paths:
            tracker.picture("development/reward_path", evaluation.curve(), queries)
        tracker.table("development/samples", _COLUMNS, evaluation.rows(), queries)
        seconds = round(time.perf_counter() - started, 3)
        rewards = evaluation.current.rewards.tolist()
        append_record(self._records, {**vars(progress), **summary, "rewards": rewards, "seconds": seconds})
        return True

    @torch.no_grad()
    def evaluate(self, policy: DenoisingPolicy, stop: Callable[[], bool] = lambda: False) -> Evaluation:
        """Sample the noises with the policy, and once with the pretrained model; `stop` as for `track`."""
        original = self._original or self._stored(policy, stop)
        current = self._sample(policy, stop)
        self._original = original = original or current
        if current.prompts != original.prompts or current.path.shape != original.path.shape:
            raise ValueError(
                f"{self._file} is of other prompts or sizes than this run's development set; delete it to have the "
                "pretrained model sampled again"
            )
        return Evaluation(original, current)

    def _read(self) -> list[dict[str, Any]]:
        return read_development(self._records) if self.processes.main else []

    def _probed(self, evaluation: Evaluation) -> dict[str, float | None]:
        """The probes' means over the policy's pictures, `probe_NAME`, and the pretrained model's, `base_probe_NAME`."""
        if self._original_probes is None:
            self._original_probes = self._probe(evaluation.original)
        now = {f"probe_{name}": mean for name, mean in self._probe(evaluation.current).items()}
        return now | {f"base_probe_{name}": mean for name, mean in self._original_probes.items()}

    def _probe(self, samples: Samples) -> dict[str, float | None]:
        """The probes' means over pictures, but for those whose reward failed."""
        base = cast(DenoisingVectorEnv, self.env.unwrapped)
        metadata, means = base.prompt_set.metadata_of(samples.prompts), dict[str, float | None]()
        for name, probe in self.probes.items():
            scores = []
            for first in range(0, self.samples, base.num_envs):
                rows = slice(first, first + base.num_envs)
                pictures = to_float(samples.images[rows].to(base.device))
                scores.append(evaluate(probe, pictures, samples.prompts[rows], metadata[rows]).scores.cpu())
            means[name] = _mean(torch.cat(scores)[samples.rewards.isfinite()])
        return means

    @property
    def _records(self) -> Path:
        return self.folder / "development.jsonl"

    @property
    def _file(self) -> Path:
        return self.folder / "development.safetensors"

    def _stored(self, policy: DenoisingPolicy, stop: Callable[[], bool]) -> Samples | None:
        """The pretrained model's samples; None in a process that need not have them."""
        if not self.processes.of_main(self._file.is_file()):
            with _pretrained(policy):
                samples = self._sample(policy, stop)
            if not self.processes.main:
                return samples
            tensors = {"images": samples.images, "rewards": samples.rewards, "path": samples.path}
            save_tensors(self._file, tensors, {"prompts": exact_json(samples.prompts)})
        return read_original(self._file) if self.processes.main else None

    def _sample(self, policy: DenoisingPolicy, stop: Callable[[], bool]) -> Samples:
        """Batch by batch, so that the latents of one alone are in memory."""
        batch, steps = self.env.num_envs, len(policy.table) + 1
        prompts: list[str] = []
        images, rewards, paths = [], [], [torch.empty(steps, 0)]
        for first in range(0, self.samples, batch):
            if stop():
                raise _Stopped
            trajectories = sample(self.env, policy, batch, (self.seed, DEVELOPMENT, first // batch))
            prompts += trajectories.prompts
            images.append(trajectories.images.cpu())
            rewards.append(trajectories.rewards.cpu())
            if (followed := min(batch, self.paths - first)) > 0:
                paths.append(denoised_path(self.env, policy, trajectories, followed).rewards)
        return Samples(tuple(prompts), torch.cat(images), torch.cat(rewards), torch.cat(paths, 1))


def read_original(path: Path) -> Samples:
    """The pretrained model's samples, of a `development.safetensors`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated or of something else.
    """
    tensors = load_tensors(path)
    try:
        prompts = parse_checked(list[str], tensors_metadata(path)["prompts"], f"{path}, prompts", "delete the file")
        return Samples(tuple(prompts), tensors["images"], tensors["rewards"], tensors["path"])
    except KeyError as error:
        raise ValueError(f"{path} is no file of a development set ({error}); delete it") from error


@contextmanager
def _pretrained(policy: DenoisingPolicy) -> Iterator[None]:
    """Within this context the policy is the pretrained model, its denoised estimates included."""
    tuned, policy.unet = policy.unet, policy.reference_network
    try:
        yield
    finally:
        policy.unet = tuned
        policy.set_reference_aside()


def _mean(values: torch.Tensor) -> float | None:
    mean = finite_mean(values)
    return None if math.isnan(mean) else mean


def _means(path: torch.Tensor) -> list[float | None]:
    return [_mean(step) for step in path] if path.shape[1] else []


def _chart(curves: list[list[float | None]]) -> Picture:
    """Rewards against denoising steps as a picture, uint8 `(H, W, 3)`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), dpi=80, layout="constrained")  # without pyplot, which has a state of its own
    axes = figure.add_subplot()
    for name, values in zip(("original", "current"), curves, strict=True):
        axes.plot([np.nan if value is None else value for value in values], label=name)
    axes.set(xlabel="denoising steps done", ylabel="reward of the denoised estimate")
    axes.legend()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
