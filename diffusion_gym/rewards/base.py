"""What a reward is, and the one place that calls it and checks what it returns."""

from __future__ import annotations

import copy
import signal
import sysconfig
import threading
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import numpy as np
import torch

from diffusion_gym.registry import Registry
from diffusion_gym.rewards.awaiting import awaiting

U = TypeVar("U")

_PACKAGE: Final = Path(__file__).resolve().parent.parent
_LIBRARIES: Final = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib"))


@dataclass(frozen=True)
class RewardOutput:
    """Scores of a batch of images.

    Attributes:
        scores: float32 `(N,)`, larger is better; NaN or infinite marks a sample that could not be scored.
        info: the reward's components by name, each `(N,)`. `evaluate` takes arrays, lists and single numbers as well.
    """

    scores: torch.Tensor
    info: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Reward(Protocol):
    """Scores finished images: `r(x_0, c)` of the DDPO paper, section C.3.

    A reward may also have these attributes:

    - `name`: what errors and metrics call it.
    - `background = True`: it mostly waits for another process, so that native agents sample the next batch meanwhile.
      It is then called from a thread of its own, by one thread at a time.
    - `differentiable = True`: its scores have a gradient where the pictures have one, which `reward_gradient` follows.
    - `cancel()`: called from another thread, maybe several times, when nobody wants its answer any more; a call that
      waits should end.
    - `compare(images, prompts, metadata, groups)`: a RewardOutput with win rates instead of scores, each picture
      against the others of its group, `groups` being N whole numbers.
    - `default_prompts`: the prompt set to use with it; None for the model's.
    - `needs_metadata`: keys that the metadata of every prompt must have, such as `("text",)`; an environment refuses
      prompts without them before anything runs.
    - `check_prompt(prompt, metadata)`: raises ValueError for a prompt that it cannot judge; an environment asks it of
      all its prompts before anything runs.
    - `check_size(height, width)`: raises ValueError for pictures of a size that it cannot judge; asked then too.
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
    """A reward raised, returned something that is no reward, or took too long."""


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


def needed_metadata(reward: object) -> tuple[str, ...]:
    """The keys that `reward` needs in the metadata of every prompt, its `needs_metadata`.

    Raises:
        ValueError: `needs_metadata` is no list of strings.
    """
    keys = getattr(reward, "needs_metadata", ())
    if not isinstance(keys, list | tuple | set | frozenset) or not all(isinstance(key, str) for key in keys):
        raise ValueError(f"reward={reward_name(reward)!r} has needs_metadata={keys!r}; write a tuple of strings")
    return tuple(sorted(keys) if isinstance(keys, set | frozenset) else keys)


def check_prompt(reward: object, prompt: str, metadata: Mapping[str, Any]) -> None:
    """Have `reward` refuse a prompt that it cannot judge, where it has such a `check_prompt`.

    Raises:
        ValueError: what the reward says of the prompt.
    """
    if callable(own := getattr(reward, "check_prompt", None)):
        own(prompt, metadata)


def check_size(reward: object, height: int, width: int) -> None:
    """Have `reward` refuse pictures of a size that it cannot judge, where it has such a `check_size`.

    Raises:
        ValueError: what the reward says of the size.
    """
    if callable(own := getattr(reward, "check_size", None)):
        own(height, width)


def _where(error: BaseException) -> str:
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

    The reward gets a copy of the metadata and of the pictures, without those that are not finite: these have NaN for a
    score and all components, with a warning. It is called by one thread at a time; another one waits for its turn.

    Args:
        reward: the reward.
        images: float `(N, 3, H, W)` in [0, 1].
        prompts: N strings.
        metadata: N mappings; empty ones where None.

    Returns:
        The reward's output as float32 tensors on the images' device. Non-finite scores pass: the caller drops those
        samples. Where no picture is finite there are no components.

    Raises:
        RewardError: the reward raised anything, `SystemExit` included; returned no `(N,)` scores, or components that
            are not such or have a name that is not theirs to have.
        KeyboardInterrupt: Ctrl-C.
    """
    given = metadata if metadata is not None else [{} for _ in prompts]
    rows = _finite_rows(images)
    if len(rows) == len(images):
        return _called(reward, images.clone(), list(prompts), list(given))
    warnings.warn(
        f"{len(images) - len(rows)} of {len(images)} pictures hold NaN or infinite values and score NaN; where the "
        "model decodes in float16, its autoencoder may overflow: use dtype='float32' or 'bfloat16'",
        stacklevel=2,
    )
    if not rows:
        return RewardOutput(images.new_full((len(images),), torch.nan, dtype=torch.float32))
    output = _called(reward, images[rows], [prompts[row] for row in rows], [given[row] for row in rows])

    def spread(part: torch.Tensor) -> torch.Tensor:
        full = part.new_full((len(images),), torch.nan)
        full[rows] = part
        return full

    return RewardOutput(spread(output.scores), {name: spread(part) for name, part in output.info.items()})


def _finite_rows(images: torch.Tensor) -> list[int]:
    return images.isfinite().flatten(1).all(1).nonzero().flatten().tolist()


def _called(
    reward: Reward, images: torch.Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]
) -> RewardOutput:
    name, number = reward_name(reward), len(prompts)
    try:
        with awaiting(name), _turn(reward):
            output: Any = reward(images, prompts, copy.deepcopy(metadata))
    except RewardError:
        raise  # says already which reward
    except BaseException as error:  # a reward's sys.exit() is no wish of the user's
        if _maybe_by_signal(error):
            raise
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise RewardError(f"reward={name!r} raised {text}{_where(error)}") from error
    if not isinstance(output, RewardOutput):
        output = RewardOutput(output)
    scores = _numbers(name, "", output.scores, number, images.device)
    if not isinstance(output.info, Mapping):
        raise RewardError(f"reward={name!r} returned info={output.info!r}; return components by name")
    for part in output.info:
        if not isinstance(part, str) or part == "scores" or part.startswith("_"):
            raise RewardError(
                f"reward={name!r} returned a component named {part!r}; name it by a string other than 'scores', "
                "without an underscore in front"
            )
    return RewardOutput(scores, {p: _numbers(name, p, v, number, images.device) for p, v in output.info.items()})


def _maybe_by_signal(error: BaseException) -> bool:
    """Whether a signal, such as Ctrl-C, may have brought it about, and not the reward."""
    if isinstance(error, Exception) or threading.current_thread() is not threading.main_thread():
        return False
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = {getattr(handler, "__code__", None) for handler in handlers if callable(handler)}
    if isinstance(error, KeyboardInterrupt) and getattr(signal.getsignal(signal.SIGINT), "__code__", None) is None:
        return callable(signal.getsignal(signal.SIGINT))  # Python's own handler, written in C, leaves no trace
    return any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))


def _numbers(name: str, part: str, value: Any, number: int, device: torch.device) -> torch.Tensor:
    """A reward's scores, or its component `part`, as float32 `(N,)`; a single number is a component of each picture.

    A copy: the reward may write into what it returned.
    """
    wanted = f"return one number an image, shape ({number},)"
    try:
        if isinstance(value, np.ndarray):
            value = np.array(value, order="C")  # PyTorch takes no negative strides, and warns of what is read-only
        if "complex" in str(getattr(value, "dtype", "")):
            raise TypeError("PyTorch would drop the imaginary parts")
        found = torch.as_tensor(value, dtype=torch.float32, device=device).detach().clone()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise RewardError(f"reward={name!r} returned {part or 'scores'} {value!r}; {wanted}") from error
    if part and found.ndim == 0:
        return found.expand(number).clone()
    if tuple(found.shape) != (number,):
        raise RewardError(
            f"reward={name!r} returned {part or 'scores'} of shape {tuple(found.shape)} for {number} images; {wanted}"
        )
    return found


class _Turn:
    def __init__(self) -> None:
        self.lock, self.users = threading.RLock(), 0


_TURNS: Final[dict[int, _Turn]] = {}
_GUARD: Final = threading.Lock()


@contextmanager
def _turn(reward: Reward) -> Iterator[None]:
    """Within this context no other thread is in here with the same reward; the same thread may be, as in a sum."""
    with _GUARD:
        turn = _TURNS.setdefault(id(reward), _Turn())  # an id is one reward's as long as somebody uses that reward
        turn.users += 1
    try:
        with turn.lock:
            yield
    finally:
        with _GUARD:
            turn.users -= 1
            if not turn.users:
                del _TURNS[id(reward)]
