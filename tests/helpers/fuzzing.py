"""Generated inputs, the same in every run: words, JSON documents with a part changed, bytes with damage."""

import contextlib
import copy
import functools
import io
import os
import re
import signal
import threading
from collections import Counter

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from diffusion_gym.agents.cli import main

HANGS_AFTER = 60  # seconds


TIMES = int(os.environ.get("FUZZ_TIMES", "1"))  # what `python -m tests.fuzz` multiplies the examples with
TRIED = Counter()  # inputs so far, by the name of the test


def bounded(examples):
    """Decorates a fuzz test: so many examples, always the same ones, however slow the machine."""
    unhealthy = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    chosen = settings(
        max_examples=examples * TIMES,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # a failure is shown as it was drawn: to make it small takes minutes
        suppress_health_check=unhealthy,
    )

    def decorated(test):
        inner = test.hypothesis.inner_test
        name = inner.__qualname__.partition(".")[0]

        @functools.wraps(inner)
        def counted(*arguments, **keywords):
            TRIED[name] += 1
            return inner(*arguments, **keywords)

        test.hypothesis.inner_test = counted
        return chosen(test)

    return decorated


class Stopped(Exception):
    """Raised by what stands for everything expensive: so far all was well."""


def _stop(*args, **keywords):
    raise Stopped


def stop_what_is_expensive(monkeypatch):
    """No weights are loaded, nothing is trained, served or fetched: `Stopped` in its place."""
    for place in (
        "diffusion_gym.envs.vector.load_model",
        "diffusion_gym.agents.benchmark.command.run_local",
        "diffusion_gym.agents.benchmark.command.run_ray",
        "diffusion_gym.agents.training.reward_options.serve",
        "socket.socket.connect",
        "socket.getaddrinfo",
    ):
        monkeypatch.setattr(place, _stop)


@contextlib.contextmanager
def no_hang():
    """Fail, instead of waiting for ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def fail(signum, frame):
        raise AssertionError(f"no end after {HANGS_AFTER} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(HANGS_AFTER)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def command(arguments):
    """What a command line comes to: None where it works, else its one line of error."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()), no_hang():
        try:
            main([str(argument) for argument in arguments])
        except Stopped:
            return None
        except SystemExit as ended:
            if not ended.code:
                return None
            code = ended.code
        else:
            return None
    error = errors.getvalue()
    assert code == 2, (code, error)
    assert error.startswith("error: ") and error.count("\nerror: ") == 0, error
    assert not re.search(r"[Ii]nvalid literal|could not convert|Got errors|Exceeds", error), error
    assert "Traceback" not in error, error
    assert len(error) < 5_000, error[:500]
    return error


NUMBERS = st.sampled_from(["-1", "0", "1", "2", "0.5", "1e-30", "1e400", "nan", "inf", "-inf", "9" * 20, "9" * 5000])
ODD = st.sampled_from(
    ["", " ", "-", "--", "=", "--seed", "None", "null", "true", "{}", "[]", "[" * 200, '{"a": 1}', "a=b", "../..", "\n"]
    + ["\x1b[31m", "\udcff", "٣", "1_000", "é" * 300, "%s", "{0}", "x" * 10_000, "~", "/dev/null", "NaN", "0x10"]
)
TEXT = st.text(st.characters(exclude_characters="\x00", codec="utf-8"), max_size=8)
WORDS = st.one_of(NUMBERS, ODD, TEXT)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2**63, 10**400, -(10**30), 0.5, 1e308, -1e-30, float("nan"), float("inf")]),
    TEXT,
    st.sampled_from(["", "../..", "a/b", "x" * 2000, "nan", "1", "\x1b[31m"]),
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=5
)


@st.composite
def changed(draw, document):
    """A JSON document in which one part, at any depth, is something else, missing or new."""
    document = copy.deepcopy(document)
    holder, key = None, None
    part = document
    while isinstance(part, dict | list) and part and draw(st.integers(0, 4)):
        keys = list(part) if isinstance(part, dict) else range(len(part))
        holder, key = part, draw(st.sampled_from(list(keys)))
        part = part[key]
    what = draw(st.sampled_from(["replaced", "removed", "added"]))
    if what == "removed" and holder is not None:
        del holder[key]
    elif what == "added" and isinstance(part, dict):
        part[draw(TEXT)] = draw(JSON)
    elif what == "added" and isinstance(part, list):
        part.append(draw(JSON))
    elif holder is None:
        return draw(JSON)
    else:
        holder[key] = draw(JSON)
    return document


@st.composite
def damaged(draw, data):
    """Bytes of which some are others, missing or new."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)) | st.integers(0, min(200, max(0, len(data) - 1))))
        some = draw(st.binary(min_size=1, max_size=8))
        what = draw(st.sampled_from(["other", "missing", "new", "cut"]))
        if what == "other":
            data[at : at + len(some)] = some
        elif what == "missing":
            del data[at : at + len(some)]
        elif what == "new":
            data[at:at] = some
        else:
            del data[at:]
    return bytes(data)
