"""Pictures of a benchmark: before and after, over the training, and along trajectories, always from the same noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch

from diffusion_gym.agents.pictures import grid, png_bytes
from diffusion_gym.agents.reporting.benchmark.data import Benchmark, Samples
from diffusion_gym.agents.reporting.benchmark.files import Figures, links
from diffusion_gym.agents.reporting.benchmark.tables import change
from diffusion_gym.agents.reporting.charts import Curve, LineChart
from diffusion_gym.agents.reporting.markup import Html, element, image, note
from diffusion_gym.agents.reporting.results import number

_PAIRS: Final = 8  # samples before and after
_ROLLS: Final = 4  # samples over the training
_COLUMNS: Final = 8  # pictures beside each other
_PAIR_WIDTH: Final = 400  # pixels at most, or a benchmark of large pictures would make a page of many megabytes
_ROLL_WIDTH: Final = 900


def pictures(benchmark: Benchmark, figures: Figures) -> Html:
    """For each task and agent the pictures of one seed, folded; a sentence where the run folders are not there."""
    tasks = []
    for task in benchmark.tasks:
        shown = [_agent(benchmark, figures, task, agent) for agent in benchmark.agents_of(task)]
        if shown := [part for part in shown if part]:
            tasks += [element("h3", task), *shown]
    head = element("h2", "Pictures", id="pictures")
    if not tasks:
        text = "The run folders are not here, so pictures, spreads of rewards and maps are left out. "
        return element("section", head, note(text, "The page shows them where ", element("code", "runs/"), " lies."))
    text = (
        "One seed of each agent; the same noise and prompt before, after and on the way. Numbers under pictures are "
        "rewards."
    )
    return element("section", head, element("p", text, class_="muted"), *tasks)


def _agent(benchmark: Benchmark, figures: Figures, task: str, agent: str) -> Html:
    seed = benchmark.shown_seed(agent, task)
    entries = [entry for entry in benchmark.samples(agent, task, seed) if entry.tensor("images") is not None]
    if len(entries) < 2:
        return Html()
    grown = number(change(benchmark.summary["agents"][agent]["tasks"][task]), "+")
    title = element("span", f", seed {seed}; change of the mean reward, all seeds: {grown}", class_="muted")
    name = f"{task}--{agent}"
    parts = [_before_after(figures, name, entries), _over_training(figures, name, entries)]
    parts.append(_trajectories(figures, name, entries[0], entries[-1]))
    return element("details", element("summary", agent, title), *parts)


def _before_after(figures: Figures, name: str, entries: Sequence[Samples]) -> Html:
    """Pairs, the pretrained model's picture on the left."""
    first, last = entries[0], entries[-1]
    before, after = (_tensor(entry, "images") for entry in (first, last))
    rewards = [_tensor(entry, "rewards") for entry in (first, last)]
    number_of = min(_PAIRS, len(before), len(after))
    shown = []
    for index, prompt in enumerate(first.prompts[:number_of]):
        pair = torch.stack([before[index], after[index]])
        values = " → ".join(number(float(part[index])) for part in rewards)
        caption = element("figcaption", prompt, " " if prompt else "", element("b", values, class_="whole"))
        shown.append(
            element("figure", image(png_bytes(grid(pair, 2)), f"Before and after: {prompt}", _PAIR_WIDTH), caption)
        )
    both = torch.stack([before[:number_of], after[:number_of]], 1).flatten(0, 1)
    file = figures.picture(f"before-after--{name}", png_bytes(grid(both, 4)))
    title = element("h4", "Before and after")
    return element("div", title, element("div", *shown, class_="samples"), links(file))


def _over_training(figures: Figures, name: str, entries: Sequence[Samples]) -> Html:
    """The same noise at each measurement (thesis, figure 5.4)."""
    chosen = [entries[index] for index in spread(len(entries))]
    images = torch.stack([_tensor(entry, "images") for entry in chosen], 1)
    rewards = torch.stack([_tensor(entry, "rewards") for entry in chosen], 1)
    queries = [f"{entry.reward_queries:,}" for entry in chosen]
    rolls = [
        _roll(images[index], queries, rewards[index].tolist(), prompt)
        for index, prompt in enumerate(chosen[0].prompts[: min(_ROLLS, len(images))])
    ]
    file = figures.picture(f"over-training--{name}", png_bytes(grid(images[:_ROLLS].flatten(0, 1), len(chosen))))
    title = element("h4", "Over the training: reward queries above, rewards below")
    return element("div", title, element("div", *rolls, class_="rolls"), links(file))


def _trajectories(figures: Figures, name: str, first: Samples, last: Samples) -> Html:
    """Denoised estimates x0~ of the lowest and the highest reward, and the rewards on the way (figures 4.3, 4.4)."""
    if any(entry.tensor(key) is None for entry in (first, last) for key in ("path_images", "path_rewards")):
        return Html()
    rolls, rows, strips = [], [], []
    for model, entry in (("pretrained", first), ("tuned", last)):
        images, rewards = _tensor(entry, "path_images"), _tensor(entry, "path_rewards")
        steps = spread(len(images))
        final = rewards[-1].nan_to_num(-math.inf)
        for sample in sorted({int(final.argmin()), int(final.argmax())}, key=lambda index: float(final[index])):
            values, shown = rewards[steps, sample].tolist(), images[steps, sample]
            rolls.append(_roll(shown, [str(step) for step in steps], values, f"{model}: {entry.prompts[sample]}"))
            strips.append(shown)
        rows += [
            {"model": model, "sample": sample, "step": step, "reward": float(rewards[step, sample])}
            for sample in range(rewards.shape[1])
            for step in range(len(rewards))
        ]
    title = element("h4", "Along a trajectory: the denoised estimate after each step, lowest and highest final reward")
    file = figures.picture(f"trajectories--{name}", png_bytes(grid(torch.cat(strips), len(strips[0]))))
    chart = figures.chart(f"trajectory-rewards--{name}", _path_chart(first, last), rows)
    return element("div", title, element("div", *rolls, class_="rolls"), links(file), chart)


def _path_chart(first: Samples, last: Samples) -> LineChart:
    curves = []
    for model, color, entry in (("pretrained model", "second", first), ("tuned", "first", last)):
        rewards = _tensor(entry, "path_rewards").double()
        band = [(float(row.min()), float(row.max())) for row in rewards]
        steps = list(range(len(rewards)))
        curves.append(Curve(model, steps, rewards.nanmean(1).tolist(), color, band=band, smooth=False))
    samples = len(_tensor(first, "path_rewards")[0])
    label = f"mean of {samples} pictures, bands from lowest to highest"
    return LineChart("Reward of the denoised estimate", "denoising steps done", label, curves, 200)


def _roll(images: torch.Tensor, above: Sequence[str], rewards: Sequence[float], caption: str) -> Html:
    """Pictures beside each other with a label above and a reward below each."""
    strip = image(png_bytes(grid(images, len(images))), caption, _ROLL_WIDTH)
    return element("figure", _labels(above), strip, _labels(map(number, rewards)), element("figcaption", caption))


def _labels(texts: object) -> Html:
    return element("div", *(element("span", text) for text in texts), class_="labels")  # type: ignore[attr-defined]


def spread(length: int) -> list[int]:
    """Up to eight places from the first to the last of `length`, evenly spread."""
    last = length - 1
    return sorted({round(index * last / (_COLUMNS - 1)) for index in range(_COLUMNS)})


def _tensor(entry: Samples, name: str) -> torch.Tensor:
    found = entry.tensor(name)
    if found is None:
        raise ValueError(f"{entry.path} lacks {name}; run the cell again")
    return found
