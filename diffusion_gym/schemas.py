"""What comes from a file or from the wire is checked against a declared schema before it is used."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from diffusion_gym.storage import parse_json, read_json

T = TypeVar("T")
_SHORT: Final = reprlib.Repr()  # of a wrong value, which may be as large as a body of the wire
_SHORT.maxstring = _SHORT.maxother = 80


class Schema(BaseModel):
    """A JSON object of declared fields: no other fields, no conversions between types, no NaN and no infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def checked(schema: type[T], value: Any, where: str, remedy: str) -> T:
    """`value`, of parsed JSON or TOML, as `schema` declares it.

    Args:
        schema: a `Schema`, or a type such as `list[str]`.
        value: what was read.
        where: the file, or what else it came from, as the error names it.
        remedy: what the user can do, the end of the error's sentence.

    Raises:
        ValueError: a field is missing, unknown, of another type or out of its bounds.
    """
    try:
        return _adapter(schema).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{where}: {_complaint(error)}; {remedy}") from None


def read_checked(schema: type[T], path: str | Path, remedy: str) -> T:
    """The JSON file at `path` as `schema` declares it; see `checked`.

    Raises:
        ValueError: it is not JSON, or not what `schema` declares.
    """
    return checked(schema, read_json(path), str(path), remedy)


def parse_checked(schema: type[T], text: str | bytes, where: str, remedy: str) -> T:
    """A JSON text as `schema` declares it; see `checked`.

    Raises:
        ValueError: it is not JSON, or not what `schema` declares.
    """
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}); {remedy}") from None
    return checked(schema, value, where, remedy)


def _adapter(schema: type[T]) -> TypeAdapter[T]:
    if schema not in _ADAPTERS:
        own = isinstance(schema, type) and issubclass(schema, BaseModel)
        _ADAPTERS[schema] = TypeAdapter(schema, config=None if own else _STRICT)
    return _ADAPTERS[schema]


def _complaint(error: ValidationError) -> str:
    """The first of the errors: the field by its path, the value, and what is wrong with it."""
    first, *others = error.errors(include_url=False)
    field = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(others)} more)" if others else ""
    if first["type"] == "missing":
        return f"the field {field!r} is missing{more}"
    if first["type"] == "extra_forbidden":
        return f"the field {field!r} is not known here{more}"
    value = _SHORT.repr(first["input"])
    reason = first["msg"][:1].lower() + first["msg"][1:]
    return f"{f'{field}={value}' if field else value}: {reason}{more}"


_STRICT: Final = ConfigDict(strict=True, allow_inf_nan=False)
_ADAPTERS: Final[dict[Any, TypeAdapter[Any]]] = {}
