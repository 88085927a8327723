"""The wrappers of vector environments on single ones: a view of the wrapped vector of one."""

from __future__ import annotations

import inspect
import os
from typing import Any, ClassVar, Generic, TypeVar

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array

from diffusion_gym.envs.single import SingleView

Kind = TypeVar("Kind", bound=VectorWrapper)


class VectorView(VectorEnv[Any, Any, Any]):
    """A single environment, wrapped or not, as a vector of one in NumPy without autoreset.

    Args:
        env: the single environment.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__()
        self.env, self.num_envs = env, 1
        self.metadata = {**env.metadata, "autoreset_mode": AutoresetMode.DISABLED}
        self.render_mode = env.render_mode
        self.single_observation_space, self.single_action_space = env.observation_space, env.action_space
        self.observation_space = batch_space(self.single_observation_space, 1)
        self.action_space = batch_space(self.single_action_space, 1)

    @property
    def unwrapped(self) -> Any:
        """The denoising vector environment that does the work."""
        return getattr(self.env.unwrapped, "vector", self)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """As the single environment's."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self._batched(observation), self._add_info({}, info, 0)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """As the single environment's."""
        observation, reward, terminated, truncated, info = self.env.step(actions[0])
        flags = np.array([[terminated], [truncated]], dtype=bool)
        return self._batched(observation), np.array([reward], dtype=np.float64), *flags, self._add_info({}, info, 0)

    def _batched(self, observation: Any) -> Any:
        empty: Any = create_empty_array(self.single_observation_space, n=1)
        return concatenate(self.single_observation_space, [observation], empty)

    def render(self) -> tuple[Any, ...] | None:
        """As the single environment's."""
        frame = self.env.render()
        return None if frame is None else (frame,)

    def close_extras(self, **kwargs: Any) -> None:
        """Close the single environment."""
        self.env.close()

    def __repr__(self) -> str:
        return repr(self.env)


class SingleWrapper(SingleView, gym.Wrapper[Any, Any, Any, Any], Generic[Kind]):
    """A vector wrapper for single environments, with Gymnasium's wrappers below and above it as one likes.

    A subclass names it as `kind`. One that inherits from `RecordConstructorArgs` too is made again by its spec.

    Args:
        env: a single environment, wrapped or not.
        *args: as those of `kind`, whose errors it raises.
        **kwargs: as those of `kind`.

    Attributes:
        vector: the vector wrapper, whose public attributes are this one's too, to read and to set.

    Raises:
        ValueError: `env` is not a single environment.
    """

    kind: ClassVar[Any]
    vector: Kind

    def __init__(self, env: gym.Env[Any, Any], *args: Any, **kwargs: Any) -> None:
        if not isinstance(env, gym.Env):
            raise ValueError(
                f"env={env!r} is not made by gym.make; for a vector environment there is {self.kind.__name__}"
            )
        if isinstance(self, RecordConstructorArgs):
            given = inspect.signature(self.kind).bind(env, *args, **kwargs).arguments.items()
            plain = {key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in given}
            RecordConstructorArgs.__init__(self, **{key: value for key, value in plain.items() if key != "env"})
        gym.Wrapper.__init__(self, env)
        SingleView.__init__(self, self.kind(VectorView(env), *args, **kwargs))

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__signature__ = inspect.signature(cls.kind)  # type: ignore[attr-defined]  # for help() and completion

    def __getattr__(self, name: str) -> Any:
        if self._is_the_vectors(name):
            return getattr(self.vector, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_the_vectors(name):
            setattr(self.vector, name, value)
        else:
            super().__setattr__(name, value)

    def _is_the_vectors(self, name: str) -> bool:
        own = vars(self)
        return "vector" in own and name not in own and not name.startswith("_") and name in vars(own["vector"])
