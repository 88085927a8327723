"""A named collection of factories: rewards, models, prompt sets and agents are each one `Registry`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


def unknown_name(kind: str, name: object, known: list[str]) -> str:
    """The text of the error for a name that is not in `known`, with the closest name suggested."""
    lower = {entry.lower(): entry for entry in known}
    close = difflib.get_close_matches(str(name).lower(), lower, n=1)
    hint = f"did you mean {lower[close[0]]!r}? " if close else ""
    return f"{kind}={name!r} is unknown; {hint}known: {', '.join(known)}"


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
