"""A run on one page, `report.html`: numbers, pictures, curves, tables, configuration and the commands behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from diffusion_gym.agents.records import read_metrics
from diffusion_gym.agents.reporting.charts import Curve, line_chart, running_mean, window_for
from diffusion_gym.agents.reporting.commands import quoted, train_command
from diffusion_gym.agents.reporting.development import development_section
from diffusion_gym.agents.reporting.markup import Html, card, definitions, element, join, note, page, picture
from diffusion_gym.agents.reporting.results import arrow, by_family, number, prompt_table, result_cards
from diffusion_gym.agents.run_files import read_config, read_evaluation
from diffusion_gym.agents.runs import read_settings
from diffusion_gym.agents.settings import RunSettings
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
    sections = (
        _header,
        _headline,
        _before_after,
        _learning,
        _strip,
        _development,
        _diagnostics,
        _prompts,
        _configuration,
        _commands,
    )
    title = f"{run.settings.agent} on {run.settings.env}, seed {run.settings.seed}"
    text = page(title, *(section(run) for section in sections))
    path = folder / "report.html"
    write_text(path, text)
    return path


def _header(run: Run) -> Html:
    settings, options = run.settings, run.settings.env_options
    named = {"seed": settings.seed, "preset": settings.preset, "model": options.model, "reward": options.reward}
    facts = [settings.agent, *(f"{name} {value}" for name, value in named.items() if value is not None)]
    queries = run.metrics[-1]["reward_queries"] if run.metrics else 0
    progress = f"{len(run.metrics):,} iterations, {queries:,} of {settings.total_reward_queries:,} reward queries."
    parts = [element("h1", settings.env), element("p", " · ".join(facts), class_="lead")]
    parts.append(element("p", progress, class_="muted"))
    if queries < settings.total_reward_queries:
        command = element("code", f"diffusion-gym train --resume --out {quoted(run.folder)}")
        parts.append(note("The run is not at its end. If it was stopped, ", command, " goes on with it."))
    if run.evaluation is None:
        parts.append(note("Not evaluated yet. ", _evaluate(run, "add the comparison with the pretrained model.")))
    elif run.metrics and run.evaluation["iteration"] != run.metrics[-1]["iteration"]:
        old = f"The evaluation is of iteration {run.evaluation['iteration']}. "
        parts.append(note(old, _evaluate(run, "make it that of the newest checkpoint.")))
    return element("header", *parts)


def _evaluate(run: Run, what: str) -> Html:
    commands = [element("code", f"diffusion-gym {name} {quoted(run.folder)}") for name in ("eval", "report")]
    return join([commands[0], " and then ", commands[1], f" {what}"])


def _headline(run: Run) -> Html:
    results = [shown for name, part in run.parts for shown in result_cards(name, part)]
    if not run.parts and run.metrics:
        rewards = run.column("reward_mean")
        window = window_for(len(rewards))
        over = f"{window} iterations" if window > 1 else "iteration"
        value = arrow(number(sum(rewards[:window]) / window), number(running_mean(rewards, window)[-1]))
        results.append(card("Reward in training", value, f"mean of the first {over} → of the last {over}"))
    costs = []
    if run.parts:
        values = [f"{name} {number(part['kl_to_base'])}" for name, part in run.parts[1:]]
        detail = "; ".join(["closed form, summed over the denoising steps", *values])
        costs.append(card("KL to the pretrained model", f"{number(run.parts[0][1]['kl_to_base'])} nats", detail))
    if run.metrics and (seconds := sum(run.column("seconds"))) > 0:
        speed = run.metrics[-1]["reward_queries"] / seconds
        costs.append(card("Speed", f"{speed:,.1f} images/s", "sampling, scoring and updates together"))
        costs.append(card("Training time", f"{seconds / 60:,.1f} minutes", "without the start and the picture grids"))
    both = (("results", results), ("costs", costs))
    return join(element("div", *cards, class_=f"cards {kind}") for kind, cards in both if cards)


def _before_after(run: Run) -> Html:
    parts = [element("h2", "Before and after")]
    text = "Each place in the two grids starts from the same noise and has the same prompt."
    parts.append(element("p", text, class_="muted"))
    shown = [("", "Training prompts"), ("held-out-", "Held-out prompts, which training never saw")]
    for prefix, title in shown:
        before, after = (run.folder / "images" / f"{prefix}{name}.png" for name in ("before", "after"))
        if not (before.is_file() and after.is_file()):
            continue
        alt = f"Grid of pictures by the {{}} model, {title[0].lower()}{title[1:]}"
        iteration = f", iteration {run.evaluation['iteration']}" if run.evaluation else ""
        pair = [
            picture(before, alt.format("pretrained"), "Before: the pretrained model"),
            picture(after, alt.format("tuned"), f"After: {run.settings.agent}{iteration}"),
        ]
        parts += [element("h3", title), element("div", *pair, class_="pair")]
    if len(parts) == 2:
        parts[1:] = [note("No pictures yet. ", _evaluate(run, "add those of both models."))]
    return element("section", *parts)


def _learning(run: Run) -> Html:
    if not run.metrics:
        return element("section", element("h2", "Reward in training"), note("No iteration is complete yet."))
    evaluation = run.evaluation or {}
    queries, rewards, success = (run.column(key) for key in ("reward_queries", "reward_mean", "success_mean"))
    reward = Curve("reward", queries, rewards, level=evaluation.get("base_reward_mean"))
    hits = Curve("strict success", queries, success, "second", evaluation.get("base_success"))
    window = window_for(len(rewards))
    text = f"Points are iterations, the line is their running mean over {window}. " if window > 1 else ""
    if evaluation:
        text += "The dashed line is the pretrained model in the evaluation."
    parts = [element("h2", "Reward in training"), element("p", text, class_="muted")]
    charts: list[tuple[str, str, list[Curve]]] = [("Reward", "mean reward of an iteration", [reward])]
    if hits.points() and success != rewards:
        if all(0 <= value <= 1 for value in rewards):
            label = "mean reward, share of strict successes"
            charts = [("Reward and strict success", label, [reward, hits])]
        else:
            charts.append(("Strict success", "share of samples", [hits]))
    drawn = [line_chart(title, _QUERIES, label, curves, height=300, zero=False) for title, label, curves in charts]
    return element("section", *parts, *drawn)


def _strip(run: Run) -> Html:
    paths = sorted((run.folder / "images").glob("iteration-*.png"))
    last = len(paths) - 1
    chosen = sorted({round(index * last / (_STRIP - 1)) for index in range(_STRIP)}) if paths else []
    queries = {row["iteration"]: row["reward_queries"] for row in run.metrics}
    figures = []
    for path in (paths[index] for index in chosen):
        iteration = int(path.stem.removeprefix("iteration-"))
        reached = f", {queries[iteration]:,} queries" if iteration in queries else ""
        caption = f"Iteration {iteration}{reached}" if iteration else "Before training"
        figures.append(picture(path, f"Grid of pictures: {caption.lower()}", caption))
    content = element("div", *figures, class_="strip") if figures else note("The run has drawn no pictures yet.")
    text = element("p", "The same noise and prompts at every point of the training.", class_="muted")
    return element("section", element("h2", "Pictures over training"), text, content)


def _development(run: Run) -> Html:
    return development_section(run.folder)


def _diagnostics(run: Run) -> Html:
    queries, charts = run.column("reward_queries"), []
    for key, (title, label, zero) in _DIAGNOSTICS.items():
        if any(key in row for row in run.metrics):
            charts.append(
                line_chart(title, _QUERIES, label, [Curve(title, queries, run.column(key))], height=170, zero=zero)
            )
    if not charts:
        return Html()
    return element("section", element("h2", "Diagnostics"), element("div", *charts, class_="charts"))


def _prompts(run: Run) -> Html:
    parts = [element("h2", "By prompt")]
    for name, part in run.parts:
        count = f"{name.capitalize()}: {len(part['prompts']):,} drawn"
        parts += [element("h3", count), prompt_table(f"Results by prompt, {name}", part)]
    if not run.parts:
        parts.append(note("Not evaluated yet. ", _evaluate(run, "add this table.")))
    elif any(family for _, part in run.parts for family in by_family(part["prompts"])):
        parts.insert(1, element("p", "Bold rows are means over all samples of a family of prompts.", class_="muted"))
    return element("section", *parts)


def _configuration(run: Run) -> Html:
    values = asdict(run.settings)
    env, agent = values.pop("env_options"), values.pop("agent_options")
    set_by_hand = {key: value for key, value in env.items() if value is not None}
    if prompts := set_by_hand.get("prompts"):
        more = f" and {len(prompts) - 4:,} more" if len(prompts) > 4 else ""
        set_by_hand["prompts"] = "; ".join(prompts[:4]) + more
    others = [key for key in env if key not in set_by_hand]
    left = [element("p", f"At the environment's own defaults: {', '.join(others)}.", class_="muted")] if others else []
    values = {key: value for key, value in values.items() if key not in _OF_THE_COMMAND}
    groups = (
        ("Run", values),
        ("Environment", set_by_hand),
        ("Versions", run.versions),
        (f"Agent {run.settings.agent}", agent),
    )
    shown = [definitions(title, entries.items()) for title, entries in groups]
    return element("section", element("h2", "Configuration"), element("div", *shown, class_="columns"), *left)


def _commands(run: Run) -> Html:
    out = quoted(Path(f"{run.folder.resolve().name}-again"))
    measured = run.evaluation
    drawn = f" --samples {measured['samples']} --seed {measured['seed']}" if measured else ""
    lines = [train_command(run.settings, out), f"diffusion-gym eval {out}{drawn}", f"diffusion-gym report {out}"]
    text = "The same versions and the same device give the same numbers. The run goes to a new folder."
    block = element("pre", element("code", "\n".join(lines)), tabindex=0)
    return element("section", element("h2", "To reproduce"), element("p", text, class_="muted"), block)
