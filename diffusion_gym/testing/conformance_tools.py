"""What the conformance suite stands on: playing episodes with known actions, and comparing what comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import create_empty_array, iterate
from numpy.typing import NDArray

Make = Callable[..., VectorEnv[Any, Any, Any]]
Results = dict[str, Any]

NUM_ENVS: Final = 3
SEED: Final = 7
RESET: Final = ("observations", "infos")
STEP: Final = ("observations", "rewards", "terminations", "truncations", "infos")


class Probe:
    """An environment under test: makes its actions, and copies what it returns to NumPy.

    Args:
        env: the environment.
        output: what `env` was asked to return, and gets as actions: `numpy` or `torch`.
        first: row of the actions that env 0 takes.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], output: str, first: int) -> None:
        self.env, self.output, self.first = env, output, first
        inner: Any = env.unwrapped
        self.device = torch.device(getattr(inner, "device", "cpu"))
        self.horizon: int = env.horizon if hasattr(env, "horizon") else inner.horizon
        self.lead = min(1, self.horizon - 1)
        """How many steps `stagger` puts env 0 behind the others: none where episodes last one step."""

    def actions(self, number: int) -> Any:
        """The actions of step `number`, `(N, C, H, W)`; each row depends on its place and `number` only."""
        space = self.env.single_action_space
        assert space.shape is not None and space.dtype is not None
        rows = range(self.first, self.first + self.env.num_envs)
        values = np.stack([np.random.default_rng([number, row]).standard_normal(space.shape) for row in rows])
        actions = values.astype(space.dtype)
        return torch.from_numpy(actions).to(self.device) if self.output == "torch" else actions

    def reset(self, **kwargs: Any) -> Results:
        """A copy of what `reset` returns, by name."""
        return named(copied(self.env.reset(**kwargs)))

    def step(self, number: int) -> Results:
        """A copy of what `step` returns for `actions(number)`, by name."""
        return named(copied(self.env.step(self.actions(number))))

    def play(self, steps: int, seed: int = SEED) -> list[Results]:
        """What a reset and `steps` steps return."""
        return [self.reset(seed=seed), *(self.step(number) for number in range(steps))]

    def stagger(self) -> tuple[Results, Results]:
        """Start, take `lead` steps, then reset env 0 alone: the results before that reset, and its own."""
        before = self.play(self.lead)[-1]
        return before, self.reset(options={"reset_mask": only_first()})

    def to_the_end(self) -> Results:
        """After `stagger`: the step at which the envs other than env 0 end."""
        for number in range(self.lead, self.horizon):
            results = self.step(number)
        return results


@contextmanager
def opened(
    make: Make,
    mode: AutoresetMode = AutoresetMode.DISABLED,
    output: str = "numpy",
    *,
    num_envs: int = NUM_ENVS,
    first: int = 0,
) -> Iterator[Probe]:
    """A new environment to test, closed at the end."""
    env = make(num_envs=num_envs, autoreset_mode=mode, output=output)
    try:
        yield Probe(env, output, first)
    finally:
        env.close()


def only_first() -> NDArray[np.bool_]:
    """The mask `(N,)` of env 0."""
    return np.array([True] + [False] * (NUM_ENVS - 1))


def named(returned: tuple[Any, ...]) -> Results:
    """The parts of what `reset` or `step` returned, by name."""
    return dict(zip(RESET if len(returned) == 2 else STEP, returned, strict=True))


def copied(value: Any) -> Any:
    """A deep copy with tensors turned into arrays."""
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(copied(part) for part in value)
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy().copy()
    if isinstance(value, np.ndarray):
        copy = value.copy()
        if value.dtype == object:
            copy[...] = [copied(part) for part in value]
        return copy
    return value


def spoiled(value: Any) -> None:
    """Overwrite all arrays, tensors and dicts in `value`, in place."""
    if isinstance(value, dict | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            spoiled(part)
    if isinstance(value, dict):
        value.clear()
    elif isinstance(value, torch.Tensor):
        value.fill_(1)
    elif isinstance(value, np.ndarray) and value.dtype == object:
        spoiled(tuple(value))
        value[...] = None
    elif isinstance(value, np.ndarray) and value.flags.writeable:
        value[...] = 1


def row(value: Any, index: int) -> Any:
    """The part of env `index`, as a batch of one."""
    if isinstance(value, dict):
        return {key: row(part, index) for key, part in value.items()}
    return value[index : index + 1]


def difference(one: Any, other: Any, tolerance: float = 0.0, place: str = "") -> str:
    """Where two copies differ, and how; empty where they are equal (NaN equals NaN).

    Args:
        one: what was found.
        other: what it is compared with.
        tolerance: absolute and relative difference to overlook.
        place: name of the two.
    """
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        parts = [(f"{place}[{key!r}]", one[key], other[key]) for key in one]
    elif _objects(one) and _objects(other) and one.shape == other.shape:
        parts = [(f"{place}[{i}]", *pair) for i, pair in enumerate(zip(one, other, strict=True))]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        parts = [(f"call {i}: {place}", *pair) for i, pair in enumerate(zip(one, other, strict=True))]
    elif _equal(one, other, tolerance):
        return ""
    else:
        return f"{place} {brief(one)} against {brief(other)}"
    return next(filter(None, (difference(a, b, tolerance, name) for name, a, b in parts)), "")


def brief(value: Any) -> str:
    """The representation of `value`, with the middle of large arrays left out."""
    with np.printoptions(threshold=8, edgeitems=1, precision=4):
        return " ".join(repr(value).split())


def _objects(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == object


def _equal(one: Any, other: Any, tolerance: float) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        alike = one.shape == other.shape and one.dtype == other.dtype and not _objects(one)
        return alike and np.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)
    return type(one) is type(other) and bool(one == other)


def check_fit(probe: Probe, results: Results) -> None:
    """Fail unless results have the containers, dtypes and shapes that they should, and lie in the spaces."""
    env, infos = probe.env, results.pop("infos")
    require(isinstance(infos, dict), f"infos must be a dict; they are {infos!r}")
    _check_container(probe, results, "results")
    found = copied(results)
    empty: Results = {
        "observations": create_empty_array(env.single_observation_space, env.num_envs),
        "rewards": np.empty(env.num_envs, np.float32),
        "terminations": np.empty(env.num_envs, np.bool_),
        "truncations": np.empty(env.num_envs, np.bool_),
    }
    same(_kinds(found), _kinds({name: empty[name] for name in found}), "dtype and shape (found, then wanted)")
    batch = found["observations"]
    require(batch in env.observation_space, f"observations {brief(batch)} do not lie in {env.observation_space}")
    for index, single in enumerate(iterate(env.observation_space, batch)):
        inside = single in env.single_observation_space
        require(inside, f"observation {brief(single)} of env {index} does not lie in {env.single_observation_space}")


def _check_container(probe: Probe, value: Any, place: str) -> None:
    if isinstance(value, dict):
        for key, part in value.items():
            _check_container(probe, part, f"{place}[{key!r}]")
        return
    kind, wanted = (torch.Tensor if probe.output == "torch" else np.ndarray), probe.device
    require(isinstance(value, kind), f"output={probe.output!r}: {place} is a {type(value)}, not a {kind}")
    if isinstance(value, torch.Tensor):
        there = value.device.type == wanted.type and wanted.index in (None, value.device.index)
        require(there, f"{place} is on {value.device}, the environment on {wanted}")


def _kinds(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _kinds(value[key]) for key in sorted(value)}
    return f"{value.dtype} {value.shape}"


def require(condition: object, message: str) -> None:
    """Fail with `message` unless `condition` holds; unlike `assert`, under `python -O` too."""
    if not condition:
        raise AssertionError(message)


def same(one: Any, other: Any, message: str, tolerance: float = 0.0) -> None:
    """Fail with `message` and the first difference unless both are equal."""
    if found := difference(one, other, tolerance):
        raise AssertionError(f"{message}: {found}")


def raises(kind: type[Exception], call: Callable[[], object], what: str) -> None:
    """Fail unless `call` raises `kind`."""
    try:
        call()
    except kind:
        return
    except Exception as error:
        raise AssertionError(f"{what} must raise {kind.__name__}; it raised {error!r}") from error
    raise AssertionError(f"{what} must raise {kind.__name__}; it raised nothing")
