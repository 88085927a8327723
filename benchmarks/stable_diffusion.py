"""DDPO_IS on Stable Diffusion 1.4's exact shape with random weights: speed, share of the card's matrix rate, memory.

    python -m diffusion_gym.models.random_pipeline /tmp/sd14 --size sd14
    python benchmarks/stable_diffusion.py run --model /tmp/sd14     # on a CUDA GPU; a record for each row
    python benchmarks/stable_diffusion.py page                      # the table of docs/gpu.md from the records alone

Random weights do not change the speed. `--variants` adds rows with the UNet in channels-last format, compiled by
torch.compile, or both: their ratio to the plain row says whether that pays on a card. Each row is a process of its own,
so that its peak memory is its own; a row that runs out of memory is recorded as such.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
import tyro
from matrix_rate import matrix_rate, operations, synchronize

from diffusion_gym.agents.reporting.marked import write_marked
from diffusion_gym.storage import read_json, write_json

ROOT: Final = Path(__file__).resolve().parent.parent
RECORDS: Final = ROOT / "docs" / "results" / "gpu"
_HEAD: Final = ("update, transitions/s", "of the card", "images/s", "peak memory, GB")


Variant = Literal["plain", "channels-last", "compiled", "channels-last-compiled"]


@dataclass(frozen=True)
class Row:
    """One measurement: two iterations of DDPO_IS, the second one timed."""

    model: str
    """A pipeline directory."""
    trainable: Literal["lora", "full"] = "lora"
    """What trains."""
    batch: int = 8
    """Pictures sampled at once, transitions trained on at once, and the aesthetic reward's batch."""
    samples: int = 16
    """Pictures of an iteration."""
    steps: int = 50
    """Denoising steps T."""
    dtype: str = "bfloat16"
    """Type of the frozen weights; full training keeps float32 weights and computes in bfloat16."""
    device: str = "cuda"
    """Device."""
    reward: str = "Compressibility"
    """Reward by name."""
    reward_kwargs: str = "{}"
    """Its keywords, as JSON."""
    variant: Variant = "plain"
    """How the UNet that trains is laid out and run."""


@dataclass(frozen=True)
class RunOptions:
    """Measure LoRA and full training at several batch sizes."""

    model: str
    """A pipeline directory."""
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Batch sizes."""
    trainables: tuple[Literal["lora", "full"], ...] = ("lora", "full")
    """What trains."""
    variants: tuple[Variant, ...] = ("plain",)
    """How the UNet that trains is laid out and run."""
    samples: int = 16
    """Pictures of an iteration."""
    steps: int = 50
    """Denoising steps T."""
    dtype: str = "bfloat16"
    """Type of the frozen weights."""
    device: str = "cuda"
    """Device."""
    reward: str = "Compressibility"
    """Reward by name."""
    reward_kwargs: str = "{}"
    """Its keywords, as JSON."""
    records: Path = RECORDS
    """Where the records go."""


@dataclass(frozen=True)
class PageOptions:
    """Write the table of docs/gpu.md."""

    records: Path = RECORDS
    """The records."""
    page: Path = ROOT / "docs" / "gpu.md"
    """The page; what stands between its `gpu` markers is written anew."""


def measure(row: Row) -> dict[str, Any]:
    """Seconds of a rollout and of an update, and the peak memory, after one iteration to warm up."""
    import numpy as np

    from diffusion_gym.agents.rollout import collect_many

    torch.manual_seed(0)
    env, agent = _env_and_agent(row)
    policy = agent.policy
    observation, _ = env.reset(seed=0)
    with torch.no_grad():
        forward = operations(lambda: policy.distribution(observation)) / row.batch
    both = operations(lambda: policy(observation, observation["latents"]).sum().backward()) / row.batch
    _apply(row.variant, policy.unet)
    seconds: dict[str, float] = {}
    for iteration in range(2):
        synchronize(row.device)
        started = time.perf_counter()
        trajectories = collect_many(env, policy, row.samples, (0, iteration))
        synchronize(row.device)
        sampled = time.perf_counter()
        agent.update(trajectories, np.random.default_rng(iteration))
        synchronize(row.device)
        seconds = {"rollout": sampled - started, "update": time.perf_counter() - sampled}
    transitions = row.samples * len(policy.stochastic_steps)
    rate = matrix_rate(row.device, getattr(torch, row.dtype))
    return {
        "rollout_seconds": seconds["rollout"],
        "update_seconds": seconds["update"],
        "rollout_images_per_second": row.samples / seconds["rollout"],
        "update_transitions_per_second": transitions / seconds["update"],
        "images_per_second": row.samples / sum(seconds.values()),
        "matrix_rate": rate,
        "rollout_share": forward * row.samples * row.steps / seconds["rollout"] / rate,
        "update_share": both * transitions / seconds["update"] / rate,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if row.device.startswith("cuda") else None,
        "card": torch.cuda.get_device_name() if row.device.startswith("cuda") else "CPU",
        "torch": torch.__version__,
        "picture": list(env.unwrapped.model.image_shape),  # type: ignore[attr-defined]
    }


def _env_and_agent(row: Row) -> tuple[Any, Any]:
    import gymnasium as gym
    from gymnasium.vector import AutoresetMode

    import diffusion_gym
    from diffusion_gym.agents import DenoisingPolicy
    from diffusion_gym.agents.algorithms import DDPOIS

    gym.register_envs(diffusion_gym)
    full = row.trainable == "full"
    env = gym.make_vec(
        "DiffusionDenoise-v0",
        num_envs=row.batch,
        model=row.model,
        reward=row.reward,
        reward_kwargs=json.loads(row.reward_kwargs),
        prompts="common-animals",
        num_inference_steps=row.steps,
        device=row.device,
        dtype="float32" if full else row.dtype,
        autoreset_mode=AutoresetMode.DISABLED,
    )
    options = DDPOIS.Config(
        trainable=row.trainable,
        batch_size=row.samples,
        micro_batch_size=row.batch,
        mixed_precision="bf16" if row.dtype == "bfloat16" else "no",
        learning_rate=1e-5 if full else 3e-4,
    )
    policy = DenoisingPolicy.from_env(env, trainable=row.trainable)
    return env, DDPOIS(policy, options)


def _apply(variant: Variant, unet: torch.nn.Module) -> None:
    if "channels-last" in variant:
        unet.to(memory_format=torch.channels_last)
    if "compiled" in variant:
        unet.compile()


def run(options: RunOptions) -> None:
    """Measure every row in a process of its own; prints each as it comes."""
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(f"error: device={options.device!r} is not available here; run this on a machine with a GPU")
    shared = {key: getattr(options, key) for key in ("model", "steps", "dtype", "device", "reward", "reward_kwargs")}
    for trainable, batch, variant in itertools.product(options.trainables, options.batches, options.variants):
        samples = -(-options.samples // batch) * batch
        row = Row(trainable=trainable, batch=batch, samples=samples, variant=variant, **shared)
        command = [sys.executable, __file__, "row", "--json", json.dumps(asdict(row))]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = done.stdout.strip().splitlines()
        found = json.loads(lines[-1]) if done.returncode == 0 else {"error": _reason(done.stderr)}
        record = {**asdict(row), **found, "model": Path(row.model).name}
        write_json(options.records / f"{trainable}-{batch}-{options.reward}-{variant}.json", record)
        print(_line(record), flush=True)


def _reason(text: str) -> str:
    return "out of memory" if "OutOfMemoryError" in text else (text.strip().splitlines() or ["killed"])[-1]


def page(options: PageOptions) -> None:
    """Write the table between the page's markers; without records it says that nothing was measured."""
    records = [read_json(path) for path in sorted(options.records.glob("*.json"))]
    records.sort(key=lambda record: (record["reward"], record["trainable"] == "full", record["batch"]))
    text = "Not measured yet: no CUDA GPU was at hand."
    if records:
        cards = sorted({record["card"] for record in records if "card" in record})
        head = " | ".join(["training", "batch", "reward", "UNet", "rollout, images/s", "of the card", *_HEAD])
        text = "\n".join([f"Card: {', '.join(cards)}.", "", f"| {head} |", "|---" * 10 + "|", *map(_line, records)])
    write_marked(options.page, {"gpu": text})


def _line(record: Mapping[str, Any]) -> str:
    start = f"| {record['trainable']} | {record['batch']} | {record['reward']} | {record['variant']} |"
    if "error" in record:
        return f"{start} {record['error']} | | | | | |"
    memory = record["peak_memory_gb"]
    return (
        f"{start} {record['rollout_images_per_second']:.2f} | {record['rollout_share']:.0%} | "
        f"{record['update_transitions_per_second']:.1f} | {record['update_share']:.0%} | "
        f"{record['images_per_second']:.3f} | {'' if memory is None else f'{memory:.1f}'} |"
    )


@dataclass(frozen=True)
class RowOptions:
    """Measure one row and print it as JSON; `run` calls this."""

    json: str
    """The row."""


def row(options: RowOptions) -> None:
    """Measure one row and print it as JSON; `run` calls this."""
    print(json.dumps(measure(Row(**json.loads(options.json)))))


def main() -> None:
    """Run a command."""
    commands = {"run": run, "page": page, "row": row}
    tyro.extras.subcommand_cli_from_dict(commands, config=(tyro.conf.OmitArgPrefixes,))


if __name__ == "__main__":
    main()
