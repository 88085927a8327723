"""What a reward is, and the one place that calls it and checks what it returns."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import torch

from diffusion_gym.registry import Registry

U = TypeVar("U")

_PACKAGE: Final = Path(__file__).resolve().parent.parent
_LIBRARIES: Final = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib"))


@dataclass(frozen=True)
class RewardOutput:
    """Scores of a batch of images.

    Attributes:
        scores: float32 `(N,)`, larger is better; NaN or infinite marks a sample that could not be scored.
        info: the reward's components by name, each `(N,)`.
    """

    scores: torch.Tensor
    info: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Reward(Protocol):
    """Scores finished images: `r(x_0, c)` of the DDPO paper, section C.3.

    A reward may also have these attributes:

    - `name`: what errors and metrics call it.
    - `background = True`: it mostly waits for another process, so that native agents sample the next batch meanwhile.
      It is then called from a thread of its own, by one thread at a time.
    - `cancel()`: called from another thread when nobody wants its answer any more; a call that waits should end.
    - `default_prompts`: the prompt set to use with it; None for the model's.
    """

    def __call__(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        """Score `images`, float `(N, 3, H, W)` in [0, 1], made for `prompts` with their `metadata`."""
        ...


class RewardFactory(Protocol):
    """Builds a reward from its keyword arguments; heavy imports belong inside."""

    def __call__(self, **kwargs: Any) -> Reward:
        """Build the reward."""
        ...


class RewardError(RuntimeError):
    """A reward raised, or returned something that is no reward."""


class RewardRegistry(Registry[RewardFactory]):
    """Reward factories by name, with the pictures and prompts that each is meant for."""

    def __init__(self) -> None:
        super().__init__("reward")
        self._needs: dict[str, frozenset[str]] = {}
        self._prompts: dict[str, str | None] = {}

    def register(self, name: str, *, needs: Collection[str] = (), prompts: str | None = None) -> Callable[[U], U]:
        """Decorate a factory to enter it as `name`.

        Args:
            name: the reward's name, which becomes a part of environment ids.
            needs: the traits that a model must have (`ModelRegistry.register` lists them); empty for all models.
            prompts: the prompt set to use with it by default; None for the model's.

        Raises:
            ValueError: `name` is taken.
        """
        enter = super().register(name)
        self._needs[name], self._prompts[name] = frozenset(needs), prompts
        return enter

    def fits(self, name: str, traits: Collection[str]) -> bool:
        """Whether reward `name` can score pictures of a model with `traits`."""
        return self._needs[name] <= set(traits)

    def default_prompts(self, name: str) -> str | None:
        """The prompt set that goes with reward `name`."""
        return self._prompts[name]


REWARDS = RewardRegistry()


def reward_name(reward: object) -> str:
    """What errors and metrics call a reward: its `name`, else that of its function or class."""
    return str(getattr(reward, "name", None) or getattr(reward, "__name__", type(reward).__name__))


def _where(error: Exception) -> str:
    """The innermost line of the user's own code, as ` (FILE:LINE)`; empty where there is none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename).resolve()
        ours = any(file.is_relative_to(folder) for folder in (_PACKAGE, *_LIBRARIES))
        if not ours and not frame.filename.startswith("<frozen"):
            return f" ({file.name}:{frame.lineno})"
    return ""


def evaluate(
    reward: Reward,
    images: torch.Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]] | None = None,
) -> RewardOutput:
    """Call `reward` once on the whole batch and check its answer.

    Args:
        reward: the reward.
        images: float `(N, 3, H, W)` in [0, 1].
        prompts: N strings.
        metadata: N mappings; empty ones where None.

    Returns:
        The reward's output with float32 `scores` on the images' device. Non-finite scores pass: the caller
        drops those samples.

    Raises:
        RewardError: the reward raised, or returned no `(N,)` scores.
    """
    name = reward_name(reward)
    try:
        output = reward(images, prompts, metadata if metadata is not None else [{} for _ in prompts])
    except RewardError:
        raise  # says already which reward
    except Exception as error:
        raise RewardError(f"reward={name!r} raised {type(error).__name__}: {error}{_where(error)}") from error
    if not isinstance(output, RewardOutput):
        output = RewardOutput(output)
    try:
        scores = torch.as_tensor(output.scores, dtype=torch.float32, device=images.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardError(
            f"reward={name!r} returned {output.scores!r}; return one number an image, shape ({len(prompts)},)"
        ) from error
    for part, value in {"scores": scores, **output.info}.items():
        if tuple(value.shape) != (len(prompts),):
            raise RewardError(
                f"reward={name!r} returned {part} of shape {tuple(value.shape)} for {len(prompts)} images; "
                f"return one number an image, shape ({len(prompts)},)"
            )
    return RewardOutput(scores.detach(), {k: v.detach().to(images.device) for k, v in output.info.items()})
