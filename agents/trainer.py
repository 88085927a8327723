"""The training loop: rollout, update, metrics, pictures, checkpoint; and the run folder it writes."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from tqdm import tqdm

from diffusion_gym.agents.algorithms import Agent, NoUsableReward
from diffusion_gym.agents.checkpoint import Checkpoints, Progress
from diffusion_gym.agents.pictures import save_grid
from diffusion_gym.agents.processes import Processes
from diffusion_gym.agents.rollout import Trajectories, collect_many
from diffusion_gym.storage import remove_unfinished, write_text

_TRAIN, _PICTURES = 0, 1  # second entry of a seed path, after the seed: what it is for


@dataclass(frozen=True)
class Schedule:
    """How long a run goes on and what it writes on the way."""

    total_reward_queries: int = 50_000
    """Pictures to score in training before the run ends; the DDPO paper goes to 50k."""
    samples_per_iteration: int = 256
    """Trajectories sampled before each round of updates; a multiple of the rollout's batch."""
    checkpoint_every: int = 10
    """Iterations between two checkpoints; the last one is always written."""
    pictures_every: int = 10
    """Iterations between two grids of pictures from the same noise; 0 for none but the first and last."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""

    def __post_init__(self) -> None:
        for name in ("total_reward_queries", "samples_per_iteration", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 1")

    @property
    def planned_reward_queries(self) -> int:
        """`total_reward_queries` in whole iterations, rounded up."""
        return -(-self.total_reward_queries // self.samples_per_iteration) * self.samples_per_iteration


@dataclass
class Trainer:
    """Trains an agent on an environment and writes a run folder.

    Args:
        env: a denoising vector environment; its `num_envs` is the batch of a rollout.
        agent: the agent, whose policy came from the environment.
        out: the run folder: `metrics.jsonl`, `checkpoints/`, `images/`, `tensorboard/`.
        schedule: how long, and what to write.
        seed: all randomness of the run derives from it.
        pictures_env: a small vector environment for the picture grids; None for no pictures.
        progress: show a progress bar.
    """

    env: VectorEnv[Any, Any, Any]
    agent: Agent
    out: Path
    schedule: Schedule = field(default_factory=Schedule)
    seed: int = 0
    pictures_env: VectorEnv[Any, Any, Any] | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if self.schedule.samples_per_iteration % self.env.num_envs:
            raise ValueError(
                f"samples_per_iteration={self.schedule.samples_per_iteration} must be a multiple of the rollout's "
                f"batch, num_envs={self.env.num_envs}"
            )
        group = getattr(self.agent.config, "group_size", 1)  # refused here, before the run folder is written
        if self.env.num_envs % group:
            raise ValueError(f"group_size={group} must divide the rollout's batch, num_envs={self.env.num_envs}")
        self.checkpoints = Checkpoints(self.out / "checkpoints", self.schedule.keep_checkpoints)
        self.done = Progress()
        self.processes = self.agent.processes
        self.processes.share(self.schedule.samples_per_iteration // self.env.num_envs)
        self._stop = False

    @property
    def finished(self) -> bool:
        """Whether the budget of reward queries is spent."""
        return self.done.reward_queries >= self.schedule.total_reward_queries

    def run(self, resume: bool = False, until: int | None = None) -> Progress:
        """Train to the end of the schedule, or until Ctrl-C; called again, it goes on.

        Args:
            resume: go on from the newest checkpoint, dropping the metrics written after it.
            until: stop for now once this many pictures were scored, with a checkpoint.

        Returns:
            How far the run has come; less than the schedule after a Ctrl-C. A checkpoint holds that state.

        Raises:
            NoUsableReward: an iteration without one finite reward.
            RewardError: the reward failed.
            PeerFailed: another process failed while sampling. In all three cases a checkpoint holds the state before.
            OSError: a checkpoint could not be written.
        """
        self._stop = False  # of an earlier run that Ctrl-C ended
        if resume:
            self.done = self.checkpoints.load(self.agent)
        if self.processes.main:
            remove_unfinished(self.out)
            self._keep_metrics_up_to(self.done.iteration)
        board, bar = self._board(), self._bar()
        with board, bar, self._graceful_stop():
            if not resume or self._pictures_due:  # a kill may have come between a checkpoint and its pictures
                self._pictures()
            try:
                while not self._reached(until) and not self._asked_to_stop():
                    self._iterate(board, bar)
            except NoUsableReward:  # in every process, before the agent has changed
                self._save()
                raise
            self._save()
            self._pictures()
        return self.done

    def _reached(self, until: int | None) -> bool:
        return self.finished or (until is not None and self.done.reward_queries >= until)

    def _iterate(self, board: Any, bar: Any) -> None:
        started = time.perf_counter()
        path = (self.seed, _TRAIN, self.done.iteration)
        trajectories = self._sample(path)
        sampled = time.perf_counter() - started
        self.agent.fraction_done = min(1.0, self.done.reward_queries / self.schedule.total_reward_queries)
        updated = self.agent.update(trajectories, np.random.default_rng(path))
        number = self.schedule.samples_per_iteration
        self.done = Progress(self.done.iteration + 1, self.done.reward_queries + number)
        seconds = time.perf_counter() - started
        record = {
            **vars(self.done),
            **reward_metrics(trajectories, self.processes),
            **updated,
            "seconds": round(seconds, 3),
            "rollout_seconds": round(sampled, 3),
            "images_per_second": round(number / seconds, 3),
        }
        if self.processes.main:
            self._write_metrics(record, board)
        bar.update(number)
        bar.set_postfix_str(f"reward {record['reward_mean']:.3f}, {record['images_per_second']:.1f} images/s")
        if self.done.iteration % self.schedule.checkpoint_every == 0:
            self._save()
        if self._pictures_due:
            self._pictures()

    def _sample(self, path: tuple[int, ...]) -> Trajectories:
        """This process's trajectories; when one process fails, all of them raise instead of waiting for it."""
        trajectories: Trajectories | None = None
        failure: Exception | None = None
        try:
            trajectories = self.agent.sample(self.env, self.schedule.samples_per_iteration, path)
        except Exception as error:
            failure = error
        try:
            self.processes.agree(failure)
        except Exception:  # in every process, before the agent has changed
            self._save()
            raise
        assert trajectories is not None
        return trajectories

    def _save(self) -> None:
        """Write a checkpoint; no process goes on, or ends and has the others ended, before it is there."""
        failure: OSError | None = None
        try:
            self.checkpoints.save(self.agent, self.done)
        except OSError as error:
            failure = error
        self.processes.agree(failure)

    def _asked_to_stop(self) -> bool:
        return any(self.processes.gather_json(self._stop))

    def _board(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        if not self.processes.main:
            return nullcontext()
        return SummaryWriter(str(self.out / "tensorboard"), purge_step=self.done.reward_queries + 1)

    def _bar(self) -> Any:
        asked, planned = self.schedule.total_reward_queries, self.schedule.planned_reward_queries
        shown = self.progress and self.processes.main
        if shown and planned != asked:
            size = self.schedule.samples_per_iteration
            print(f"total_reward_queries={asked} is rounded up to {planned}, whole iterations of {size}", flush=True)
        done = self.done.reward_queries
        return tqdm(total=planned, initial=done, unit="image", disable=not shown, dynamic_ncols=True)

    def _write_metrics(self, record: dict[str, Any], board: Any) -> None:
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for key, value in record.items():
            if key not in ("iteration", "reward_queries") and math.isfinite(value):
                board.add_scalar(key, value, self.done.reward_queries)

    def _keep_metrics_up_to(self, iteration: int) -> None:
        path = self.out / "metrics.jsonl"
        kept = [json.dumps(row) for row in read_metrics(path) if row["iteration"] <= iteration]
        text = "".join(line + "\n" for line in kept)
        write_text(path, text)

    @property
    def _pictures_due(self) -> bool:
        return bool(self.schedule.pictures_every) and self.done.iteration % self.schedule.pictures_every == 0

    def _pictures(self) -> None:
        """A grid of pictures from noise that is the same at every call."""
        path = self.out / "images" / f"iteration-{self.done.iteration:06d}.png"
        if self.processes.main and self.pictures_env is not None and not path.exists():
            with self.agent.averaged():
                shown = collect_many(
                    self.pictures_env, self.agent.policy, self.pictures_env.num_envs, (self.seed, _PICTURES)
                )
            save_grid(path, shown.images)

    @contextmanager
    def _graceful_stop(self) -> Iterator[None]:
        """Ctrl-C ends the run after the current iteration; a second one at once."""

        def ask(signum: int, frame: Any) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True
            if self.processes.main:
                tqdm.write("Stopping after this iteration; press Ctrl-C again to stop at once.")

        try:
            before = signal.signal(signal.SIGINT, ask)
        except ValueError:  # not the main thread: signals are the caller's business
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def reward_metrics(trajectories: Trajectories, processes: Processes) -> dict[str, float]:
    """Mean and standard deviation of all processes' finite rewards, and the means of their components."""
    rewards = processes.gather(trajectories.rewards).double()
    usable = torch.isfinite(rewards)
    rewards = rewards[usable]
    metrics = {"reward_mean": float(rewards.mean()), "reward_std": float(rewards.std(correction=0))}
    named = processes.gather_json(list(trajectories.components))
    for name in named[0]:
        if all(name in others for others in named):  # a component that one process lacks would have the others wait
            value = trajectories.components[name].double()
            metrics[f"{name}_mean"] = float(processes.gather(value)[usable].mean())
    return metrics


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a last line cut off by a kill is left out."""
    records: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records
