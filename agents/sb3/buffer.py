"""A rollout buffer of whole trajectories, for Stable-Baselines3: on the device, each latent and prompt stored once."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples

from diffusion_gym.agents.advantages import usable_rewards
from diffusion_gym.agents.rollout import Trajectories


def require_whole_episodes(n_steps: int, horizon: int) -> None:
    """Raise a ValueError unless a rollout of so many steps holds whole episodes of `horizon` steps."""
    if n_steps < 1 or n_steps % horizon:
        raise ValueError(
            f"n_steps={n_steps} must be a multiple of T={horizon}: the reward comes with the last denoising step, and "
            "a rollout that ends before it has none"
        )


class TrajectoryBuffer(RolloutBuffer):
    """What SB3's `DictRolloutBuffer` holds, for episodes of T steps that begin together.

    SB3's keeps x_t as observation and as action, and the prompt at every step, in NumPy; here T + 1 latents and one
    prompt a trajectory are on the device. Trajectory `episode * n_envs + env` is a column of the tensors. SB3's own
    PPO takes it too: `rollout_buffer_class=TrajectoryBuffer, rollout_buffer_kwargs={"horizon": T}`.

    Args:
        buffer_size: steps of a rollout, a multiple of `horizon`.
        *args: from SB3: spaces and device.
        horizon: T.
        steps: those that `get` gives; None for all.
        **kwargs: from SB3: gamma, gae_lambda, n_envs.

    Attributes:
        tokens: int64 `(N, L)`, or None for an unconditional model.
        timesteps: int64 `(T,)`.
        latents: float32 `(T + 1, N, C, H, W)`.
        step_rewards: float32 `(T, N)`.
        step_values: float32 `(T, N)`.
        step_log_probs: float32 `(T, N)`.
        step_advantages: float32 `(T, N)`.

    Raises:
        ValueError: `buffer_size` is not a multiple of `horizon`, or steps that are not those of whole trajectories.
    """

    def __init__(
        self, buffer_size: int, *args: Any, horizon: int, steps: Sequence[int] | None = None, **kwargs: Any
    ) -> None:
        require_whole_episodes(buffer_size, horizon)
        self.horizon, self.steps = horizon, torch.arange(horizon) if steps is None else torch.tensor(steps)
        super().__init__(buffer_size, *args, **kwargs)

    def __len__(self) -> int:
        """N, the number of trajectories."""
        return self.buffer_size // self.horizon * self.n_envs

    def reset(self) -> None:
        """Forget the last rollout."""
        shape: Any = self.action_space.shape
        number = len(self)
        self.tokens: torch.Tensor | None = None
        if "prompt" in self.observation_space.spaces:  # type: ignore[attr-defined]
            length = self.observation_space["prompt"].shape[0]  # type: ignore[index]
            self.tokens = torch.zeros(number, length, dtype=torch.int64, device=self.device)
        self.timesteps = torch.zeros(self.horizon, dtype=torch.int64, device=self.device)
        self.latents = torch.zeros(self.horizon + 1, number, *shape, device=self.device)
        self.step_rewards, self.step_values, self.step_log_probs, self.step_advantages = torch.zeros(
            4, self.horizon, number, device=self.device
        )
        self.pos, self.full = 0, False

    def add(  # type: ignore[override]
        self,
        obs: dict[str, Any],
        action: Any,
        reward: Any,
        episode_start: Any,
        value: torch.Tensor,
        log_prob: torch.Tensor,
    ) -> None:
        """One step of all envs; arguments as SB3 gives them, NumPy or torch.

        Raises:
            ValueError: the step is not the next one of every trajectory, or starts elsewhere than the last led to.
        """
        episode, step = divmod(self.pos, self.horizon)
        columns = slice(episode * self.n_envs, (episode + 1) * self.n_envs)
        if not (np.asarray(episode_start).astype(bool) == (step == 0)).all():
            raise ValueError(
                f"episode_start={np.asarray(episode_start)} at step {step} of T={self.horizon}: all envs must begin "
                "together, and episodes have T steps"
            )
        state = self._place(obs["latents"])
        if step == 0:
            self.latents[0, columns] = state
            if self.tokens is not None:
                self.tokens[columns] = self._place(obs["prompt"])
        elif not torch.equal(state, self.latents[step, columns]):
            raise ValueError(
                "observation['latents'] is not the action before it; take the wrapper off that clips or scales actions "
                "or observations"
            )
        self.timesteps[step] = self._place(obs["timestep"]).flatten()[0]
        self.latents[step + 1, columns] = self._place(action).reshape(state.shape)
        self.step_rewards[step, columns] = self._place(reward)
        self.step_values[step, columns] = value.flatten()
        self.step_log_probs[step, columns] = log_prob
        self.pos += 1
        self.full = self.pos == self.buffer_size

    def compute_returns_and_advantage(self, last_values: torch.Tensor | None = None, dones: Any = None) -> None:
        """Generalised advantage estimates; nothing follows the last step, so that the arguments do not count."""
        after = torch.zeros_like(self.step_values[0])
        next_value = after
        for step in reversed(range(self.horizon)):
            delta = self.step_rewards[step] + self.gamma * next_value - self.step_values[step]
            after = delta + self.gamma * self.gae_lambda * after
            self.step_advantages[step], next_value = after, self.step_values[step]

    def has_step_rewards(self) -> bool:
        """Whether there are rewards before the last step."""
        return bool((self.step_rewards[:-1] != 0).any())

    def trajectories(self) -> Trajectories:
        """The rollout as the native agents take it; a prompt's name is its token ids."""
        names = [""] * len(self) if self.tokens is None else [" ".join(map(str, row)) for row in self.tokens.tolist()]
        return Trajectories(
            prompts=tuple(names),
            tokens=self.tokens,
            timesteps=self.timesteps,
            latents=self.latents,
            log_probs=self.step_log_probs,
            rewards=self.step_rewards.sum(0),
            components={},
            images=torch.empty(len(self), 0),
        )

    def replace_rewards(self, rewards: np.ndarray) -> None:
        """Put `rewards` `(N,)` at the last steps, 0 before, and compute the advantages again."""
        self.step_rewards.zero_()
        self.step_rewards[-1] = torch.as_tensor(rewards, dtype=torch.float32, device=self.device)
        self.compute_returns_and_advantage()

    def get(self, batch_size: int | None = None) -> Generator[DictRolloutBufferSamples, None, None]:  # type: ignore[override]
        """Minibatches of transitions in random order, for SB3's own `train`; without those of failed rewards.

        Raises:
            NoUsableReward: no trajectory has a finite reward.
        """
        assert self.full, "the rollout is not complete"
        rollout, returns = self.trajectories(), self.step_returns
        usable = torch.from_numpy(usable_rewards(rollout.rewards.double().cpu().numpy()))
        pairs = torch.cartesian_prod(usable, self.steps).to(self.device)
        order = torch.from_numpy(np.random.permutation(len(pairs))).to(self.device)
        for part in pairs[order].split(batch_size or len(pairs)):
            samples, steps = part.unbind(1)
            yield DictRolloutBufferSamples(
                observations=rollout.states(samples, steps),
                actions=rollout.actions(samples, steps),
                old_values=self.step_values[steps, samples],
                old_log_prob=self.step_log_probs[steps, samples],
                advantages=self.step_advantages[steps, samples],
                returns=returns[steps, samples],
            )

    @property
    def step_returns(self) -> torch.Tensor:
        """What values are to be, float32 `(T, N)`."""
        return self.step_advantages + self.step_values

    @property
    def values(self) -> np.ndarray:  # type: ignore[override]
        """Values, `(T, N)`, for SB3's logs."""
        return self.step_values.cpu().numpy()

    @property
    def returns(self) -> np.ndarray:  # type: ignore[override]
        """Returns, `(T, N)`, for SB3's logs."""
        return self.step_returns.cpu().numpy()

    def _place(self, value: Any) -> torch.Tensor:
        return torch.as_tensor(value, device=self.device)
