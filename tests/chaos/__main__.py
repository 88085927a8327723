"""Break runs at random moments and compare what is resumed with what was never broken: `python -m tests.chaos`.

Rows are kept as they come, so that the command can be stopped and goes on; docs/reliability.md shows the table.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

# Before NumPy and torch: without threads of their own this process can be forked.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import tyro

from diffusion_gym.agents.training.folders import holding
from tests.chaos.programs import Hangs, warm_up
from tests.chaos.rows import ROWS, append_row, faults, read_rows, table, write_page
from tests.chaos.trials import KINDS, Broken, NotHere, Place


@dataclass(frozen=True)
class Options:
    """Trials of every kind until each has been tried so often."""

    trials: int = 20
    """Trials of each kind, those of earlier calls included."""
    kinds: tuple[str, ...] = ()
    """Only these kinds, or those that begin so; by default all."""
    seed: int = 0
    """What is broken and when; a trial's draws depend on it, its kind and its number alone."""
    minutes: float = 1e9
    """Begin no trial after so many minutes."""
    out: Path = field(default_factory=lambda: Path("build/chaos"))
    """Where the rows go, and the folders of trials that did not hold."""
    write: bool = False
    """Write the table into docs/reliability.md; with `--trials 0` nothing else."""


def main(options: Options) -> int:
    """Run what is missing, print the table; the exit code is 1 where a trial did not hold."""
    kinds = [kind for kind in KINDS if not options.kinds or kind.startswith(options.kinds)]
    if not kinds:
        raise SystemExit(f"error: kinds={options.kinds!r} names none of {', '.join(KINDS)}")
    with holding(options.out.absolute()):
        _run(options, kinds)
    rows = read_rows(options.out / ROWS)
    print(table(rows, KINDS))
    if options.write:
        write_page(rows, KINDS)
    print(faults(rows), end="")
    return int(not all(row["held"] for row in rows))


def _run(options: Options, kinds: list[str]) -> None:
    deadline = time.monotonic() + 60 * options.minutes
    done = {(row["kind"], row["trial"]) for row in read_rows(options.out / ROWS)}
    # Round by round, so that an early stop leaves some of each.
    todo = [(kind, trial) for trial in range(options.trials) for kind in kinds if (kind, trial) not in done]
    if not todo:
        return
    warm_up()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the `finally` that ends the programs
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        os.environ["XDG_DATA_HOME"] = folder + "/data"
        place, missing = Place(Path(folder)), set()
        for kind, trial in todo:
            if kind in missing or time.monotonic() > deadline:
                continue
            try:
                row = _try(place, kind, trial, options)
            except NotHere as error:
                print(f"{kind}: cannot be tried here: {error}", flush=True)
                missing.add(kind)
                continue
            append_row(options.out / ROWS, row)
            print(f"{kind} {trial}: {'held' if row['held'] else 'FAULT'}; {row['told']}", flush=True)


def _try(place: Place, kind: str, trial: int, options: Options) -> dict:
    started, fault = time.monotonic(), None
    rng = random.Random(f"{options.seed} {kind} {trial}")
    with place.trial() as (folder, told):
        try:
            KINDS[kind](place, folder, rng, told)
        except (Broken, Hangs) as error:
            fault = str(error)
            kept = options.out / "faults" / f"{kind.replace(' ', '-')}-{trial}"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(folder, kept, symlinks=True)
            told.append(f"{fault} (see {kept})")
    return {
        "kind": kind,
        "trial": trial,
        "seed": options.seed,
        "held": fault is None,
        "fault": fault,
        "told": "; ".join(told),
        "seconds": round(time.monotonic() - started, 1),
    }


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, prog="python -m tests.chaos")))
