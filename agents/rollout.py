"""Rollouts: N trajectories of T steps, sampled with the policy and stored once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv

from diffusion_gym.agents.distribution import DenoisingDistribution
from diffusion_gym.agents.embeddings import TextEmbeddings
from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.processes import Processes
from diffusion_gym.agents.streams import stream
from diffusion_gym.devices import require_memory
from diffusion_gym.envs.vector import DenoisingVectorEnv
from diffusion_gym.prompts import PromptSet
from diffusion_gym.rewards import RewardOutput
from diffusion_gym.rewards.awaiting import awaiting
from diffusion_gym.rewards.base import reward_name
from diffusion_gym.scheduling import StepTable
from diffusion_gym.timing import span
from diffusion_gym.wrappers.one_step import OneStepVectorEnv

if TYPE_CHECKING:
    from diffusion_gym.models.solvers import Solver

_IN_FLIGHT: Final = 4  # batches whose rewards may be awaited while the next one is sampled; bounds their memory


@dataclass(frozen=True)
class Trajectories:
    """N denoising trajectories; states and actions are two views of the same latents.

    Attributes:
        prompts: the N prompts.
        tokens: their token ids, int64 `(N, L)`; None for an unconditional model.
        timesteps: the scheduler's t of each step, int64 `(T,)`; empty in the one-step view, which keeps x_0 alone.
        latents: x_T to x_0, float32 `(T + 1, N, C, H, W)`: step k goes from `latents[k]` to `latents[k + 1]`.
        log_probs: of the actions under the policy that sampled them, float32 `(T, N)`.
        rewards: r(x_0, c), and whatever wrappers add on the way there, float32 `(N,)`; NaN or infinite where the
            reward failed.
        components: the reward's components, each `(N,)`.
        images: the finished pictures, uint8 `(N, H, W, 3)`, on the host: 10,000 of RWR at 512 x 512 take 8 GB.
        embeddings: text embeddings of the prompts, equal ones stored once; None where they are not at hand.
    """

    prompts: tuple[str, ...]
    tokens: torch.Tensor | None
    timesteps: torch.Tensor
    latents: torch.Tensor
    log_probs: torch.Tensor
    rewards: torch.Tensor
    components: dict[str, torch.Tensor]
    images: torch.Tensor
    embeddings: TextEmbeddings | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def finished(self) -> torch.Tensor:
        """x_0, float32 `(N, C, H, W)`."""
        return self.latents[-1]

    def states(self, samples: torch.Tensor, steps: torch.Tensor) -> dict[str, torch.Tensor]:
        """Observations of the pairs (samples[i], steps[i]), both int64 `(M,)`."""
        return {
            **self.conditions(samples),
            "timestep": self.timesteps[steps][:, None],
            "step": steps,
            "latents": self.latents[steps, samples],
        }

    def conditions(self, samples: torch.Tensor) -> dict[str, torch.Tensor]:
        """The prompts' part of these samples' observations: tokens, and embeddings where they are at hand."""
        found = {} if self.tokens is None else {"prompt": self.tokens[samples]}
        return found if self.embeddings is None else {**found, "embedding": self.embeddings[samples]}

    def actions(self, samples: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Actions x_{t-1} of the same pairs, `(M, C, H, W)`."""
        return self.latents[steps + 1, samples]

    def rewarded(self, output: RewardOutput) -> Trajectories:
        """The same with the scores of x_0, which came after all else."""
        components = {name: value.to(self.rewards.device) for name, value in output.info.items()}
        return replace(self, rewards=self.rewards + output.scores.to(self.rewards.device), components=components)

    @staticmethod
    def join(parts: list[Trajectories], stored: Mapping[str, torch.Tensor] | None = None) -> Trajectories:
        """Several batches as one.

        Args:
            parts: the batches.
            stored: `latents` and `log_probs` of all, if those of the parts are views of them.
        """
        if len(parts) == 1:
            return parts[0]
        joined: dict[str, Any] = {"timesteps": parts[0].timesteps, **(stored or {})}
        for field in fields(Trajectories):
            if field.name in joined:
                continue
            values = [getattr(part, field.name) for part in parts]
            if field.name == "prompts":
                joined["prompts"] = tuple(chain.from_iterable(values))
            elif field.name == "components":
                joined["components"] = _joined_components(parts)
            elif any(value is None for value in values):
                joined[field.name] = None
            elif field.name == "embeddings":
                joined["embeddings"] = TextEmbeddings.join(values)
            else:
                axis = 1 if field.name in ("latents", "log_probs") else 0
                joined[field.name] = torch.cat(values, axis)
        return Trajectories(**joined)


def trained_steps(table: StepTable, part: Sequence[float], *, deterministic: bool = False) -> torch.Tensor:
    """The steps in a part of the trajectory, int64: those with sigma > 0, which alone have a score function.

    Args:
        table: of the sampler, T steps.
        part: first and last, as fractions of T; 0 is the noise.
        deterministic: those with sigma 0 too.

    Raises:
        ValueError: `part` is no interval of [0, 1], or holds no such step.
    """
    total = len(table)
    steps = torch.arange(total) if deterministic else (table.sigma > 0).nonzero().flatten().cpu()
    first, last = part
    chosen = steps[(steps >= first * total) & (steps < last * total)]
    if not 0 <= first < last <= 1 or len(chosen) == 0:
        kind = "step" if deterministic else "stochastic step"
        raise ValueError(
            f"trained_steps={tuple(part)} must be two fractions of T={total}, 0 <= first < last <= 1, with a {kind} "
            f"between them{'' if deterministic else '; eta and noisy_steps say which those are'}"
        )
    return chosen


def _joined_components(parts: list[Trajectories]) -> dict[str, torch.Tensor]:
    """NaN where a batch lacks a component, as one does whose pictures are all not finite."""
    names = dict.fromkeys(name for part in parts for name in part.components)
    missing = [torch.full_like(part.rewards, torch.nan) for part in parts]
    return {
        name: torch.cat([part.components.get(name, nan) for part, nan in zip(parts, missing, strict=True)])
        for name in names
    }


@torch.no_grad()
def denoise(
    policy: DenoisingPolicy,
    latents: torch.Tensor,
    tokens: torch.Tensor | None,
    generator: torch.Generator | None = None,
    act: Callable[[Mapping[str, Any], int], DenoisingDistribution] | None = None,
) -> torch.Tensor:
    """Finished x_0 `(N, C, H, W)` from noise, without an environment.

    Args:
        policy: the policy that acts.
        latents: x_T, float32 `(N, C, H, W)`.
        tokens: token ids `(N, L)`; None for an unconditional model.
        generator: noise of the actions, on the policy's device.
        act: the Gaussian of states at a step; the policy's by default.
    """
    for step in range(len(policy.table)):
        state = policy.observation(latents, step, tokens)
        distribution = act(state, step) if act else policy.distribution(state)
        latents = distribution.sample(generator)
    return latents


@torch.no_grad()
def collect(
    env: VectorEnv[Any, Any, Any],
    policy: DenoisingPolicy,
    generator: torch.Generator,
    *,
    seed: int | list[int] | None = None,
    options: dict[str, Any] | None = None,
    reference: bool = False,
    into: Mapping[str, torch.Tensor] | None = None,
    solver: Solver | None = None,
) -> Trajectories:
    """One episode of every sub-environment.

    Args:
        env: a denoising vector environment in any autoreset mode, or its one-step view (`OneStepVectorEnv`), for
            which x_0 alone is kept.
        policy: the policy that acts.
        generator: noise of the actions, on the policy's device.
        seed: passed to `env.reset`.
        options: passed to `env.reset`.
        reference: act with the pretrained model instead of the policy.
        into: tensors to write `latents` and `log_probs` into, of their shapes in `Trajectories`; new ones by default.
        solver: of the one-step view: what makes x_0 in place of the policy's sampler.
    """
    choose = policy.reference_distribution if reference else policy.distribution
    observation, infos = env.reset(seed=seed, options=options)  # type: ignore[arg-type]  # Gymnasium's has no lists
    prompts, tokens = tuple(infos["prompt"]), observation.get("prompt")
    tokens = None if tokens is None else torch.as_tensor(tokens, device=policy.device)
    with span("text encoder"):
        embeddings = policy.text_embeddings(prompts)
        given = {} if embeddings is None else {"embedding": embeddings.all()}

    def act(state: Mapping[str, Any], step: int) -> DenoisingDistribution:
        with span("rollout UNet"):
            return choose({**state, **given, "step": torch.full((len(prompts),), step, device=policy.device)})

    latents, log_probs = (into or _storage(env, policy, len(prompts))).values()
    timesteps = policy.table.timesteps[: len(log_probs)]
    if isinstance(env, OneStepVectorEnv):
        x = torch.as_tensor(infos["latents"], device=policy.device)
        output = partial(_output, policy, given.get("embedding"), reference)
        x = denoise(policy, x, tokens, generator, act) if solver is None else solver.solve(output, x, generator)
        latents[0] = x
        _, rewards, _, _, infos = env.step(x)
        returns = torch.as_tensor(rewards, dtype=torch.float32, device=policy.device)
    else:
        returns, infos = _episode(env, act, observation, latents, log_probs, generator)
    final = infos.get("final_info", infos)
    components = {name: part for name, part in final["reward_components"].items() if not name.startswith("_")}
    return Trajectories(
        prompts=prompts,
        tokens=tokens,
        timesteps=timesteps,
        latents=latents,
        log_probs=log_probs,
        rewards=returns,
        components={key: torch.as_tensor(value, device=policy.device) for key, value in components.items()},
        images=torch.as_tensor(final["image"]).cpu(),
        embeddings=embeddings,
    )


def _output(
    policy: DenoisingPolicy, embeddings: torch.Tensor | None, reference: bool, x: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    with span("rollout UNet"):
        return policy.output_at(x, t, embeddings, reference=reference)


def _episode(
    env: VectorEnv[Any, Any, Any],
    act: Callable[[Mapping[str, Any], int], DenoisingDistribution],
    observation: Mapping[str, Any],
    latents: torch.Tensor,
    log_probs: torch.Tensor,
    generator: torch.Generator,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """T steps of every sub-environment, written into `latents` and `log_probs`; returns `(N,)` and the last infos."""
    latents[0] = torch.as_tensor(observation["latents"], device=latents.device)
    returns, infos = torch.zeros_like(log_probs[0]), dict[str, Any]()
    for step in range(len(log_probs)):
        distribution = act(observation, step)
        latents[step + 1] = distribution.sample(generator)
        # Scored on the stored value, which makes the ratio of a fresh rollout 1.
        log_probs[step] = distribution.log_prob(latents[step + 1])
        observation, rewards, _, _, infos = env.step(latents[step + 1])
        returns += torch.as_tensor(rewards, dtype=torch.float32, device=latents.device)
    return returns, infos


def collect_many(
    env: VectorEnv[Any, Any, Any],
    policy: DenoisingPolicy,
    number: int,
    seed_path: tuple[int, ...],
    *,
    reference: bool = False,
    group_size: int = 1,
    shared_noise: bool = False,
    solver: Solver | None = None,
    processes: Processes | None = None,
) -> Trajectories:
    """`number` trajectories, a multiple of `env.num_envs`, in batches of that size.

    The randomness depends on `seed_path`, such as (seed, iteration), and on nothing that happened before: that is
    what lets a resumed run equal the uninterrupted one. It does not depend on the number of processes either.

    A reward that says `background = True` is computed while the next batches are sampled, unless wrappers want it at
    once; the result is the same, bit for bit.

    Args:
        env: a denoising vector environment, or its one-step view.
        policy: the policy that acts.
        number: trajectories, of all processes together.
        seed_path: where the randomness comes from.
        reference: act with the pretrained model instead of the policy.
        group_size: each prompt is drawn for this many trajectories in a row (GRPO's groups).
        shared_noise: the trajectories of a group begin from the same x_T (DanceGRPO).
        solver: of the one-step view: what makes x_0 in place of the policy's sampler.
        processes: the processes that share the work; the result is this one's part.

    Raises:
        ValueError: `number`, the groups or the processes do not fit the batches; or the latents do not fit in memory.
        RewardError: the reward failed.
    """
    shared = processes or Processes()
    _check_number(env, policy, number, group_size, shared)
    parts: list[Trajectories] = []
    batches = list(_batches(env, number, seed_path, group_size, shared_noise, shared))
    # One tensor for all batches: joining them later would hold every latent twice.
    stored = _storage(env, policy, len(batches) * env.num_envs) if len(batches) > 1 else {}
    places = range(0, len(batches) * env.num_envs, env.num_envs)
    with _rewards_of(env) as scores:
        for place, (noise_seed, reset) in zip(places, batches, strict=True):
            generator = torch.Generator(policy.device).manual_seed(noise_seed)
            into = {name: tensor[:, place : place + env.num_envs] for name, tensor in stored.items()}
            parts.append(collect(env, policy, generator, reference=reference, into=into, solver=solver, **reset))
            if len(scores) > _IN_FLIGHT:
                with _waiting(env):
                    scores[-1 - _IN_FLIGHT].result()
        if scores:
            with _waiting(env):
                outputs = [score.result() for score in scores]
            parts = [part.rewarded(output) for part, output in zip(parts, outputs, strict=True)]
    return Trajectories.join(parts, stored)


def _check_number(
    env: VectorEnv[Any, Any, Any], policy: DenoisingPolicy, number: int, group_size: int, processes: Processes
) -> None:
    if number % env.num_envs:
        raise ValueError(f"number={number} must be a multiple of num_envs={env.num_envs}")
    if env.num_envs % group_size:
        raise ValueError(f"group_size={group_size} must divide the rollout's batch, num_envs={env.num_envs}")
    size = (_steps_kept(env, policy) + 1) * number // processes.count * math.prod(policy.model.latent_shape)
    remedy = "lower samples_per_iteration, or the samples of an evaluation"
    require_memory(f"number={number} trajectories", size, policy.device, remedy)


@contextmanager
def _waiting(env: VectorEnv[Any, Any, Any]) -> Iterator[None]:
    """For rewards that are computed in the background."""
    with span("waiting for rewards"), awaiting(reward_name(cast(DenoisingVectorEnv, env.unwrapped).reward)):
        yield


def _steps_kept(env: VectorEnv[Any, Any, Any], policy: DenoisingPolicy) -> int:
    return 0 if isinstance(env, OneStepVectorEnv) else len(policy.table)


def _storage(env: VectorEnv[Any, Any, Any], policy: DenoisingPolicy, number: int) -> dict[str, torch.Tensor]:
    """Empty tensors for the latents and the log-probabilities of so many trajectories; of x_0 alone in one step."""
    steps, device = _steps_kept(env, policy), policy.device
    latents = torch.empty(steps + 1, number, *policy.model.latent_shape, device=device)
    return {"latents": latents, "log_probs": torch.empty(steps, number, device=device)}


def _rewards_of(env: VectorEnv[Any, Any, Any]) -> AbstractContextManager[list[Future[RewardOutput]]]:
    """Within this context the rewards are computed in the background, where the environment allows it.

    The list is of the batches' scores; it stays empty where each batch comes with its own.
    """
    inner: Any = env.env if isinstance(env, OneStepVectorEnv) else env
    if (
        isinstance(inner, DenoisingVectorEnv)
        and inner.autoreset_mode == AutoresetMode.DISABLED
        and getattr(inner.reward, "background", False)
    ):
        return inner.deferred_rewards()
    return nullcontext([])


def _batches(
    env: VectorEnv[Any, Any, Any],
    number: int,
    seed_path: tuple[int, ...],
    group_size: int,
    shared_noise: bool,
    processes: Processes,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The seed of the actions' noise, and the arguments of `reset`, for each batch of this process."""
    for batch in processes.share(number // env.num_envs):
        env_seed, noise_seed, prompt_seed = stream((*seed_path, batch), "rollout").generate_state(3, np.uint64)
        options = None if group_size == 1 else {"prompt": _in_groups(env, group_size, int(prompt_seed))}
        seed = int(env_seed >> np.uint64(1))
        # With shared noise every env draws as the first one of its group.
        seeds = [seed + place - place % group_size for place in range(env.num_envs)] if shared_noise else seed
        yield int(noise_seed >> np.uint64(1)), {"seed": seeds, "options": options}


def _in_groups(env: VectorEnv[Any, Any, Any], group_size: int, seed: int) -> list[str]:
    """Prompts of one batch, each drawn once and repeated `group_size` times."""
    rng = np.random.default_rng(seed)
    prompts: PromptSet = cast(Any, env.unwrapped).prompt_set
    return [prompt for _ in range(env.num_envs // group_size) for prompt in [prompts.draw(rng)] * group_size]
