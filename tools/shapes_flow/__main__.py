"""Makes the weights of `ShapesFlow`: draw, train, choose the snapshot, export, measure.

Run `python -m tools.shapes_flow --help` in the repository's root. Stopped at any point, the same command goes on.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from diffusion_gym.models.shapes.vocabulary import write_tokenizer
from diffusion_gym.storage import load_tensors, save_tensors
from tools.shapes_flow.data import training_set
from tools.shapes_flow.export import distance, export, load, rates
from tools.shapes_flow.networks import make_trained
from tools.shapes_flow.training import Schedule, Trainer

_SHARES = (
    (0.0, {"color": 0.1, "count": 0.25, "composition": 0.15, "location": 0.5}),
    (0.5, {"color": 0.15, "count": 0.25, "composition": 0.05, "location": 0.4, "plain location": 0.15}),
)


@dataclass(frozen=True)
class BuildConfig:
    """Train the embedded `ShapesFlow` model from scratch."""

    work: Path = Path("runs/shapes-flow-build")
    """Where the training set, the state and the snapshots are kept, to go on from."""
    out: Path | None = None
    """Where the chosen pipeline directory is written; WORK/pipeline by default."""
    stop_after: Literal["data", "train", "export"] = "export"
    """The last stage of this call: draw and encode, train, or choose and export."""
    seed: int = 0
    """Seed of the pictures and of the training."""
    device: str = "cpu"
    """Device to train and measure on."""
    threads: int = 1
    """OpenMP threads; on a shared machine one is often faster than two."""
    workers: int = 2
    """Processes that draw."""
    pictures: int = 60_000
    """Pictures drawn to train on."""
    steps: int = 12_000
    """Steps of the training, and the length of its learning-rate schedule."""
    batch: int = 512
    """Latents a step."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    ema: float = 0.999
    """Decay of the moving average of the weights."""
    time_mean: float = 0.3
    """Mean of the logit of the times t that are trained on; above 0 is noisier."""
    time_std: float = 1.2
    """Its standard deviation."""
    seconds: float = 36_000.0
    """Time after which the training stops, keeps its state and exports what it has."""
    snapshot_every: int = 500
    """Steps between two snapshots of the averaged weights, a multiple of 100."""
    samples: int = 64
    """Samples a family behind the rates of a snapshot; 0 does not measure while training."""
    guidance: float = 2.0
    """Guidance scale of those rates."""
    graph: bool = True
    """On CUDA, replay a step as one recorded graph."""
    snapshot: int | None = None
    """The snapshot to export, by its step; by default the one whose rates leave most room within the ranges."""


def train(config: BuildConfig) -> None:
    """Draw and encode if need be, then train, with snapshots on the way."""
    started = time.monotonic()
    torch.set_num_threads(config.threads)
    tokenizer = write_tokenizer(config.work / "tokenizer")
    data = training_set(
        config.work / "data.safetensors", tokenizer, number=config.pictures, seed=config.seed, workers=config.workers
    )
    print(f"{len(data.latents)} pictures after {time.monotonic() - started:.0f} s", flush=True)
    if config.stop_after == "data":
        return
    torch.manual_seed(config.seed)
    networks = make_trained(tokenizer).to(config.device)
    schedule = Schedule(
        steps=config.steps,
        batch=config.batch,
        lr=config.lr,
        ema=config.ema,
        shares=_SHARES,
        time_mean=config.time_mean,
        time_std=config.time_std,
    )
    trainer = Trainer(networks, data, schedule, config.work, seed=config.seed, graph=config.graph)

    def look(step: int) -> None:
        save_tensors(_snapshot(config, step), {name: value.half() for name, value in trainer.averaged().items()})
        if config.samples:
            _measure(config, step)

    trainer.run(started + config.seconds, look, config.snapshot_every)
    print(f"trained to step {trainer.step} after {time.monotonic() - started:.0f} s", flush=True)


def _snapshot(config: BuildConfig, step: int) -> Path:
    return config.work / "snapshots" / f"{step}.safetensors"


def _write(config: BuildConfig, step: int, folder: Path) -> Path:
    export(folder, {name: value.float() for name, value in load_tensors(_snapshot(config, step)).items()})
    return folder


def _measure(config: BuildConfig, step: int) -> None:
    """Add a line to `rates.jsonl`."""
    folder = _write(config, step, config.work / "measured")
    found = rates(load(folder, torch.device(config.device)), config.samples, config.guidance)
    with (config.work / "rates.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "guidance": config.guidance, "samples": config.samples, **found}) + "\n")
    print(f"step {step}: " + ", ".join(f"{key} {value:.2f}" for key, value in found.items()), flush=True)


def choose(config: BuildConfig) -> int:
    """The step of the snapshot to export."""
    if config.snapshot is not None:
        return config.snapshot
    lines = (config.work / "rates.jsonl").read_text(encoding="utf-8").splitlines()
    return min((json.loads(line) for line in lines), key=distance)["step"]


def main(config: BuildConfig) -> None:
    """Run the stages."""
    train(config)
    if config.stop_after == "export":
        step = choose(config)
        folder = _write(config, step, config.out or config.work / "pipeline")
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(f"snapshot {step} in {folder}, {size / 1e6:.2f} MB", flush=True)
        model = load(folder, torch.device(config.device))
        for guidance in (1.0, 1.5, 2.0, 3.0, 4.5):
            found = rates(model, max(config.samples, 64), guidance)
            print(f"guidance {guidance}: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()), flush=True)


if __name__ == "__main__":
    main(tyro.cli(BuildConfig))
