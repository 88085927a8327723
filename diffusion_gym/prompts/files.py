"""Prompt files: text, JSON, JSON lines and tables. docs/prompts.md shows each form."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from diffusion_gym.prompts.base import HELD_OUT, PromptSet
from diffusion_gym.prompts.templates import template_set
from diffusion_gym.storage import parse_json, read_json

_FORMS: Final = (
    'a list of prompts, a list of {"prompt": "...", "category": "..."}, {"prompts": [...], "held_out": [...]}, '
    '{"PROMPT": {"category": "..."}} or {"template": "a(n) {animal}", "animal": [...]}'
)


_SURPLUS: Final = "\0surplus"  # the cells of a row beyond the columns; no column is called so

# What to write where there is no file yet.
_NEW_FILE: Final[Mapping[str, str]] = {
    ".txt": "one prompt a line",
    ".json": "a list of prompts",
    ".jsonl": 'one {"prompt": "..."} a line',
    ".csv": "a table with a column named 'Prompts'",
    ".tsv": "a table with a column named 'Prompts'",
}


@dataclass(frozen=True)
class _Entry:
    prompt: str
    category: str = ""


@dataclass(frozen=True)
class _Content:
    entries: Sequence[_Entry]
    held_out: tuple[str, ...] = ()
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def is_prompt_file(name: str) -> bool:
    """Whether `name` is that of a prompt file, which need not exist: `drawbench.json`, `drawbench.json#Colors`."""
    return _parts(name)[0].suffix.lower() in _READERS


def read_prompt_file(name: str) -> PromptSet:
    """Read a prompt file.

    Args:
        name: a path that ends in .txt, .json, .jsonl, .csv or .tsv; after a `#`, a category, a held-out split, or
            `held-out` for all held-out prompts.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it is no prompt file, it is empty, or it has no such part.
    """
    path, part = _parts(name)
    if not path.is_file():
        if path.is_dir():
            raise FileNotFoundError(f"prompts={name!r} is a directory; name a prompt file in it")
        form = _NEW_FILE[path.suffix.lower()]
        raise FileNotFoundError(f"prompts={name!r} is no file; mend the path, or write {form}; see docs/prompts.md")
    try:
        content = _READERS[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts={name!r} is not UTF-8 from byte {error.start} on; save it as UTF-8") from error
    except ValueError as error:
        raise ValueError(f"prompts={name!r}: {error}") from error
    prompts = tuple(entry.prompt for entry in content.entries)
    whole = PromptSet(name, prompts, content.held_out, content.splits, source=path.name)
    return _select(whole, content, part) if part else whole


def _parts(name: str) -> tuple[Path, str]:
    path, _, part = name.partition("#")
    return (Path(name), "") if os.path.isfile(name) else (Path(path), part)  # no error for a long prompt


def _select(whole: PromptSet, content: _Content, part: str) -> PromptSet:
    chosen = tuple(entry.prompt for entry in content.entries if entry.category.lower() == part.lower())
    if chosen:
        return PromptSet(whole.name, chosen, source=whole.source)
    splits = {HELD_OUT: whole.held_out, **whole.splits} if whole.held_out else {}
    if part in splits:
        return PromptSet(whole.name, splits[part], source=whole.source)
    known = [*dict.fromkeys(entry.category for entry in content.entries if entry.category), *splits]
    there = f"choose one of {', '.join(known)}" if known else "the file has neither; leave the part after # out"
    raise ValueError(f"prompts={whole.name!r} has no category or held-out split {part!r}; {there}")


def _text(path: Path) -> _Content:
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    return _Content([_Entry(line.strip()) for line in lines if line.strip()])


def _json(path: Path) -> _Content:
    value = read_json(path)
    if isinstance(value, list):
        return _Content(_entries(value, "entry"))
    if not isinstance(value, dict):
        raise ValueError(f"the file holds {_show(value)}, which is no list and no object; write {_FORMS}")
    if "template" in value:
        return _from_template(value)
    if "prompts" in value:
        return _from_lists(value)
    if value and all(isinstance(entry, dict) for entry in value.values()):  # the form of DPOK's DrawBench file
        items = [{**entry, "prompt": prompt} for prompt, entry in value.items()]
        return _Content(_entries(items, "entry"))
    raise ValueError(f"the object has neither 'prompts' nor 'template', but {_show(list(value))}; write {_FORMS}")


def _json_lines(path: Path) -> _Content:
    entries: list[_Entry] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if line.strip():
            try:
                value = parse_json(line)
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON ({error}); write one object a line") from error
            entries += _entries([value], "line", number)
    return _Content(entries)


def _table(path: Path) -> _Content:
    with path.open(encoding="utf-8-sig", newline="") as file:
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        reader = csv.DictReader(file, delimiter=delimiter, restkey=_SURPLUS, strict=True)
        try:
            rows = [_whole(row, reader.line_num) for row in reader]
        except csv.Error as error:
            raise ValueError(
                f"the table cannot be read at line {reader.line_num} ({error}); a cell that begins with a quote ends "
                f'with one, has "" for each one inside, and holds at most {csv.field_size_limit()} characters'
            ) from error
    columns = {str(column).strip().lower(): column for column in (rows[0] if rows else {})}
    prompt = columns.get("prompts", columns.get("prompt"))
    if not rows:
        return _Content([])
    if prompt is None:
        raise ValueError(f"the table has the columns {_show(list(rows[0]))} but none named 'Prompts'; name it so")
    items = [{"prompt": row[prompt] or "", "category": row.get(columns.get("category", "")) or ""} for row in rows]
    return _Content(_entries(items, "row"))


def _whole(row: dict[str, Any], line: int) -> dict[str, Any]:
    """The row of a table, whose cells are as many as the columns, else a prompt was cut at its comma."""
    surplus = [cell for cell in row.pop(_SURPLUS, ()) if cell.strip()]
    if surplus:
        raise ValueError(
            f"line {line} has more cells than the table has columns ({_show(surplus[0].strip())} is left over); "
            'quote the prompt: "a cat, a dog"'
        )
    return row


_READERS: Final[Mapping[str, Callable[[Path], _Content]]] = {
    ".txt": _text,
    ".json": _json,
    ".jsonl": _json_lines,
    ".csv": _table,
    ".tsv": _table,
}


def _entries(items: Iterable[Any], kind: str, start: int = 1) -> list[_Entry]:
    entries = []
    for number, item in enumerate(items, start):
        item = {"prompt": item} if isinstance(item, str) else item
        if not isinstance(item, dict):
            raise ValueError(f"{kind} {number} is {_show(item)}; write a string or an object with 'prompt'")
        prompt, category = item.get("prompt"), item.get("category", "")
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{kind} {number} has the 'prompt' {_show(prompt)}; write a string that is not empty")
        if not isinstance(category, str):
            raise ValueError(f"{kind} {number} has the 'category' {_show(category)}; write a string")
        entries.append(_Entry(prompt.strip(), category.strip()))
    return entries


def _from_lists(value: Mapping[str, Any]) -> _Content:
    _only(value, ("prompts", "held_out"))
    entries = _entries(_list(value["prompts"], "'prompts'"), "entry")
    held_out = value.get("held_out", {})
    if not isinstance(held_out, dict):
        return _Content(entries, _prompts(held_out, "'held_out'"))
    splits = {split: _prompts(part, f"'held_out', split {split!r},") for split, part in held_out.items()}
    return _Content(entries, splits=splits)


def _from_template(value: Mapping[str, Any]) -> _Content:
    template, held_out = value["template"], value.get("held_out", {})
    if not isinstance(template, str):
        raise ValueError(f"'template' is {_show(template)}; write a string such as 'a(n) {{animal}}'")
    words = {key: _strings(part, repr(key)) for key, part in value.items() if key not in ("template", "held_out")}
    if not isinstance(held_out, dict) or not all(isinstance(part, dict) for part in held_out.values()):
        raise ValueError(
            f"'held_out' is {_show(held_out)}; with a template, write the lists that differ by split: "
            '{"new-animals": {"animal": [...]}}'
        )
    changed = {
        split: {key: _strings(part, f"'held_out', list {key!r},") for key, part in lists.items()}
        for split, lists in held_out.items()
    }
    made = template_set("template", template, words, changed)
    return _Content([_Entry(prompt) for prompt in made.prompts], splits=made.splits)


def _prompts(value: Any, what: str) -> tuple[str, ...]:
    return tuple(entry.prompt for entry in _entries(_list(value, what), f"{what} entry"))


def _strings(value: Any, what: str) -> tuple[str, ...]:
    for entry in _list(value, what):
        if not isinstance(entry, str) or not entry.strip():
            raise ValueError(f"{what} holds {_show(entry)}; write strings that are not empty")
    return tuple(entry.strip() for entry in value)


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{what} is {_show(value)}; write a list that is not empty")
    return value


def _only(value: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = [key for key in value if key not in known]
    if unknown:
        raise ValueError(f"the key {unknown[0]!r} is unknown beside 'prompts'; known: {', '.join(known)}")


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
