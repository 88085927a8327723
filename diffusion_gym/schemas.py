"""What comes from a file or from the wire is checked against a declared schema before it is used."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, Strict, TypeAdapter, ValidationError, create_model

from diffusion_gym.registry import closest_name
from diffusion_gym.storage import parse_json, read_json

T = TypeVar("T")
_SHORT: Final = reprlib.Repr()  # of a wrong value, which may be as large as a body of the wire
_SHORT.maxstring = _SHORT.maxother = 80
_MOST: Final = 2**63  # of a whole number, as in torch and NumPy

Integer = Annotated[int, Field(ge=-_MOST, lt=_MOST)]
Count = Annotated[int, Field(ge=0, lt=_MOST)]
Positive = Annotated[int, Field(ge=1, lt=_MOST)]


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
        raise ValueError(f"{where}: {_complaint(error, schema)}; {remedy}") from None


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


def options_schema(kind: Any, without: frozenset[str] = frozenset(), **others: Any) -> type[Schema]:
    """The schema of an object that holds all fields of a dataclass, whatever their defaults; lists stand for tuples.

    `model_dump(by_alias=True)` of what was read are the values by the fields' names, which may be any.

    Args:
        kind: the dataclass.
        without: fields that the object does not have.
        others: types that stand in for those of fields.
    """
    return _options_schema(kind, without, **others)


@cache
def _options_schema(kind: Any, without: frozenset[str], **others: Any) -> type[Schema]:
    hints = {**get_type_hints(kind), **others}
    declared: dict[str, Any] = {
        f"option_{entry.name}": Annotated[_of_json(hints[entry.name]), Field(alias=entry.name)]
        for entry in dataclasses.fields(kind)
        if entry.name not in without
    }
    return create_model(kind.__name__, __base__=Schema, **declared)


def _of_json(hint: Any) -> Any:
    """A type as JSON holds it: a tuple is a list, and whole numbers are of 64 bits."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return Union[tuple(map(_of_json, parts))]  # noqa: UP007
    if origin is tuple:
        return Annotated[hint, Strict(False)]
    return Integer if hint is int else hint


def _adapter(schema: type[T]) -> TypeAdapter[T]:
    if schema not in _ADAPTERS:
        configured = isinstance(schema, type) and (
            issubclass(schema, BaseModel) or hasattr(schema, "__pydantic_config__")
        )
        _ADAPTERS[schema] = TypeAdapter(schema, config=None if configured else _STRICT)
    return _ADAPTERS[schema]


def _complaint(error: ValidationError, schema: Any) -> str:
    """The first of the errors: the field by its path, the value, and what is wrong with it."""
    first, *others = error.errors(include_url=False)
    field = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(others)} more)" if others else ""
    if first["type"] == "missing":
        return f"the field {field!r} is missing{more}"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        closest = closest_name(first["loc"][-1], list(_names(_adapter(schema).json_schema())))
        return f"the field {field!r} is not known here{f'; did you mean {closest!r}?' if closest else ''}{more}"
    if first["type"] == "value_error":  # of a check of ours, which names the value
        return f"{f'{field}: ' if field else ''}{first['ctx']['error']}{more}"
    value = _SHORT.repr(first["input"])
    reason = _WORDS.get(first["type"]) or first["msg"][:1].lower() + first["msg"][1:]
    return f"{f'{field}={value}' if field else value}: {reason}{more}"


def _names(schema: Any) -> Iterator[str]:
    """The names of all fields in a JSON schema."""
    if isinstance(schema, dict):
        yield from schema.get("properties", {})
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _names(part)


# What JSON calls it.
_WORDS: Final = {
    **dict.fromkeys(("model_type", "dataclass_type", "dict_type", "mapping_type"), "input should be an object"),
    **dict.fromkeys(("list_type", "tuple_type"), "input should be a list"),
}
_STRICT: Final = ConfigDict(strict=True, allow_inf_nan=False)
_ADAPTERS: Final[dict[Any, TypeAdapter[Any]]] = {}
