"""The training loop: rollout, update, metrics, pictures, checkpoint; and the run folder it writes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from tqdm import tqdm

from diffusion_gym.agents.algorithms import Agent, NoUsableReward
from diffusion_gym.agents.processes import PeerFailed, Processes, peers
from diffusion_gym.agents.rollout import Trajectories, collect_many
from diffusion_gym.agents.streams import stream
from diffusion_gym.agents.training.checkpoint import Checkpoints, Progress
from diffusion_gym.agents.training.development import DevelopmentSet
from diffusion_gym.agents.training.ending import Ending
from diffusion_gym.agents.training.folders import holding
from diffusion_gym.agents.training.pictures import drop_pictures_after, save_grid
from diffusion_gym.agents.training.profile import Profile
from diffusion_gym.agents.training.progress import ProgressLine, duration, estimated_seconds
from diffusion_gym.agents.training.records import append_record, drop_records_after, read_metrics
from diffusion_gym.agents.training.sampling import GRIDS, TRAINING
from diffusion_gym.agents.training.schedule import Schedule
from diffusion_gym.agents.training.tracking import Track, Tracker, open_tracker
from diffusion_gym.storage import remove_unfinished
from diffusion_gym.timing import span

__all__ = ["Schedule", "Trainer", "read_metrics", "reward_metrics"]

T = TypeVar("T")


@dataclass
class Trainer:
    """Trains an agent on an environment and writes a run folder.

    Args:
        env: a denoising vector environment; its `num_envs` is the batch of a rollout.
        agent: the agent, whose policy came from the environment.
        out: the run folder: `metrics.jsonl`, `checkpoints/`, `images/`, `tensorboard/`.
        schedule: how long, and what to write.
        seed: all randomness of the run derives from it.
        pictures_env: a small vector environment for the picture grids; None for no pictures. With `sharding` every
            process needs one, else the main one alone; the same of `development`.
        progress: say what the run will take, and show how far it is.
        development: the development set of the main process; None for none.
        track: where numbers and pictures are shown: `tensorboard`; `wandb`, which is both; or `none`.
        profile: times the iterations; None for none.
    """

    env: VectorEnv[Any, Any, Any]
    agent: Agent
    out: Path
    schedule: Schedule = field(default_factory=Schedule)
    seed: int = 0
    pictures_env: VectorEnv[Any, Any, Any] | None = None
    progress: bool = True
    development: DevelopmentSet | None = None
    track: Track = "tensorboard"
    profile: Profile | None = None

    def __post_init__(self) -> None:
        if self.schedule.samples_per_iteration % self.env.num_envs:
            raise ValueError(
                f"samples_per_iteration={self.schedule.samples_per_iteration} must be a multiple of the rollout's "
                f"batch, num_envs={self.env.num_envs}; change one of them (--samples-per-iteration, --rollout-batch)"
            )
        group = getattr(self.agent.config, "group_size", 1)  # refused here, before the run folder is written
        if self.env.num_envs % group:
            raise ValueError(f"group_size={group} must divide the rollout's batch, num_envs={self.env.num_envs}")
        self.agent.check_env(self.env)
        self.agent.floors.check_env(self.env)
        self.checkpoints = Checkpoints(self.out / "checkpoints", self.schedule.keep_checkpoints)
        self.done = Progress()
        self.processes = self.agent.processes
        self.processes.share(self.schedule.samples_per_iteration // self.env.num_envs)
        self.ending = Ending()
        if self.processes.in_step:
            for name in ("pictures_env", "development"):
                self._require_in_all(name)

    def _require_in_all(self, name: str) -> None:
        """Refuse what one process has and another lacks, where all run the network in step."""
        if len({*self.processes.gather_json(getattr(self, name) is not None)}) > 1:
            raise ValueError(f"{name} is None in some processes only, but sharding has all sample; give it in all")

    @property
    def finished(self) -> bool:
        """Whether the budget of reward queries is spent."""
        return self.done.reward_queries >= self.schedule.total_reward_queries

    def run(self, resume: bool = False, until: int | None = None) -> Progress:
        """Train to the end of the schedule, or until Ctrl-C or another signal to end; called again, it goes on.

        Args:
            resume: go on from the newest checkpoint, dropping the metrics written after it.
            until: stop for now once this many pictures were scored, with a checkpoint.

        Returns:
            How far the run has come; less than the schedule after a signal. A checkpoint holds that state.

        Raises:
            Diverged: an update left numbers that are not finite; the last checkpoint stands.
            FileExistsError: another process trains in the run folder.
            NoUsableReward: an iteration without one finite reward.
            RewardError: the reward failed.
            PeerFailed: another process failed while sampling. In all three cases a checkpoint holds the state before,
                unless the processes run a network in step, which one that failed has left.
            KeyboardInterrupt: a second Ctrl-C, or a reward that does not answer to a run that is to end. If that was
                while sampling, the same holds.
            OSError: a checkpoint could not be written.
            ValueError: W&B is asked for and cannot be written to.
        """
        if resume:
            self.restore()
        with holding(self.out, self.processes):
            return self._run(until)

    def restore(self, *, older: bool = False) -> None:
        """Go back to the newest checkpoint; `run` then goes on from there. Nothing is written.

        Args:
            older: pass over damaged checkpoints, which are renamed, to the newest one that is whole.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or of another program or policy.
        """
        self.done = self.checkpoints.load(self.agent, older=older)

    def _run(self, until: int | None) -> Progress:
        if self.processes.main:
            remove_unfinished(self.out)
            drop_records_after(self._metrics, self.done.iteration)
            drop_pictures_after(self.out / "images", "iteration", self.done.iteration)
            if self.development is not None:
                self.development.go_back(self.done.iteration)
        gone = peers() if self.processes.in_step else nullcontext()  # which shows in any call of the network
        with gone, self._tracker() as tracker, self._line() as line, self.ending.listening(self._say):
            started = time.perf_counter()
            if not self.done.iteration or self._pictures_due:  # a kill may have come between checkpoint and pictures
                self._pictures()
            self._estimate(time.perf_counter() - started)
            self._develop(tracker)
            try:
                while not self._reached(until) and not self._asked_to_stop():
                    with self._profiled():
                        self._iterate(tracker, line)
            except NoUsableReward as error:  # in every process, before the agent has changed
                self._save()
                self.processes.agree(error)  # raises it; of several processes one tells
            self._save()
            if self.finished:  # a run that goes on would have a grid that an uninterrupted one lacks
                self._pictures()
            self._develop(tracker)
        return self.done

    def _reached(self, until: int | None) -> bool:
        return self.finished or (until is not None and self.done.reward_queries >= until)

    @property
    def _metrics(self) -> Path:
        return self.out / "metrics.jsonl"

    def _profiled(self) -> AbstractContextManager[None]:
        if self.profile is None:
            return nullcontext()
        ahead = self.schedule.total_reward_queries - self.done.reward_queries
        return self.profile.iteration(last=ahead <= self.schedule.samples_per_iteration)

    def _iterate(self, tracker: Tracker, line: ProgressLine) -> None:
        started = time.perf_counter()
        path = (self.seed, TRAINING, self.done.iteration)
        with self.agent.noise_window(path):
            trajectories = self._sample(path)
            sampled = time.perf_counter() - started
            self.agent.fraction_done = min(1.0, self.done.reward_queries / self.schedule.total_reward_queries)
            updated = self.agent.learn(trajectories, np.random.default_rng(stream(path, "update")))
        self.agent.check_finite(self.done.iteration + 1, updated)
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
            append_record(self._metrics, record)
            tracker.scalars(record, self.done.reward_queries)
        line.update(number, record["reward_mean"], seconds)
        if self.done.iteration % self.schedule.checkpoint_every == 0:
            self._save()
        if self._pictures_due:
            self._pictures()
        if not self.finished:  # then it comes after the last checkpoint
            self._develop(tracker)

    def _sample(self, path: tuple[int, ...]) -> Trajectories:
        """This process's trajectories."""
        number = self.schedule.samples_per_iteration
        return self._together(lambda: self.agent.sample(self.env, number, path))

    def _together(self, act: Callable[[], T]) -> T:
        """What `act` gives; when it fails in one process, all of them raise instead of waiting for it.

        Where they run a network in step, they learn of it by losing the connection as that process ends.
        """
        if self.processes.in_step:
            return act()
        try:
            return self.processes.together(act)
        except BaseException:  # in every process, the agent being that of the last iteration
            with suppress(PeerFailed):  # one that is gone cannot give its part; then the last checkpoint stands
                self._save()
            raise

    def _save(self) -> None:
        """Write a checkpoint; no process goes on, or ends and has the others ended, before it is there."""
        failure: OSError | None = None
        try:
            with span("checkpoint"):
                self.checkpoints.save(self.agent, self.done)
        except OSError as error:
            failure = error
        self.processes.agree(failure)

    def _asked_to_stop(self) -> bool:
        return any(self.processes.gather_json(self.ending.asked))

    def _tracker(self) -> Tracker:
        """Where the main process shows the training."""
        if not self.processes.main:
            return Tracker()
        return open_tracker(self.track, self.out, self.done.reward_queries)

    @property
    def _shown(self) -> bool:
        return self.progress and self.processes.main

    def _line(self) -> ProgressLine:
        asked, planned = self.schedule.total_reward_queries, self.schedule.planned_reward_queries
        if self._shown and planned != asked:
            size = self.schedule.samples_per_iteration
            print(f"total_reward_queries={asked} is rounded up to {planned}, whole iterations of {size}", flush=True)
        return ProgressLine(planned, self.done.reward_queries, shown=self._shown)

    def _estimate(self, seconds: float) -> None:
        """Say what the run will take: by its last iteration or, of a new run, by the first grid of pictures.

        Args:
            seconds: that the grid took.
        """
        size, planned = self.schedule.samples_per_iteration, self.schedule.planned_reward_queries
        ahead = planned - self.done.reward_queries
        if not self._shown or ahead <= 0:
            return
        rows = read_metrics(self._metrics)
        if rows and (rate := rows[-1].get("images_per_second")):
            needed = ahead / rate
        elif self.pictures_env is not None:
            needed = estimated_seconds(ahead, seconds / self.pictures_env.num_envs, self.agent.config)
        else:
            return
        iterations = f"{ahead // size:,} iteration{'' if ahead == size else 's'}"
        tqdm.write(f"{ahead:,} images to score, {iterations}: about {duration(needed)}", file=sys.stderr)

    @property
    def _pictures_due(self) -> bool:
        return bool(self.schedule.pictures_every) and self.done.iteration % self.schedule.pictures_every == 0

    def _pictures(self) -> None:
        """A grid of pictures from noise that is the same at every call; the other processes wait."""
        path = self.out / "images" / f"iteration-{self.done.iteration:06d}.png"
        takes_part = self.processes.main or self.processes.in_step
        there = self.processes.of_main(path.exists()) if self.processes.in_step else path.exists()

        def draw() -> None:
            if takes_part and (env := self.pictures_env) is not None and not there:
                with self.agent.averaged():
                    shown = collect_many(env, self.agent.policy, env.num_envs, (self.seed, GRIDS))
                    if self.processes.main:
                        save_grid(path, shown.images)

        with span("pictures", whole=True):
            self._together(draw)

    def _develop(self, tracker: Tracker) -> None:
        """Evaluate the development set, if that is due and not done; the other processes wait."""
        every = self.schedule.development_interval
        if not every or not self.done.iteration or (self.done.iteration % every and not self.finished):
            return

        stop = self._asked_to_stop if self.processes.in_step else lambda: self.ending.asked

        def evaluate() -> None:
            if self.development is not None:
                with self.agent.averaged():
                    done = self.development.track(self.agent.policy, self.done, tracker, stop)
                if not done:
                    self._say("The development set is not evaluated now; --resume catches up on it.")

        with span("development", whole=True):
            self._together(evaluate)

    def _say(self, text: str) -> None:
        if self.processes.main:
            tqdm.write(text)


def reward_metrics(trajectories: Trajectories, processes: Processes) -> dict[str, float]:
    """Mean and standard deviation of all processes' finite rewards, and the means of their components."""
    rewards = processes.gather(trajectories.rewards).double().cpu()
    usable = torch.isfinite(rewards)
    rewards = rewards[usable]
    metrics = {"reward_mean": float(rewards.mean()), "reward_std": float(rewards.std(correction=0))}
    named = processes.gather_json(list(trajectories.components))
    for name in named[0]:
        if all(name in others for others in named):  # a component that one process lacks would have the others wait
            value = trajectories.components[name].double()
            metrics[f"{name}_mean"] = float(processes.gather(value).cpu()[usable].mean())
    return metrics
