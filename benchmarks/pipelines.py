"""A rollout beside diffusers' own `pipe(prompts)`: the same folder, prompts, steps, guidance, batch and dtype.

    python benchmarks/pipelines.py run     # docs/results/pipelines/, some minutes on one thread
    python benchmarks/pipelines.py page    # the table of docs/speed.md from there

Both run in one process and in turns, in an order that turns each time. A ratio is the median over rounds, taken within
a round, of CPU seconds, with the smallest and the largest. The pipe samples as it comes; the rollout does more: it
draws the noise of every step, keeps all latents and their log-probabilities, and scores the pictures. The network's own
seconds are counted apart, so that what is left says what each side adds to it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gymnasium as gym
import torch
import tyro
from gymnasium.vector import AutoresetMode
from peers.page_options import PageOptions

import diffusion_gym
from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.benchmark.machine import hardware
from diffusion_gym.agents.report.marked import markdown_table, write_marked
from diffusion_gym.agents.rollout import collect_many
from diffusion_gym.storage import read_json, write_json
from diffusion_gym.testing.random_flux import write_random_flux
from diffusion_gym.testing.random_pipeline import write_pipeline

ROOT: Final = Path(__file__).resolve().parent.parent
RECORDS: Final = ROOT / "docs" / "results" / "pipelines"
PAGE: Final = PageOptions(RECORDS, ROOT / "docs" / "speed.md")
PROMPTS: Final = [f"a {animal}" for animal in ("cat", "dog", "horse", "bird", "deer", "cow", "goat", "zebra")]
FAMILIES: Final[dict[str, Callable[[Path], Path]]] = {
    "SD 1.x, tiny": lambda folder: write_pipeline(folder, "tiny", 0, torch.float32),
    "SD 1.x, small": lambda folder: write_pipeline(folder, "small", 0, torch.float32),
    "SDXL, tiny": lambda folder: write_pipeline(folder, "tiny-sdxl", 0, torch.float32),
    "SD3, tiny": lambda folder: write_pipeline(folder, "tiny-sd3", 0, torch.float32),
    "FLUX.1, tiny": write_random_flux,
}


@dataclass(frozen=True)
class RunOptions:
    """Measure every family at every batch."""

    families: tuple[str, ...] = tuple(FAMILIES)
    """Which."""
    batches: tuple[int, ...] = (8, 16)
    """Pictures at once."""
    steps: int = 20
    """Denoising steps T."""
    rounds: int = 12
    """Rounds; one more warms up."""
    records: Path = RECORDS
    """Where the records go."""


class Clock:
    """CPU seconds of a side's turns, and of its network within them."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.turns: list[dict[str, float]] = []
        self._inside, self._began = 0.0, 0.0
        network.register_forward_pre_hook(self._enter)
        network.register_forward_hook(self._leave)

    def turn(self, work: Callable[[], Any]) -> None:
        """Run one turn."""
        self._inside, began = 0.0, time.process_time()
        work()
        self.turns.append({"seconds": time.process_time() - began, "network": self._inside})

    def _enter(self, *_: Any) -> None:
        self._began = time.process_time()

    def _leave(self, *_: Any) -> None:
        self._inside += time.process_time() - self._began


def measure(folder: Path, batch: int, steps: int, rounds: int) -> dict[str, Any]:
    """The turns of both sides on one pipeline."""
    pipe, rollout, policy = _pipe(folder), *_rollout(folder, batch, steps)
    prompts = [PROMPTS[place % len(PROMPTS)] for place in range(batch)]
    network = getattr(pipe, "unet", None) or pipe.transformer
    shape = {"height": policy.model.image_shape[0], "width": policy.model.image_shape[1]}
    calls: dict[str, tuple[Clock, Callable[[int], Any]]] = {
        "diffusion_gym": (Clock(policy.unet), rollout),
        "diffusers": (
            Clock(network),
            lambda turn: pipe(prompts, num_inference_steps=steps, guidance_scale=3.0, output_type="pt", **shape),
        ),
    }
    for turn in range(rounds + 1):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            clock, work = calls[name]
            clock.turn(lambda work=work, turn=turn: work(turn))  # type: ignore[misc]
    return {name: clock.turns[1:] for name, (clock, _) in calls.items()}


def _pipe(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that it corrects the config
        pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _rollout(folder: Path, batch: int, steps: int) -> tuple[Callable[[int], Any], DenoisingPolicy]:
    """One batch of trajectories of a policy whose weights all train."""
    env = gym.make_vec(
        "DiffusionDenoise-v0",
        num_envs=batch,
        model=str(folder),
        reward=lambda images, prompts, metadata: torch.zeros(len(images)),
        prompts=PROMPTS,
        num_inference_steps=steps,
        guidance_scale=3.0,
        eta=1.0,
        autoreset_mode=AutoresetMode.DISABLED,
    )
    policy = DenoisingPolicy.from_env(env, trainable="full")
    return lambda turn: collect_many(env, policy, batch, (0, turn)), policy


def run(options: RunOptions) -> None:
    """Measure, and write a record of each family and batch."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    gym.register_envs(diffusion_gym)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    with ExitStack() as stack:
        for family in options.families:
            folder = FAMILIES[family](Path(stack.enter_context(tempfile.TemporaryDirectory()), "pipeline"))
            for batch in options.batches:
                found = measure(folder, batch, options.steps, options.rounds)
                record = {"family": family, "batch": batch, "steps": options.steps, "turns": found, **hardware()}
                slug = family.replace(",", "").replace(" ", "-")
                write_json(options.records / f"{slug}-{batch}.json", record)
                print(" | ".join(row(record)), flush=True)


def row(record: dict[str, Any]) -> list[str]:
    """A line of the table: ratios, and for each side the CPU seconds beside the network."""
    ours, theirs = record["turns"]["diffusion_gym"], record["turns"]["diffusers"]

    def ratio(part: Callable[[dict[str, float]], float]) -> str:
        values = [part(a) / part(b) for a, b in zip(ours, theirs, strict=True)]
        return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    def beside(turns: list[dict[str, float]]) -> str:
        return f"{1000 * statistics.median(turn['seconds'] - turn['network'] for turn in turns):.0f}"

    total = [f"{statistics.median(turn['seconds'] for turn in turns):.2f}" for turns in (ours, theirs)]
    return [
        record["family"],
        str(record["batch"]),
        *total,
        ratio(lambda turn: turn["seconds"]),
        ratio(lambda turn: turn["network"]),
        beside(ours),
        beside(theirs),
    ]


def page(options: PageOptions = PAGE) -> None:
    """Write what stands between the page's markers, from the records alone."""
    records = [read_json(path) for path in options.records.glob("*.json")]
    order = list(FAMILIES)
    records.sort(key=lambda record: (order.index(record["family"]), record["batch"]))
    head = ["pipeline", "batch", "rollout, s", "`pipe`, s", "ratio", "of the networks alone"]
    head += ["beside the network, ms", "`pipe`'s, ms"]
    text = markdown_table(head, map(row, records), "---:") if records else "Not measured yet."
    if records:
        one = records[0]
        text += f"\n\nT = {one['steps']}, guidance 3, float32, {one['processor']}, one thread, {_rounds(one)} rounds."
    write_marked(options.page, {"pipelines": text})


def _rounds(record: dict[str, Any]) -> int:
    return len(record["turns"]["diffusers"])


def main() -> None:
    """Run a command."""
    commands = {"run": run, "page": page}
    tyro.extras.subcommand_cli_from_dict(commands, config=(tyro.conf.OmitArgPrefixes,))


if __name__ == "__main__":
    main()
