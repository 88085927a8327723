"""What an agent is, and the options that every agent shares."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from pydantic import ConfigDict

from diffusion_gym.agents.advantages import NoUsableReward, usable_rewards
from diffusion_gym.agents.algorithms.metrics import Metrics
from diffusion_gym.agents.averaging import WeightAverage
from diffusion_gym.agents.finite import Diverged, all_finite, require
from diffusion_gym.agents.optimization import AccumulatingOptimizer, Losses
from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.processes import Processes
from diffusion_gym.agents.reward_floors import FloorsState, RewardFloorOptions, RewardFloors
from diffusion_gym.agents.rollout import Trajectories, collect_many, trained_steps
from diffusion_gym.agents.sharding import ShardingOptions, shard
from diffusion_gym.devices import local_part, to_device
from diffusion_gym.registry import Registry, imported
from diffusion_gym.schemas import Positive, Schema
from diffusion_gym.storage import joined, part_of, restore_parameters
from diffusion_gym.wrappers.one_step import OneStepVectorEnv

if TYPE_CHECKING:
    from diffusion_gym.models.solvers import Solver

_CPU_POSITIONS: Final = 4096  # of latents in one pass: 64 of 8x8, 16 of 16x16; benchmarks/scaling.py


@dataclass(frozen=True)
class AgentConfig(ShardingOptions, RewardFloorOptions):
    """Options that every agent shares; the defaults are those of the DDPO paper, table F.6."""

    init_from: str | None = None
    """Exported adapters, ours or those of diffusers or peft, to begin from; with `trainable=full` a pipeline too. The
    KL reference stays the pretrained model."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights that evaluation and export use; 0 uses the weights themselves."""
    trained_steps: tuple[float, float] = (0.0, 1.0)
    """Part of the trajectory whose steps are trained on, as fractions of T, 0 being the noise and 1 the picture."""
    timestep_fraction: float = 1.0
    """Share of those steps that an update uses, drawn anew for each trajectory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "at least 0 and less than 1", "ema_decay")
        if not 0 < self.timestep_fraction <= 1:
            raise ValueError(f"timestep_fraction={self.timestep_fraction!r} must be larger than 0 and at most 1")
        first, last = self.trained_steps
        if not 0 <= first < last <= 1:
            raise ValueError(f"trained_steps={self.trained_steps!r} must be two fractions of T, 0 <= first < last <= 1")


class OptimizerState(Schema):
    """What `AccumulatingOptimizer.state` gives."""

    micro_batch_size: Positive
    loss_scale: dict[str, float | int]


class AgentState(Schema):
    """What `Agent.state` gives; agents of others may add to it without a schema of their own."""

    model_config = ConfigDict(extra="allow")
    optimizer: OptimizerState
    floors: FloorsState | None = None  # where `reward_floors` are given


class Agent(ABC):
    """Learns from trajectories by changing its policy.

    Args:
        policy: the policy to train.
        config: the agent's options, an instance of its `Config`.
        processes: the processes that train together; by default this one alone.

    Attributes:
        Config: the class of its options.
        State: the schema of what `state` gives, by which a checkpoint is read.
        needs_stochastic_steps: whether the agent uses log-probabilities, which a deterministic step does not have.
        optimizer: takes the gradient steps; see `AccumulatingOptimizer.step`.
        steps: the steps of a trajectory that are trained on, int64.
        finished_only: whether finished latents are all that it learns from.
        group_size: samples in a row that share a prompt.
        shared_noise: whether they begin from the same x_T.
        solver: makes the pictures in place of the environment's sampler.

    Raises:
        ValueError: the sampler has no stochastic step among those to train on, so that there is no policy gradient;
            `init_from` does not fit the policy.
    """

    Config: ClassVar[type[AgentConfig]] = AgentConfig
    State: ClassVar[type[AgentState]] = AgentState
    needs_stochastic_steps: ClassVar[bool] = True
    finished_only: bool = False
    group_size: int = 1
    shared_noise: bool = False
    solver: Solver | None = None

    def __init__(self, policy: DenoisingPolicy, config: AgentConfig, processes: Processes | None = None) -> None:
        if self.needs_stochastic_steps:
            policy.require_noise()
        self.policy, self.config = policy, config
        if config.init_from is not None:
            policy.begin_from(config.init_from)
        self.processes = processes or Processes()
        policy.set_training(**config.computation)
        deterministic = not self.needs_stochastic_steps
        self.steps = trained_steps(policy.table, config.trained_steps, deterministic=deterministic)
        self.processes.copy_main_(list(policy.trainable_parameters().values()))
        if config.sharding != "none" and self.processes.count > 1:
            shard(policy, self.processes)
            self.processes = replace(self.processes, in_step=True)
        elif (place := next(policy.model.unet.parameters()).device) != policy.device:
            raise ValueError(
                f"network_device={str(place)!r} is for a network that is spread over processes from there; leave it "
                "out, or give sharding='fsdp2' and several processes"
            )
        self.optimizer = self.make_optimizer(policy.trainable_parameters())
        self.average = WeightAverage(self.parameters, config.ema_decay)
        self.floors = RewardFloors(config, self.processes)

    def make_optimizer(
        self, parameters: Mapping[str, torch.nn.Parameter], adam: torch.optim.Optimizer | None = None
    ) -> AccumulatingOptimizer:
        """The optimiser of weights that train; arguments as `AccumulatingOptimizer`'s."""
        float16 = self.config.mixed_precision == "fp16" or self.policy.model.dtype == torch.float16
        return AccumulatingOptimizer(
            parameters,
            self.config,
            self.processes,
            **_micro_batch_limit(self.policy),
            loss_scaling=float16,  # its gradients would underflow
            adam=adam,
        )

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The weights that train."""
        return self.optimizer.parameters

    @property
    def fraction_done(self) -> float:
        """How much of the training is over, 0 to 1; the trainer says so before each iteration."""
        return self.optimizer.fraction_done

    @fraction_done.setter
    def fraction_done(self, fraction: float) -> None:
        self.optimizer.fraction_done = fraction

    def check_env(self, env: VectorEnv[Any, Any, Any]) -> None:  # noqa: B027 - most agents have nothing to refuse
        """Refuse an environment that the agent cannot learn in; the trainer asks before anything is written.

        Args:
            env: a denoising vector environment.

        Raises:
            ValueError: what the agent lacks there.
        """

    def sample(self, env: VectorEnv[Any, Any, Any], number: int, seed_path: tuple[int, ...]) -> Trajectories:
        """This process's share of an iteration's `number` trajectories, sampled with the current policy.

        With a solver, or where nothing else is learned from, they are finished latents only, in the one-step view.

        Args:
            env: a denoising vector environment.
            number: trajectories of all processes together.
            seed_path: where the randomness comes from; see `collect_many`.
        """
        return collect_many(
            OneStepVectorEnv(env) if self.finished_only or self.solver is not None else env,
            self.policy,
            number,
            seed_path,
            group_size=self.group_size,
            shared_noise=self.shared_noise,
            solver=self.solver,
            processes=self.processes,
        )

    def noise_window(self, seed_path: tuple[int, ...]) -> AbstractContextManager[None]:
        """Within this context an iteration is sampled and learned from, with its steps noisy where that is an option.

        Args:
            seed_path: of the iteration, whose number comes last.
        """
        return nullcontext()

    def learn(self, trajectories: Trajectories, rng: np.random.Generator) -> Metrics:
        """`update`, with `reward_floors` held; the trainer calls it.

        Raises:
            ValueError: the reward lacks a component that has a floor.
        """
        if not self.floors:
            return self.update(trajectories, rng)
        means = self.floors.measure(trajectories)
        updated = self.update(self.floors.constrained(trajectories), rng)
        return {**updated, **self.floors.advance(means)}

    @abstractmethod
    def update(self, trajectories: Trajectories, rng: np.random.Generator) -> Metrics:
        """Learn from one iteration's trajectories.

        Args:
            trajectories: sampled with the current policy, this process's share.
            rng: the only source of randomness, the same in every process, so that a resumed run equals the
                uninterrupted one and several processes equal one.

        Returns:
            Numbers for the metrics file.

        Raises:
            NoUsableReward: no reward is finite.
        """

    def rewards(self, trajectories: Trajectories) -> tuple[tuple[str, ...], np.ndarray]:
        """Prompts and rewards `(N,)` of all processes' trajectories, float64; the rewards that failed are not finite.

        Raises:
            NoUsableReward: no reward is finite.
        """
        prompts = [prompt for part in self.processes.gather_json(trajectories.prompts) for prompt in part]
        rewards = self.processes.gather(trajectories.rewards).double().cpu().numpy()
        usable_rewards(rewards)
        return tuple(prompts), rewards

    def transitions(self, samples: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        """Pairs (sample, step) to train on, int64 `(M, 2)`, in random order.

        Args:
            samples: indices of trajectories, counted over all processes.
            rng: draws the steps, where `timestep_fraction` leaves some out, and the order.
        """
        count = max(1, round(self.config.timestep_fraction * len(self.steps)))
        columns = np.tile(np.arange(len(self.steps)), (len(samples), 1))
        if count < len(self.steps):
            columns = rng.permuted(columns, axis=1)[:, :count]
        pairs = np.stack([np.repeat(samples, count), self.steps.numpy()[columns].ravel()], axis=1)
        return torch.from_numpy(pairs[rng.permutation(len(pairs))])

    def local(self, items: torch.Tensor, number: int) -> torch.Tensor:
        """Those rows of `items` whose first entry is a sample of this process, counted from its own first one.

        Args:
            items: int64 `(M, 2)`, the first column counting samples over all processes.
            number: samples of one process.
        """
        return to_device(self.local_on_host(items, number), self.policy.device)

    def local_on_host(self, items: torch.Tensor, number: int) -> torch.Tensor:
        """`local` where the items are, for losses that look at which samples they are."""
        first = self.processes.index * number
        mine = (items[:, 0] >= first) & (items[:, 0] < first + number)
        rows = items.clone()
        rows[:, 0] -= first
        return self.processes.own(rows, mine)

    def local_values(self, values: np.ndarray, trajectories: Trajectories) -> torch.Tensor:
        """The part of `values`, one a sample of all processes, for this process's trajectories: float32, on the device.

        Args:
            values: advantages, weights or the like, `(N,)`, or `(T, N)` where each step has one.
            trajectories: this process's.
        """
        first = self.processes.index * len(trajectories)
        part = self.processes.usable(values[..., first : first + len(trajectories)])
        return to_device(part, self.policy.device, torch.float32)

    def minimize(
        self, items: torch.Tensor, losses: Callable[[torch.Tensor], Losses], count: int
    ) -> dict[str, torch.Tensor]:
        """One gradient step on the policy; arguments and result as `AccumulatingOptimizer.step`."""
        metrics = self.optimizer.step(items, losses, count, unless=self.finished)
        self.average.update()
        return metrics

    def finished(self, means: Losses) -> bool:
        """Whether an update with these means is not taken, and ends the iteration before its other minibatches."""
        return False

    def learned(self) -> list[torch.Tensor]:
        """All that an update changes by gradients: weights, their average, the optimiser's moments."""
        return [*self.parameters, *self.average.average, *self.optimizer.tensors().values()]

    def check_finite(self, iteration: int, updated: Mapping[str, float] | None = None) -> None:
        """Refuse what an update has spoilt; on a GPU it is waited for once.

        Args:
            iteration: that of the update.
            updated: what the update returned; its gradient norm is in the message.

        Raises:
            Diverged: something that was learned is NaN or infinite.
        """
        norm = (updated or {}).get("grad_norm", 0.0)
        finite = all_finite([local_part(value) for value in self.learned()])
        if self.processes.in_step:  # each sees its part
            finite = all(self.processes.gather_json(finite))
        if math.isfinite(norm) and finite:
            return
        raise Diverged(
            f"the update of iteration {iteration} left weights or moments that are not finite (grad_norm {norm:.3g}); "
            "no checkpoint holds them. Begin a new run with a smaller learning_rate or max_grad_norm, or without "
            "mixed_precision; the last checkpoint is of an iteration before"
        )

    def averaged(self) -> AbstractContextManager[None]:
        """Within this context the policy acts with the moving average of its weights, where the options ask for it."""
        return self.average.applied()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything of the agent that a checkpoint stores as tensors."""
        names = self.policy.trainable_parameters().keys()
        stored = {"policy": {name: value.detach() for name, value in zip(names, self.parameters, strict=True)}}
        stored["optimizer"] = self.optimizer.tensors()
        if self.config.ema_decay:
            stored["average"] = self.average.named(names)
        return joined(stored)

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what `tensors` gave.

        Raises:
            ValueError: the tensors are of another policy.
        """
        restore_parameters(self.policy.trainable_parameters(), part_of(tensors, "policy"), "the checkpoint")
        if self.config.ema_decay:
            averages = part_of(tensors, "average")
            if not averages:
                raise ValueError(f"the checkpoint holds no moving average, but ema_decay={self.config.ema_decay}")
            self.average.load(averages, self.policy.trainable_parameters())
        self.optimizer.load_tensors(part_of(tensors, "optimizer"))

    def state(self) -> dict[str, Any]:
        """Everything else that a checkpoint stores, as JSON values."""
        return {"optimizer": self.optimizer.state(), **({"floors": self.floors.state()} if self.floors else {})}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        self.optimizer.load_state(state["optimizer"])
        if self.floors:
            self.floors.load(state["floors"])


def _micro_batch_limit(policy: DenoisingPolicy) -> dict[str, int]:
    """On a CPU larger passes are hardly faster and take more memory; a GPU takes what fits."""
    _, height, width = policy.model.latent_shape
    return {"largest_micro_batch": max(1, _CPU_POSITIONS // (height * width))} if policy.device.type == "cpu" else {}


AGENTS: Registry[type[Agent]] = Registry("agent")


def agent_class(name: str) -> type[Agent]:
    """The agent called `name`: a registered one, or `module:Class` of a module that Python can import.

    The current directory counts, as for `python -m`.

    Raises:
        ValueError: there is no such agent, or it is no agent, or one that lacks methods.
    """
    if ":" not in name:
        return AGENTS[name]
    form = "module:Class, such as custom_agent:RLOO for that class of a .py file"
    kind = imported("agent", name, form, _is_agent)
    if not _is_agent(kind):
        raise ValueError(f"agent={name!r} is no subclass of diffusion_gym.agents.algorithms.Agent")
    if lacking := sorted(getattr(kind, "__abstractmethods__", ())):
        raise ValueError(f"agent={name!r} lacks the abstract {', '.join(lacking)}; define it in the class")
    return cast(type[Agent], kind)


def _is_agent(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Agent)


__all__ = ["AGENTS", "Agent", "AgentConfig", "NoUsableReward", "agent_class", "part_of"]
