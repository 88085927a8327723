"""How much memory a training gains with each iteration: `python -m tests.chaos.memory --agents ddpo_is rwr`."""

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# As in __main__.py: before NumPy and torch.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import numpy as np
import tyro

from diffusion_gym.agents.algorithms import AGENTS
from diffusion_gym.agents.report.marked import markdown_table, write_marked
from run_folders import metrics_lines
from tests.chaos.programs import warm_up
from tests.chaos.rows import PAGE
from tests.chaos.trials import Place


@dataclass(frozen=True)
class Options:
    """Train agents in a tiny environment, and read the memory of the process at each iteration."""

    agents: tuple[str, ...] = tuple(AGENTS)
    """Which agents."""
    iterations: int = 600
    """Iterations of each; the first third is left out, in which caches fill and libraries load."""
    samples: int = 4
    """Trajectories of an iteration."""
    track: str = "tensorboard"
    """Where the numbers are shown, as in `train`."""
    write: bool = False
    """Write the table into docs/reliability.md."""


def main(options: Options) -> None:
    """Print a line for each agent."""
    warm_up()
    rows = []
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        os.environ["XDG_DATA_HOME"] = folder + "/data"
        place = Place(Path(folder))
        for agent in options.agents:
            found = measured(place, agent, options)
            slope, first, last = growth(found)
            rows.append((agent, str(options.iterations), f"{first / 1024:.1f}", f"{last / 1024:.1f}", f"{slope:.1f}"))
            print(f"{agent}: {first / 1024:.1f} -> {last / 1024:.1f} MB, {slope:.1f} kB an iteration", flush=True)
    table = markdown_table(("agent", "iterations", "MB after a third", "MB at the end", "kB an iteration"), rows)
    print(table)
    if options.write:
        write_marked(PAGE, {"memory": table})


def measured(place, agent, options):
    """Pairs of an iteration and the kB that the process has of its own then, `(n, 2)`."""
    out = place.folder / agent
    more = {
        "--total-reward-queries": options.iterations * options.samples,
        "--samples-per-iteration": options.samples,
        "--checkpoint-every": 50,
        "--pictures-every": 0,
        "--track": options.track,
    }
    program, found = place.train(agent, out, *(part for pair in more.items() for part in pair)), {}
    while program.running:
        found[len(metrics_lines(out))] = program.own_kilobytes or max(found.values(), default=0)
        program.sleep(0.2)
    if program.code:
        raise SystemExit(f"{agent} failed: {program.printed[-2000:]}")
    return np.array(sorted(found.items()), dtype=float)


def growth(found):
    """The slope in kB an iteration after the first third, and the first and last kB there."""
    late = found[(found[:, 0] >= found[-1, 0] / 3) & (found[:, 0] < found[-1, 0])]  # not the export at the end
    slope = float(np.polyfit(late[:, 0], late[:, 1], 1)[0])
    return slope, late[0, 1], late[-1, 1]


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m tests.chaos.memory"))
