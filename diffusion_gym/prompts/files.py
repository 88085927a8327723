"""Prompt files: .txt with a prompt a line, and .jsonl with an object a line. docs/prompts.md shows both."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import ConfigDict, Field, JsonValue, StringConstraints

from diffusion_gym.prompts.base import PromptSet
from diffusion_gym.schemas import Schema, checked, parse_checked

_OBJECT: Final = '{"prompt": "..."}'
_NEW: Final[Mapping[str, str]] = {".txt": "one prompt a line", ".jsonl": f"one {_OBJECT} a line"}
# A line of Python that writes a prompt file from one of another kind; its [:] fails for an object, whose keys are none.
_CONVERT: Final = 'open({new!r}, "w").writelines(json.dumps({entry}) + "\\n" for row in {rows})'
_TABLE: Final = '{"prompt": row["Prompts"], "category": row["Category"]}'
_ROWS: Final[Mapping[str, tuple[str, str]]] = {
    ".json": ('row if isinstance(row, dict) else {"prompt": row}', "json.load(open({old!r}))[:]"),
    ".csv": (_TABLE, "csv.DictReader(open({old!r}))"),
    ".tsv": (_TABLE, 'csv.DictReader(open({old!r}), delimiter="\\t")'),
}
_FILE: Final = re.compile(r"(?P<file>.+?\.(?:txt|jsonl))/(?P<split>[^/]+)", re.IGNORECASE)


class _Line(Schema):
    """A line of a .jsonl file; keys other than these are the prompt's metadata."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]

    prompt: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
    held_out: Annotated[str, Field(pattern="^[^/]+$")] | None = None


def names_prompt_file(name: str) -> bool:
    """Whether `name` is that of a prompt file, also of a kind that was one, or of its split; it need not exist."""
    kinds = {Path(part).suffix.lower() for part in (name, name.partition("#")[0])}
    return not kinds.isdisjoint({*_NEW, *_ROWS}) or _FILE.fullmatch(name) is not None


def read_prompt_file(name: str) -> PromptSet:
    """Read a prompt file.

    Args:
        name: a path that ends in .txt or .jsonl; after a `/`, a held-out split, or `held-out` for all held-out prompts.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it is no prompt file, it is empty, or it has no such split.
    """
    path, kind = Path(name), Path(name).suffix.lower()
    if kind not in _NEW and (part := _FILE.fullmatch(name)):
        return read_prompt_file(part["file"]).split(part["split"])
    if kind not in _NEW:
        raise ValueError(f"prompts={name!r} {_other_kind(name)}")
    if path.is_dir():
        raise FileNotFoundError(f"prompts={name!r} is a directory; name a prompt file in it")
    if not path.is_file():
        raise FileNotFoundError(
            f"prompts={name!r} is no file; mend the path, or write {_NEW[kind]}; see docs/prompts.md"
        )
    try:
        return _prompt_set(name, _read(path, kind, f"prompts={name!r}"), path.name)
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts={name!r} is not UTF-8 from byte {error.start} on; save it as UTF-8") from error


def prompt_list(prompts: Sequence[str | Mapping[str, Any]]) -> PromptSet:
    """The prompts of a Python list, as strings or as the objects of a .jsonl file.

    Raises:
        ValueError: an entry is neither, or the list is empty.
    """
    lines = []
    for index, entry in enumerate(prompts):
        where = f"prompts[{index}]"
        if isinstance(entry, str):
            lines.append((where, _Line.model_construct(prompt=str(entry))))  # the empty prompt may be one
        elif isinstance(entry, Mapping):
            lines.append((where, checked(_Line, dict(entry), where, f"write {_OBJECT}")))
        else:
            raise ValueError(f"{where}={entry!r} is no string; write a string, or {_OBJECT}")
    return _prompt_set("custom", lines, "")


def _other_kind(name: str) -> str:
    """What is wrong with a name that is not that of a .txt or .jsonl file, and the remedy."""
    old, mark, part = name.partition("#")
    path, kind = Path(old), Path(old).suffix.lower()
    if kind in _NEW:
        return f"has a {mark}: a held-out split stands after a /; write {f'{old}/{part}'!r}"
    entry, rows = _ROWS[kind]
    line = _CONVERT.format(new=str(path.with_suffix(".jsonl")), entry=entry, rows=rows.format(old=old))
    return f"is of a kind that is not read; write a .jsonl file (docs/prompts.md), as by\n    import csv, json; {line}"


def _read(path: Path, kind: str, name: str) -> Iterator[tuple[str, _Line]]:
    # Not str.splitlines, which also ends a line within a JSON string at U+2028.
    with path.open(encoding="utf-8-sig") as file:
        for number, text in enumerate(file, 1):
            where = f"{name}, line {number}"
            if not text.strip():
                continue
            if kind == ".txt":
                yield where, _Line.model_construct(prompt=text.strip())
            else:
                yield where, parse_checked(_Line, text, where, f"write {_NEW[kind]}")


def _prompt_set(name: str, lines: Iterable[tuple[str, _Line]], source: str) -> PromptSet:
    prompts: list[str] = []
    splits: dict[str, list[str]] = {}
    metadata: dict[str, dict[str, Any]] = {}
    for where, line in lines:
        (prompts if line.held_out is None else splits.setdefault(line.held_out, [])).append(line.prompt)
        told = line.model_extra or {}
        if metadata.setdefault(line.prompt, told) != told:
            raise ValueError(
                f"{where}: prompt={line.prompt!r} stands there before with other keys or values beside it; give it "
                "the same in each line, or leave the line out"
            )
    return PromptSet(
        name,
        tuple(prompts),
        splits={split: tuple(part) for split, part in splits.items()},
        source=source,
        metadata={prompt: told for prompt, told in metadata.items() if told},
    )
