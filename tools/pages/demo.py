"""The tables of the demo and of the embedded model.

diffusion-gym demo --seed 0 --out runs/demo-seed-0                # and seeds 1 and 2
python -m tools.pages.demo runs/demo-seed-0 runs/demo-seed-1 runs/demo-seed-2    # take the runs' numbers over
python -m tools.pages                                                            # write the tables
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion_gym.storage import json_text

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
PAGES = {
    "README.md": ("demo result",),
    "docs/first-minutes.md": ("demo",),
    "docs/embedded-model.md": ("model", "flow model"),
}
CARDS = {"model": "shapes", "flow model": "shapes_flow"}


def take_over(runs: list[Path]) -> None:
    """Copy the runs' evaluations and the first one's pictures."""
    for run in runs:
        result = json.loads((run / "eval.json").read_text())
        config = json.loads((run / "config.json").read_text())["settings"]
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        seconds = sum(row["seconds"] for row in rows)
        left_out = ("prompts", "shown")
        kept = {key: value for key, value in result.items() if key not in left_out}
        kept["held_out"] = {key: value for key, value in result["held_out"].items() if key not in left_out}
        kept |= {"train_seed": config["seed"], "minutes": seconds / 60}
        kept["images_per_second"] = result["reward_queries"] / seconds
        (RESULTS / f"demo-seed-{config['seed']}.json").write_text(json_text(kept, indent=2) + "\n")
    sheets = [Image.open(runs[0] / "images" / f"{name}.png") for name in ("before", "after")]
    gap = 24
    picture = Image.new("RGB", (sum(s.width for s in sheets) + gap, sheets[0].height), "white")
    picture.paste(sheets[0], (0, 0))
    picture.paste(sheets[1], (sheets[0].width + gap, 0))
    picture.save(ROOT / "docs" / "images" / "demo.png", optimize=True)


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
        f"{_share(result, 'success')}, 95 % intervals, in {result['minutes']:.0f} minutes on two CPU cores."
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
