"""A benchmark on one page, `report.html`, and its figures as files."""

from __future__ import annotations

from pathlib import Path

from diffusion_gym.agents.reporting.benchmark.aggregate import aggregate
from diffusion_gym.agents.reporting.benchmark.curves import ablation, learning, trade_offs
from diffusion_gym.agents.reporting.benchmark.data import Benchmark
from diffusion_gym.agents.reporting.benchmark.files import Figures
from diffusion_gym.agents.reporting.benchmark.header import header, provenance
from diffusion_gym.agents.reporting.benchmark.pictures import pictures
from diffusion_gym.agents.reporting.benchmark.samples import distributions, maps
from diffusion_gym.agents.reporting.benchmark.shares import shares
from diffusion_gym.agents.reporting.benchmark.tables import failures, results_table
from diffusion_gym.agents.reporting.markup import Html, element, page
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
    benchmark, figures = Benchmark.read(folder, seed), Figures(folder)
    drawn = (aggregate, learning, results_table, trade_offs, distributions, maps, shares, ablation, pictures)
    sections = [draw(benchmark, figures) for draw in drawn] if benchmark.agents else []
    sections = [part for part in (*sections, failures(benchmark), provenance(benchmark)) if part]
    text = page(f"Benchmark {benchmark.results.suite.name}", header(benchmark), _contents(sections), *sections)
    path = folder / "report.html"
    write_text(path, text)
    return path


def is_benchmark(folder: Path) -> bool:
    """Whether a folder is a benchmark's, and not a run's."""
    return (folder / "records").is_dir() and not (folder / "config.json").is_file()


def _contents(sections: list[Html]) -> Html:
    """Links to the sections, by the headings that they begin with."""
    entries = []
    for section in sections:
        mark, _, rest = section.partition('<h2 id="')[2].partition('">')
        entries.append(element("a", Html(rest.partition("</h2>")[0]), href=f"#{mark}"))
    return element("nav", *entries, aria_label="Contents")
