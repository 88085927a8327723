"""What the layout of networks in memory does on a CPU: channels last, as models are loaded there, over channels first.

    python benchmarks/layout.py          # prints the table
    python benchmarks/layout.py --page   # writes it to docs/speed.md

Both layouts run in turn, in an order that turns each time; a ratio is the median over rounds, taken within a round, of
CPU seconds, with its quartiles. The pipelines are the embedded one and one of Stable Diffusion's architecture.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import tyro

from diffusion_gym.agents.report.marked import markdown_table, write_marked
from diffusion_gym.models import load_model
from diffusion_gym.testing.random_pipeline import write_pipeline

ROOT: Final = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Options:
    """Compare the two layouts on one thread."""

    rounds: int = 40
    """Rounds."""
    batches: tuple[int, ...] = (4, 16)
    """Transitions at once; guidance doubles them."""
    page: bool = False
    """Write the table to docs/speed.md instead of printing it."""


def layouts(source: str) -> dict[str, Any]:
    """A model as it is loaded on a CPU, and a copy with its networks laid out channels first."""
    model: Any = load_model(source, "cpu", "float32")
    first = copy.deepcopy(model)
    for network in (first.unet, first.vae):
        network.to(memory_format=torch.contiguous_format)
    return {"first": first, "last": model}


def works(model: Any, number: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by name, for `number` guided transitions; the prompts' embeddings are noise."""
    unet, embeddings = model.unet.requires_grad_(True), model.embed(model.tokenize([""] * 2 * number))
    latents, timesteps = torch.randn(2 * number, *model.latent_shape), torch.randint(0, 1000, (2 * number,))

    def predict() -> torch.Tensor:
        return model.predict(unet, latents, timesteps, embeddings)

    return {
        "rollout": torch.no_grad()(predict),
        "training": lambda: predict().square().mean().backward(),
        "decoding": lambda: model.decode(latents[:number]),
    }


def ratios(models: dict[str, Any], number: int, rounds: int) -> dict[str, list[float]]:
    """CPU seconds in channels-last over those in channels-first layout, of each kind of work in each round."""
    ready = {layout: works(model, number) for layout, model in models.items()}
    found: dict[str, list[float]] = {name: [] for name in ready["last"]}
    for turn in range(rounds + 1):
        for name, each in found.items():
            spent = {}
            for layout in ("first", "last") if turn % 2 else ("last", "first"):
                began = time.process_time()
                ready[layout][name]()
                spent[layout] = time.process_time() - began
            if turn:  # the first round warms up
                each.append(spent["last"] / spent["first"])
    return found


def table(options: Options, pipelines: dict[str, str]) -> str:
    """A line for each pipeline, by its name, and batch."""
    rows = []
    for name, source in pipelines.items():
        models = layouts(source)
        for number in options.batches:
            found = ratios(models, number, options.rounds)
            rows.append([name, str(number), *(_quartiles(each) for each in found.values())])
    return markdown_table(["pipeline", "transitions", "rollout", "training", "decoding"], rows)


def _quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main(options: Options | None = None) -> None:
    """Measure, and print or write the table."""
    options = options or tyro.cli(Options)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        small = write_pipeline(Path(folder, "small"), "small", 0, torch.float32)
        text = table(options, {"`Shapes`": "Shapes", "`small`": str(small)})
    if options.page:
        write_marked(ROOT / "docs" / "speed.md", {"layout": text})
    else:
        print(text)


if __name__ == "__main__":
    main()
