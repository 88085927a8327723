"""What an agent is, and the options that every agent shares."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Final, cast

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from pydantic import ConfigDict

from diffusion_gym.agents.algorithms.metrics import Metrics
from diffusion_gym.agents.finite import Diverged, all_finite, require, require_finite_options
from diffusion_gym.agents.optimization import (
    AccumulatingOptimizer,
    LearningRateSchedule,
    Losses,
    OptimizerOptions,
    WeightAverage,
)
from diffusion_gym.agents.policy import DenoisingPolicy, Precision, Trainable
from diffusion_gym.agents.processes import Processes
from diffusion_gym.agents.rollout import Trajectories, collect_many
from diffusion_gym.devices import to_device
from diffusion_gym.registry import Registry, imported
from diffusion_gym.schemas import Positive, Schema

_CPU_POSITIONS: Final = 4096  # of latents in one pass: 64 of 8x8, 16 of 16x16; benchmarks/scaling.py


@dataclass(frozen=True)
class AgentConfig:
    """Options that every agent shares; the defaults are those of the DDPO paper, table F.6."""

    trainable: Trainable = "lora"
    """What trains: low-rank adapters on the attention layers, or all weights of the UNet."""
    lora_rank: int = 4
    """Rank of the adapters."""
    init_from: str | None = None
    """Exported adapters, ours or those of diffusers or peft, to begin from; with `trainable=full` a pipeline too. The
    KL reference stays the pretrained model."""
    learning_rate: float = 1e-5
    """Learning rate of AdamW; its peak where a schedule moves it."""
    learning_rate_schedule: LearningRateSchedule = "constant"
    """Constant, or a linear warm-up followed by half a cosine (thesis, figure 5.7)."""
    warmup_fraction: float = 0.25
    """Part of the training that warms up, with `warmup_cosine`."""
    first_learning_rate: float = 0.0
    """Where the warm-up begins."""
    last_learning_rate: float = 0.0
    """Where the cosine ends."""
    adam_beta1: float = 0.9
    """First-moment decay of AdamW."""
    adam_beta2: float = 0.999
    """Second-moment decay of AdamW."""
    adam_epsilon: float = 1e-8
    """Epsilon of AdamW."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Largest gradient norm; a longer gradient is scaled down to it."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights that evaluation and export use; 0 uses the weights themselves."""
    micro_batch_size: int = 0
    """Transitions in one forward and backward pass; changes speed and memory, not the result. 0 finds the largest
    that fits."""
    trained_steps: tuple[float, float] = (0.0, 1.0)
    """Part of the trajectory whose steps are trained on, as fractions of T, 0 being the noise and 1 the picture."""
    timestep_fraction: float = 1.0
    """Share of those steps that an update uses, drawn anew for each trajectory."""
    cfg_training: bool = True
    """Train both branches of the guided prediction; off trains the conditional one alone (DDPO, appendix G.1)."""
    mixed_precision: Precision = "no"
    """Compute the UNet in bf16 or fp16; latents, step maths and weights stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    def __post_init__(self) -> None:
        require_finite_options(self)
        require(self, "larger than 0", "lora_rank", "learning_rate", "max_grad_norm", "adam_epsilon")
        require(self, "at least 0", "first_learning_rate", "last_learning_rate", "weight_decay")
        require(self, "at least 0 and less than 1", "adam_beta1", "adam_beta2", "ema_decay")
        if self.micro_batch_size < 0:
            raise ValueError(f"micro_batch_size={self.micro_batch_size!r} must be 0 (automatic) or larger")
        if not 0 < self.warmup_fraction < 1:
            raise ValueError(f"warmup_fraction={self.warmup_fraction!r} must lie between 0 and 1")
        if not 0 < self.timestep_fraction <= 1:
            raise ValueError(f"timestep_fraction={self.timestep_fraction!r} must be larger than 0 and at most 1")
        first, last = self.trained_steps
        if not 0 <= first < last <= 1:
            raise ValueError(f"trained_steps={self.trained_steps!r} must be two fractions of T, 0 <= first < last <= 1")
        for name, choices in (
            ("learning_rate_schedule", ("constant", "warmup_cosine")),
            ("mixed_precision", ("no", "bf16", "fp16")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(choices)}")

    def optimizer_options(self, **changed: Any) -> OptimizerOptions:
        """The optimiser's part of the options, for one that differs in `changed`."""
        options: dict[str, Any] = {
            "learning_rate": self.learning_rate,
            "schedule": self.learning_rate_schedule,
            "warmup_fraction": self.warmup_fraction,
            "first_learning_rate": self.first_learning_rate,
            "last_learning_rate": self.last_learning_rate,
            "betas": (self.adam_beta1, self.adam_beta2),
            "epsilon": self.adam_epsilon,
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
            "micro_batch_size": self.micro_batch_size,
            "loss_scaling": self.mixed_precision == "fp16",  # float16 gradients would underflow
        }
        return OptimizerOptions(**{**options, **changed})


class NoUsableReward(RuntimeError):
    """Every reward of an iteration was NaN or infinite: there is nothing to learn from."""


class OptimizerState(Schema):
    """What `AccumulatingOptimizer.state` gives."""

    micro_batch_size: Positive
    loss_scale: dict[str, float | int]


class AgentState(Schema):
    """What `Agent.state` gives; agents of others may add to it without a schema of their own."""

    model_config = ConfigDict(extra="allow")
    optimizer: OptimizerState


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

    Raises:
        ValueError: the sampler has no stochastic step among those to train on, so that there is no policy gradient;
            `init_from` does not fit the policy.
    """

    Config: ClassVar[type[AgentConfig]] = AgentConfig
    State: ClassVar[type[AgentState]] = AgentState
    needs_stochastic_steps: ClassVar[bool] = True

    def __init__(self, policy: DenoisingPolicy, config: AgentConfig, processes: Processes | None = None) -> None:
        if self.needs_stochastic_steps:
            policy.require_noise()
        self.policy, self.config = policy, config
        if config.init_from is not None:
            policy.begin_from(config.init_from)
        self.processes = processes or Processes()
        policy.set_training(
            cfg_training=config.cfg_training,
            mixed_precision=config.mixed_precision,
            gradient_checkpointing=config.gradient_checkpointing,
        )
        self.steps = self._trained_steps()
        options = config.optimizer_options()
        if policy.model.dtype == torch.float16:
            options = config.optimizer_options(loss_scaling=True)
        self.optimizer = AccumulatingOptimizer(
            policy.trainable_parameters(), options, self.processes, **_micro_batch_limit(policy)
        )
        self.processes.copy_main_(self.parameters)
        self.average = WeightAverage(self.parameters, config.ema_decay)

    def _trained_steps(self) -> torch.Tensor:
        total = len(self.policy.table)
        # The score function of a deterministic step does not exist.
        steps = self.policy.stochastic_steps if self.needs_stochastic_steps else torch.arange(total)
        first, last = self.config.trained_steps
        chosen = steps[(steps >= first * total) & (steps < last * total)]
        if len(chosen) == 0:
            kind = "stochastic step" if self.needs_stochastic_steps else "step"
            raise ValueError(f"trained_steps={self.config.trained_steps!r} leaves no {kind} of T={total}; widen it")
        return chosen

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

    def sample(self, env: VectorEnv[Any, Any, Any], number: int, seed_path: tuple[int, ...]) -> Trajectories:
        """This process's share of an iteration's `number` trajectories, sampled with the current policy.

        Args:
            env: a denoising vector environment.
            number: trajectories of all processes together.
            seed_path: where the randomness comes from; see `collect_many`.
        """
        return collect_many(env, self.policy, number, seed_path, processes=self.processes)

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
        if not np.isfinite(rewards).any():
            raise NoUsableReward(f"all {len(rewards)} rewards of the iteration are NaN or infinite; check the reward")
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
        first = self.processes.index * number
        own = items[(items[:, 0] >= first) & (items[:, 0] < first + number)].clone()
        own[:, 0] -= first
        return to_device(own, self.policy.device)

    def own(self, values: np.ndarray, trajectories: Trajectories) -> torch.Tensor:
        """The part of `values`, one a sample of all processes, for this process's trajectories: float32, on the device.

        Args:
            values: advantages, weights or the like, `(N,)`.
            trajectories: this process's.
        """
        first = self.processes.index * len(trajectories)
        part = values[first : first + len(trajectories)]
        return to_device(part, self.policy.device, torch.float32)

    def minimize(
        self, items: torch.Tensor, losses: Callable[[torch.Tensor], Losses], count: int
    ) -> dict[str, torch.Tensor]:
        """One gradient step on the policy; arguments and result as `AccumulatingOptimizer.step`."""
        metrics = self.optimizer.step(items, losses, count)
        self.average.update()
        return metrics

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
        if math.isfinite(norm) and all_finite(self.learned()):
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
        names = list(self.policy.trainable_parameters())
        stored = dict(zip(_prefixed("policy", names), (value.detach() for value in self.parameters), strict=True))
        stored |= {f"optimizer.{name}": value for name, value in self.optimizer.tensors().items()}
        if self.config.ema_decay:
            stored |= dict(zip(_prefixed("average", names), self.average.average, strict=True))
        return stored

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what `tensors` gave.

        Raises:
            ValueError: the tensors are of another policy.
        """
        parameters = self.policy.trainable_parameters()
        stored = part_of(tensors, "policy")
        if {k: v.shape for k, v in stored.items()} != {k: v.shape for k, v in parameters.items()}:
            raise ValueError(
                "the checkpoint holds the weights of another policy; check the model, trainable and lora_rank"
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(stored[name])
            if self.config.ema_decay:
                averages = part_of(tensors, "average")
                if not averages:
                    raise ValueError(f"the checkpoint holds no moving average, but ema_decay={self.config.ema_decay}")
                for name, average in zip(parameters, self.average.average, strict=True):
                    average.copy_(averages[name])
        self.optimizer.load_tensors(part_of(tensors, "optimizer"))

    def state(self) -> dict[str, Any]:
        """Everything else that a checkpoint stores, as JSON values."""
        return {"optimizer": self.optimizer.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        self.optimizer.load_state(state["optimizer"])


def _micro_batch_limit(policy: DenoisingPolicy) -> dict[str, int]:
    """On a CPU larger passes are hardly faster and take more memory; a GPU takes what fits."""
    _, height, width = policy.model.latent_shape
    return {"largest_micro_batch": max(1, _CPU_POSITIONS // (height * width))} if policy.device.type == "cpu" else {}


def part_of(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with `prefix.`, without it."""
    return {key.removeprefix(f"{prefix}."): v for key, v in tensors.items() if key.startswith(f"{prefix}.")}


def _prefixed(prefix: str, names: list[str]) -> list[str]:
    return [f"{prefix}.{name}" for name in names]


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
    found = imported("agent", name, form, _is_agent)
    if not _is_agent(found):
        raise ValueError(f"agent={name!r} is no subclass of diffusion_gym.agents.algorithms.Agent")
    if lacking := sorted(getattr(found, "__abstractmethods__", ())):
        raise ValueError(f"agent={name!r} lacks the abstract {', '.join(lacking)}; define it in the class")
    return cast(type[Agent], found)


def _is_agent(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Agent)
