"""A named collection of factories: rewards, models, prompt sets and agents are each one `Registry`."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


def closest_name(name: object, known: Sequence[str], cutoff: float = 0.6) -> str | None:
    """The name of `known` that `name` was meant to be: the shortest that begins with it, else the most similar.

    Args:
        name: what was typed; its case does not matter.
        known: the names to choose from.
        cutoff: least similarity, `difflib`'s ratio in [0, 1]; a beginning needs three letters only.
    """
    typed, lower = str(name).lower(), {entry.lower(): entry for entry in known}
    begun = [entry for entry in lower if len(typed) >= 3 and entry.startswith(typed)]
    close = [min(begun, key=len)] if begun else difflib.get_close_matches(typed, lower, n=1, cutoff=cutoff)
    return lower[close[0]] if close else None


def unknown_name(kind: str, name: object, known: list[str]) -> str:
    """The text of the error for a name that is not in `known`, with the closest name suggested."""
    closest = closest_name(name, known)
    hint = f"did you mean {closest!r}? " if closest else ""
    return f"{kind}={name!r} is unknown; {hint}known: {', '.join(known)}"


def imported(kind: str, name: str, form: str, fits: Callable[[object], bool]) -> object:
    """What `name`, `module:attribute`, stands for; while the module is imported the current directory counts.

    Args:
        kind: the argument that error messages name.
        name: the module and, after a colon, the attribute.
        form: what the name must be, for the error of one that is something else.
        fits: which of the module's own attributes to suggest for one that it lacks.

    Raises:
        ValueError: `name` has another form, the module cannot be imported, or it has no such attribute.
    """
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), attribute]):
        raise ValueError(f"{kind}={name!r} must be {form}")
    try:
        with _current_directory():
            found = vars(importlib.import_module(module))
    except ImportError as error:
        raise ValueError(
            f"{kind}={name!r} cannot be imported ({error}); run in the folder of {module!r} or add that to PYTHONPATH"
        ) from error
    if attribute not in found:
        own = [key for key, value in found.items() if fits(value) and getattr(value, "__module__", None) == module]
        raise ValueError(unknown_name(kind, name, [f"{module}:{key}" for key in own]))
    return found[attribute]


@contextmanager
def _current_directory() -> Iterator[None]:
    """Within this context modules of the current directory are found first, as for `python -m`."""
    if "" in sys.path:
        yield
        return
    sys.path.insert(0, "")
    try:
        yield
    finally:
        if "" in sys.path:  # the module may have changed the path itself
            sys.path.remove("")


class WrongKeyword(TypeError):
    """A keyword that does not exist or does not go with others: the caller's mistake, as not every TypeError is."""


class Registry(Generic[T]):
    """Names mapped to factories, in the order of registration.

    Args:
        kind: what an entry is ("reward", "model", ...): the argument that error messages name.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[U], U]:
        """Decorate a factory to enter it as `name`.

        Raises:
            ValueError: `name` is taken.
        """

        def enter(entry: U) -> U:
            if name in self._entries:
                raise ValueError(f"{self.kind}={name!r} is already registered; choose another name")
            self._entries[name] = entry  # type: ignore[assignment]
            return entry

        return enter

    def names(self) -> list[str]:
        """All names, in the order of registration."""
        return list(self._entries)

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise ValueError(unknown_name(self.kind, name, self.names()))
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
