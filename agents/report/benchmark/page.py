"""A benchmark on one page, `report.html`, and its figures as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusion_gym.agents.report.benchmark.curves import COSTS, ablation, learning, trade_offs
from diffusion_gym.agents.report.benchmark.data import Benchmark
from diffusion_gym.agents.report.benchmark.figures import Figures
from diffusion_gym.agents.report.benchmark.header import commands, header, provenance
from diffusion_gym.agents.report.benchmark.pictures import pictures
from diffusion_gym.agents.report.benchmark.samples import distributions, maps
from diffusion_gym.agents.report.benchmark.scores import better, comparisons, results, scores, shares
from diffusion_gym.agents.report.charts import Curve, keys_of
from diffusion_gym.agents.report.render import render
from diffusion_gym.storage import write_text


def write_benchmark_report(folder: Path, seed: int | None = None) -> Path:
    """Write `report.html` of a benchmark, a page that loads nothing from elsewhere, and `figures/` with its files.

    Args:
        folder: the `--out` of `diffusion-gym bench`; without its run folders the pictures are left out.
        seed: whose pictures are shown; by default each agent's first.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: the folder holds no benchmark.
        ValueError: no run has the seed, or a file is truncated.
    """
    benchmark = Benchmark.read(folder, seed)
    content: dict[str, Any] = {
        "benchmark": benchmark,
        "suite": benchmark.results.suite,
        "failures": benchmark.results.failures,
        "provenance": provenance(benchmark),
        "commands": commands(benchmark),
        **header(benchmark),
    }
    if benchmark.agents:
        figures = Figures(folder)
        content |= {
            "costs": COSTS,
            "better": better(benchmark),
            "keys": keys_of(Curve(agent, (), (), **benchmark.style(agent)) for agent in benchmark.agents),
            "scores": scores(benchmark, figures),
            "learning": learning(benchmark, figures),
            "pictures": pictures(benchmark, figures),
            "comparisons": comparisons(benchmark, figures),
            "results": results(benchmark, figures),
            "trade_offs": trade_offs(benchmark, figures),
            "spread": distributions(benchmark, figures),
            "maps": maps(benchmark, figures),
            "shares": shares(benchmark, figures),
            "ablation": ablation(benchmark, figures),
        }
    path = folder / "report.html"
    write_text(path, render("benchmark.html.j2", **content))
    return path


def is_benchmark(folder: Path) -> bool:
    """Whether a folder is a benchmark's, and not a run's."""
    return (folder / "records").is_dir() and not (folder / "config.json").is_file()
