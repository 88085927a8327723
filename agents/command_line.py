"""Options of a command from its words: tyro reads them, and a mistake is told in one line."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any, Final, TypeVar

import tyro

T = TypeVar("T")
HELP: Final = {"-h", "--help"}
# Words of Python and of tyro for a value that is of another type.
_FOREIGN: Final = (
    (re.compile(r"invalid literal for int\(\) with base 10: (.*)", re.S), r"\1 is no whole number"),
    (re.compile(r"could not convert string to float: (.*)", re.S), r"\1 is no number"),
    (re.compile(r"no type matching (.*) could be instantiated from (.*)\. Got errors:.*", re.S), r"\2 must be \1"),
    (re.compile(r"Exceeds the limit \(\d+ digits\) for integer string conversion.*", re.S), "it has too many digits"),
)


def parsed(
    kind: type[T], args: Sequence[str], command: str, default: T | None = None, *, explained: str = "--help"
) -> T:
    """The options `kind` that the words after `diffusion-gym COMMAND` stand for; `--help` ends the program.

    Args:
        kind: a dataclass of options.
        args: the words.
        command: the command.
        default: the options where the words say nothing; None for the dataclass's own defaults.
        explained: the word by which the command explains every option.

    Raises:
        ValueError: the words are not options of the command, or a value is not one of the option.
    """
    prog, told = f"diffusion-gym {command}", io.StringIO()
    known: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with redirect_stderr(told), _one_line(not HELP.intersection(args)):
            options = tyro.cli(kind, args=list(args), prog=prog, **known)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(f"{_sentence(told.getvalue())}; `{prog} {explained}` explains every option") from None
    sys.stderr.write(told.getvalue())
    return options


@contextmanager
def _one_line(wanted: bool) -> Iterator[None]:
    """Have tyro break no line, whatever the terminal's width."""
    before = os.environ.get("COLUMNS")
    if wanted:
        os.environ["COLUMNS"] = "100000"
    try:
        yield
    finally:
        if before is not None:
            os.environ["COLUMNS"] = before
        elif wanted:
            del os.environ["COLUMNS"]


def _sentence(box: str) -> str:
    """What tyro says in a box, below its title and up to the first rule: after it comes the help.

    The box is of lines or, where the output is not UTF-8, of hyphens.
    """
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip().strip("│").strip() for line in box.splitlines()]
    rules = [index for index, line in enumerate(lines) if re.fullmatch(r"╭.*╮|╰?─+╯?|-{3,}", line)] + [len(lines)]
    text = " ".join(filter(None, lines[rules[0] + 1 : rules[1]])) if len(rules) > 1 else " ".join(lines)
    text = re.sub(r"^(agent|env)-options: ", "", text.removeprefix("Error parsing ").removesuffix("."))
    for pattern, ours in _FOREIGN:
        text = pattern.sub(ours, text)
    return text
