"""What a benchmark trains, in portions: a native agent, one of the user's own, or a library's algorithm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Final

import torch
from gymnasium.vector import VectorEnv, VectorWrapper

from diffusion_gym.agents.adapters import to_numpy
from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.rollout import trained_steps
from diffusion_gym.agents.training.runs import build_agent
from diffusion_gym.agents.training.settings import RunSettings, make_env
from diffusion_gym.agents.training.trainer import Trainer


class Learner(ABC):
    """An agent on an environment.

    Attributes:
        policy: what it trains.
    """

    policy: DenoisingPolicy

    @property
    @abstractmethod
    def reward_queries(self) -> int:
        """Pictures scored in training so far."""

    @abstractmethod
    def train_until(self, reward_queries: int) -> None:
        """Train until so many pictures were scored, a multiple of the samples of an iteration."""

    def go_back(self, reward_queries: int) -> bool:
        """Go to the state of an interrupted training after so many pictures; False where that is not stored.

        Called once, before any training.
        """
        return self.reward_queries == reward_queries

    def weights(self) -> AbstractContextManager[None]:
        """Within this context the policy has the weights to be measured, such as a moving average."""
        return nullcontext()


class NativeLearner(Learner):
    """An agent of `AGENTS`, or `module:Class`; it writes a run folder and goes on from its checkpoints.

    Args:
        settings: of the run.
    """

    def __init__(self, settings: RunSettings) -> None:
        env = make_env(settings, settings.rollout_batch)
        agent = build_agent(settings, env)
        self._trainer = Trainer(env, agent, settings.out, settings.schedule, settings.seed, progress=False)
        self.policy = agent.policy

    @property
    def reward_queries(self) -> int:
        """Pictures scored in training so far."""
        return self._trainer.done.reward_queries

    def train_until(self, reward_queries: int) -> None:
        """Train, and end with a checkpoint.

        Raises:
            KeyboardInterrupt: Ctrl-C ended it before.
        """
        if self._trainer.run(until=reward_queries).reward_queries < reward_queries:
            raise KeyboardInterrupt

    def go_back(self, reward_queries: int) -> bool:
        """Load the checkpoint of that state; those after it are removed, as they will be written again."""
        checkpoints, wanted = self._trainer.checkpoints, reward_queries // self._trainer.schedule.samples_per_iteration
        stored = {int(path.stem.rpartition("-")[2]): path for path in checkpoints.paths()}
        for iteration, path in stored.items():
            if iteration > wanted:
                path.unlink()
        if wanted in stored:
            self._trainer.done = checkpoints.load(self._trainer.agent, stored[wanted])
        return super().go_back(reward_queries)

    def weights(self) -> AbstractContextManager[None]:
        """The moving average of the weights, where the agent keeps one."""
        return self._trainer.agent.averaged()


SEED_STRIDE: Final = 10_000  # the libraries seed env i with seed + i: without it seeds would share their noise


class RewardLog(VectorWrapper):
    """Keeps the reward of every finished picture, below what a library or a wrapper makes of it.

    Args:
        env: a denoising vector environment.

    Attributes:
        rewards: in the order in which the pictures were scored.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env)
        self.rewards: list[float] = []

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """As the environment's."""
        observation, rewards, terminations, truncations, infos = self.env.step(actions)
        self.rewards += to_numpy(rewards)[to_numpy(terminations)].tolist()
        return observation, rewards, terminations, truncations, infos


class LibraryLearner(Learner):
    """What a library's algorithm trains, with the settings of the native agent that it expresses.

    It stores nothing on the way: an interrupted training begins anew.

    Args:
        settings: of the native agent.

    Attributes:
        env: the environment of the training.
        horizon: T.

    Raises:
        ValueError: an option that no library's algorithm has.
    """

    _only: ClassVar[dict[str, Sequence[Any]]] = {
        "optimizer": ["adamw"],
        "learning_rate_schedule": ["constant"],
        "ema_decay": [0],
        "timestep_fraction": [1],
        "normalization": ["prompt", "batch", "none"],
        "group_size": [1],
        "renoise": [False],
        "reward_floors": [()],
    }

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings
        self.options: Any = settings.agent_options
        for name, values in self._only.items():
            if getattr(self.options, name) not in values:
                raise ValueError(
                    f"{name}={getattr(self.options, name)!r} is for native agents; a library's takes "
                    f"{' or '.join(map(repr, values))}: leave it out, or the library's agent"
                )
        torch.manual_seed(settings.seed)
        self.env = RewardLog(make_env(settings, settings.rollout_batch))
        self.horizon: int = self.env.unwrapped.horizon  # type: ignore[attr-defined]

    @property
    def reward_queries(self) -> int:
        """Pictures scored in training so far."""
        return len(self.env.rewards)

    def chosen(self, *names: str) -> dict[str, Any]:
        """Options of the native agent, by name."""
        return {name: getattr(self.options, name) for name in names}

    @property
    def transitions(self) -> int:
        """Transitions behind an update of PPO: the trained steps of `batch_size` trajectories."""
        table = self.env.unwrapped.step_table  # type: ignore[attr-defined]
        return self.options.batch_size * len(trained_steps(table, self.options.trained_steps))
