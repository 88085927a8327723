"""All fuzz tests with many more inputs than in CI, counted: `python -m tests.fuzz --times 4`."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tyro

from diffusion_gym.agents.report.marked import markdown_table, write_marked

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "reliability.md"


@dataclass(frozen=True)
class Options:
    """Run the fuzz tests; the same inputs come in every run of as many."""

    times: int = 4
    """How many times the inputs of CI."""
    write: bool = False
    """Write the table into docs/reliability.md."""


class Outcomes:
    """A plugin of pytest: what each test is for, and which failed."""

    def __init__(self):
        self.about, self.failed = {}, set()

    def pytest_collection_modifyitems(self, items):
        for item in items:
            about = " ".join((item.function.__doc__ or item.module.__doc__).split())
            self.about[item.originalname] = f"{Path(item.path).stem}: {about}"

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.add(report.location[2].partition("[")[0])


def main(options: Options) -> int:
    """Run them and print the table; the exit code is pytest's."""
    os.environ["FUZZ_TIMES"] = str(options.times)
    outcomes = Outcomes()
    code = pytest.main([*map(str, sorted(TESTS.glob("test_fuzz_*.py"))), "-p", "no:cacheprovider"], [outcomes])
    from fuzzing import TRIED

    rows = [(name.removeprefix("test_").replace("_", " "), str(TRIED[name]), name in outcomes.failed) for name in TRIED]
    rows = [(name, tried, "a failure" if failed else "0") for name, tried, failed in rows]
    total = str(sum(TRIED.values()))
    table = markdown_table(
        ("what is generated", "inputs", "tracebacks, hangs, silent effects"),
        [*rows, ("all", total, str(len(outcomes.failed)))],
    )
    print(table)
    if options.write:
        write_marked(PAGE, {"fuzz": table})
    return int(code)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, prog="python -m tests.fuzz")))
