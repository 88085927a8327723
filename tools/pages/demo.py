"""The tables of the demo and of the embedded model.

diffusion-gym demo --seed 0 --out runs/demo-seed-0                # and seeds 1 and 2
python -m tools.pages.demo runs/demo-seed-0 runs/demo-seed-1 runs/demo-seed-2    # take the runs' numbers over
python -m tools.pages                                                            # write the tables
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from textwrap import wrap
from typing import Any, Final

from PIL import Image

from diffusion_gym.agents.training.pictures import cells
from diffusion_gym.agents.training.records import read_metrics
from diffusion_gym.agents.training.run_files import read_evaluation
from diffusion_gym.storage import json_text, write_bytes

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
PAGES = {
    "README.md": ("demo result",),
    "docs/first-minutes.md": ("demo",),
    "docs/embedded-model.md": ("model", "flow model"),
}
_PAIRS: Final = 8  # of the picture
CARDS = {"model": "shapes", "flow model": "shapes_flow"}


def take_over(runs: list[Path]) -> None:
    """Copy the runs' evaluations and the first one's pictures."""
    for run in runs:
        result = json.loads((run / "eval.json").read_text())
        config = json.loads((run / "config.json").read_text())["settings"]
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        seconds = sum(row["seconds"] for row in rows)
        left_out = ("prompts", "shown", "probe")
        kept = {key: value for key, value in result.items() if key not in left_out}
        kept["held_out"] = {key: value for key, value in result["held_out"].items() if key not in left_out}
        kept |= {"train_seed": config["seed"], "minutes": seconds / 60}
        kept["images_per_second"] = result["reward_queries"] / seconds
        (RESULTS / f"demo-seed-{config['seed']}.json").write_text(json_text(kept, indent=2) + "\n")
    write_bytes(ROOT / "docs" / "images" / "demo.png", summary_picture(runs[0]))


def summary_picture(run: Path) -> bytes:
    """One picture of a run, a PNG: its learning curve beside pairs of pictures with prompts, and marks of success.

    Args:
        run: an evaluated run folder, of a strict reward or with strict success beside the reward.
    """
    from matplotlib.figure import Figure

    evaluation, rows = read_evaluation(run), read_metrics(run / "metrics.jsonl")
    if evaluation is None or "shown" not in evaluation or "success" not in evaluation:
        raise ValueError(f"{run} has no evaluation with strict success; run diffusion-gym eval {run}")
    shown = evaluation["shown"]["pictures"][:_PAIRS]
    number, size = len(evaluation["shown"]["pictures"]), evaluation["shown"]["size"]
    grids = [cells(Image.open(run / "images" / f"{name}.png"), size, number) for name in ("before", "after")]
    figure = Figure(figsize=(11, 3.6), dpi=100, layout="constrained", facecolor="white")
    chart, right = figure.subfigures(1, 2, width_ratios=(3, 8))
    axes = chart.subplots()
    success = [row["success_mean"] for row in rows]
    axes.plot([row["reward_queries"] for row in rows], success, color="#1f5fc4", linewidth=2)
    axes.axhline(evaluation["base_success"], color="#59636e", linestyle=":")
    axes.set(xlabel="pictures scored", ylabel="strict success", ylim=(0, 1), title="learning curve")
    axes.spines[["top", "right"]].set_visible(False)
    places = right.subplots(2, _PAIRS)
    for column, row in enumerate(shown):
        for line, (grid, key) in enumerate(zip(grids, ("base_success", "success"), strict=True)):
            place, passed = places[line][column], row[key] == 1
            place.imshow(grid[column], interpolation="nearest")
            place.set(xticks=[], yticks=[])
            place.spines[:].set(color="#0b6b3a" if passed else "#b02020", linewidth=3)
            place.set_xlabel("\N{CHECK MARK}" if passed else "\N{BALLOT X}", color="#0b6b3a" if passed else "#b02020")
            if not column:
                place.set_ylabel(("before", "after")[line])
        places[0][column].set_title("\n".join(wrap(row["prompt"], 14)), fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def demo_table() -> str:
    """One row a seed of the demo."""
    lines = [
        "| seed | strict success before | after | held-out before | after | KL to base, nats | minutes | images/s |",
        "|---" * 8 + "|",
    ]
    for path in sorted(RESULTS.glob("demo-seed-*.json")):
        result = json.loads(path.read_text())
        held = result["held_out"]
        cells = [
            str(result["train_seed"]),
            *(_share(result, key) for key in ("base_success", "success")),
            *(_share(held, key) for key in ("base_success", "success")),
            f"{result['kl_to_base']:.0f}",
            f"{result['minutes']:.1f}",
            f"{result['images_per_second']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def demo_result() -> str:
    """One sentence: what the demo of seed 0 reaches."""
    result = json.loads((RESULTS / "demo-seed-0.json").read_text())
    return (
        f"Strict success (the whole caption holds) rises from {_share(result, 'base_success')} to "
        f"{_share(result, 'success')}, 95 % intervals, in {result['minutes']:.1f} minutes on two CPU cores."
    )


def _share(result: dict[str, Any], key: str) -> str:
    low, high = result[f"{key}_ci95"]
    return f"{result[key]:.2f} ({low:.2f} to {high:.2f})"


def model_table(model: str) -> str:
    """The table of success rates in the card of an embedded model."""
    card = ROOT / "diffusion_gym" / "models" / model / "weights" / "README.md"
    lines = [line for line in card.read_text().splitlines() if line.startswith("|")]
    start = next(index for index, line in enumerate(lines) if line.startswith("| guidance"))
    return "\n".join(lines[start:])


def parts() -> dict[str, str]:
    """The marked parts, by name."""
    tables = {name: model_table(model) for name, model in CARDS.items()}
    return {"demo": demo_table(), "demo result": demo_result(), **tables}


if __name__ == "__main__":
    take_over([Path(argument) for argument in sys.argv[1:]])
