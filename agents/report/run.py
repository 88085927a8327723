"""A run on one page, `report.html`: numbers, pictures, curves, tables, configuration and the commands behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from PIL import Image

from diffusion_gym.agents.report.answers import answers
from diffusion_gym.agents.report.charts import Chart, Curve, line_chart
from diffusion_gym.agents.report.commands import quoted, train_command
from diffusion_gym.agents.report.development import development
from diffusion_gym.agents.report.numbers import number, running_mean, window_for
from diffusion_gym.agents.report.render import Picture, pair, render, spread
from diffusion_gym.agents.training.pictures import cells
from diffusion_gym.agents.training.records import read_metrics
from diffusion_gym.agents.training.run_files import read_config, read_evaluation
from diffusion_gym.agents.training.runs import read_settings
from diffusion_gym.agents.training.settings import RunSettings
from diffusion_gym.shapes.captions import FAMILIES, parse
from diffusion_gym.storage import number_or_nan, write_text

_QUERIES: Final = "reward queries (images scored)"
_DIAGNOSTICS: Final = {
    "clip_fraction": ("Clip fraction", "share of transitions", True),
    "approx_kl": ("Approximate KL to the sampling policy", "½ (log-probability ratio)², mean", True),
    "grad_norm": ("Gradient norm", "L2 norm before clipping", True),
    "loss": ("Loss", "surrogate loss, mean of an iteration", False),
}
_OF_THE_COMMAND: Final = ("out", "resume", "resume_from_older", "trust", "token_to", "profile")
_STRIP = 6  # picture grids shown of a training


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        folder: the run folder.
        settings: its configuration.
        versions: of the libraries that it ran with.
        metrics: a record for each iteration.
        evaluation: the content of `eval.json`, if it is there.
    """

    folder: Path
    settings: RunSettings
    versions: Mapping[str, str]
    metrics: Sequence[Mapping[str, Any]]
    evaluation: Mapping[str, Any] | None

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read a run folder.

        Raises:
            FileNotFoundError: the folder holds no run.
            ValueError: a file of it is truncated or of something else.
        """
        settings, versions = read_settings(folder), read_config(folder).versions
        return cls(folder, settings, versions, read_metrics(folder / "metrics.jsonl"), read_evaluation(folder))

    @property
    def parts(self) -> list[tuple[str, Mapping[str, Any]]]:
        """The evaluation on training prompts and, where there are such, on held-out prompts."""
        both = [("training prompts", self.evaluation), ("held-out prompts", (self.evaluation or {}).get("held_out"))]
        return [(name, part) for name, part in both if part is not None]

    def column(self, key: str) -> list[float]:
        """A metric at every iteration; NaN where it is missing or was not finite."""
        return [number_or_nan(row.get(key)) for row in self.metrics]


def write_report(folder: Path) -> Path:
    """Write `report.html` of a run: one page that loads nothing from elsewhere.

    Args:
        folder: the run folder; pictures and `eval.json` may be missing, and the page says how to add them.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: a file of the run is truncated or of something else.
    """
    run = Run.read(folder)
    rewards, window = run.column("reward_mean"), window_for(len(run.metrics))
    queries, seconds = run.metrics[-1]["reward_queries"] if run.metrics else 0, sum(run.column("seconds"))
    text = render(
        "run.html.j2",
        run=run,
        at=quoted(folder),
        queries=queries,
        window=window,
        in_training=(sum(rewards[:window]) / window, running_mean(rewards, window)[-1]) if rewards else None,
        answers=answers(run.evaluation, queries, seconds),
        before_after=_before_after(run),
        exploited=_exploited(run),
        charts=_charts(run),
        strip=_strip(run),
        development=development(folder, strict=run.column("success_mean") == rewards),
        prompts=[(name, part, _by_family(part["prompts"])) for name, part in run.parts],
        **_configuration(run),
        commands=_commands(run),
    )
    path = folder / "report.html"
    write_text(path, text)
    return path


def _before_after(run: Run) -> dict[str, tuple[list[dict[str, Any]], list[Picture]]]:
    """For training and held-out prompts, pairs of pictures; or both grids, of an evaluation that does not say more."""
    shown: dict[str, tuple[list[dict[str, Any]], list[Picture]]] = {}
    parts = dict(run.parts)
    for prefix, name in (("", "training prompts"), ("held-out-", "held-out prompts")):
        paths = [run.folder / "images" / f"{prefix}{model}.png" for model in ("before", "after")]
        if described := parts.get(name, {}).get("shown"):
            shown[name] = (_pairs(paths, described) if all(path.is_file() for path in paths) else [], [])
        elif all(path.is_file() for path in paths):
            alt = "Grid of pictures by the {} model, " + name
            models = zip(paths, ("pretrained", "tuned"), strict=True)
            shown[name] = ([], [Picture.of(path.read_bytes(), alt.format(model)) for path, model in models])
    return {name: entries for name, entries in shown.items() if any(entries)}


def _exploited(run: Run) -> list[dict[str, Any]]:
    """Pairs of pictures whose reward rose most while the probe fell, with what the probe says below."""
    probe = (run.evaluation or {}).get("probe") or {"pictures": ()}
    paths = [run.folder / "images" / f"exploited-{model}.png" for model in ("before", "after")]
    if not probe["pictures"] or not all(path.is_file() for path in paths):
        return []
    pairs = _pairs(paths, probe)
    for entry, row in zip(pairs, probe["pictures"], strict=True):
        entry["prompt"] += f" · {probe['name']} {number(row['base_probe'])} → {number(row['probe'])}"
    return pairs


def _pairs(paths: Sequence[Path], described: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows, pairs = described["pictures"], []
    grids = [cells(Image.open(path), described["size"], len(rows)) for path in paths]
    for row, *images in zip(rows, *grids, strict=True):
        rewards = [number_or_nan(row["base_reward"]), number_or_nan(row["reward"])]
        pairs.append(pair(row["prompt"], images, rewards, [row.get("base_success"), row.get("success")]))
    return pairs


def _charts(run: Run) -> list[Chart]:
    """Reward, strict success where it is another number, and diagnostics against reward queries."""
    evaluation = run.evaluation or {}
    queries, rewards, success = (run.column(key) for key in ("reward_queries", "reward_mean", "success_mean"))
    reward = Curve("reward", queries, rewards, level=evaluation.get("base_reward_mean"))
    hits = Curve("strict success", queries, success, "series-2", level=evaluation.get("base_success"))
    charts = [line_chart("Reward", _QUERIES, "mean reward of an iteration", [reward])]
    if hits.points() and success != rewards:
        if all(0 <= value <= 1 for value in rewards):
            label = "mean reward, share of strict successes"
            charts = [line_chart("Reward and strict success", _QUERIES, label, [reward, hits])]
        else:
            charts.append(line_chart("Strict success", _QUERIES, "share of samples", [hits]))
    for key, (title, label, zero) in _DIAGNOSTICS.items():
        if any(key in row for row in run.metrics):
            curve = Curve(title, queries, run.column(key))
            charts.append(line_chart(title, _QUERIES, label, [curve], zero=zero))
    return charts


def _strip(run: Run) -> list[tuple[Picture, str]]:
    """Grids from the first to the last that the training has drawn, with captions."""
    paths = sorted((run.folder / "images").glob("iteration-*.png"))
    queries = {row["iteration"]: row["reward_queries"] for row in run.metrics}
    shown = []
    for path in (paths[index] for index in spread(len(paths), _STRIP)):
        iteration = int(path.stem.removeprefix("iteration-"))
        reached = f", {queries[iteration]:,} queries" if iteration in queries else ""
        caption = f"Iteration {iteration}{reached}" if iteration else "Before training"
        shown.append((Picture.of(path.read_bytes(), f"Grid of pictures: {caption.lower()}"), caption))
    return shown


def _by_family(rows: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any] | None, dict[str, Any]]]:
    """Families of Shapes captions with their means over all samples and rows; last, under "", any other prompts."""
    families: dict[str, dict[str, Any]] = {name: {} for name in (*FAMILIES, "")}
    for prompt, row in rows.items():
        try:
            families[parse(prompt).family][prompt] = row
        except ValueError:
            families[""][prompt] = row
    return [(name, _mean(values) if name else None, values) for name, values in families.items() if values]


def _mean(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    samples = sum(row["samples"] for row in rows.values())
    keys = {key for row in rows.values() for key in row} - {"samples"}
    sums = {key: sum(number_or_nan(row[key]) * row["samples"] for row in rows.values()) for key in keys}
    return {"samples": samples, **{key: value / samples for key, value in sums.items()}}


def _configuration(run: Run) -> dict[str, Any]:
    """The settings in groups, and the options that the environment has left at its own defaults."""
    values = asdict(run.settings)
    env, agent = values.pop("env_options"), values.pop("agent_options")
    set_by_hand = {key: value for key, value in env.items() if value is not None}
    if prompts := set_by_hand.get("prompts"):
        more = f" and {len(prompts) - 4:,} more" if len(prompts) > 4 else ""
        set_by_hand["prompts"] = "; ".join(prompts[:4]) + more
    groups = {
        "Run": {key: value for key, value in values.items() if key not in _OF_THE_COMMAND},
        "Environment": set_by_hand,
        "Versions": run.versions,
        f"Agent {run.settings.agent}": agent,
    }
    return {"configuration": groups, "defaults": [key for key in env if key not in set_by_hand]}


def _commands(run: Run) -> str:
    out = quoted(Path(f"{run.folder.resolve().name}-again"))
    measured = run.evaluation
    drawn = f" --samples {measured['samples']} --seed {measured['seed']}" if measured else ""
    lines = [train_command(run.settings, out), f"diffusion-gym eval {out}{drawn}", f"diffusion-gym report {out}"]
    return "\n".join(lines)
