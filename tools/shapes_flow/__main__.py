"""Makes the weights of `ShapesFlow`: draw, train, choose the snapshot, polish it, export, measure.

Run `python -m tools.shapes_flow --help` in the repository's root. Stopped at any point, the same command goes on.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from diffusion_gym.config import SamplerConfig
from diffusion_gym.models.shapes_flow import WEIGHTS
from diffusion_gym.storage import load_tensors, save_tensors
from tools.shapes.measure import parameter_counts, rate_table, weights_size, write_model_card
from tools.shapes.vocabulary import write_tokenizer
from tools.shapes_flow.data import training_set
from tools.shapes_flow.export import distance, export, is_too_good, load, rates
from tools.shapes_flow.networks import begin_with_shapes, make_trained
from tools.shapes_flow.polish import polish
from tools.shapes_flow.teacher import Teacher
from tools.shapes_flow.training import Phase, Schedule, Trainer

# Relations between things are learned last, and outrun the rest once they are. How many things there are, and where, is
# settled at the noisy end.
_PHASES = (
    Phase(0, 8_000, {"color": 0.1, "count": 0.25, "composition": 0.15, "location": 0.5}, 0.3),
    Phase(
        4_000, 8_000, {"color": 0.15, "count": 0.25, "composition": 0.05, "location": 0.4, "plain location": 0.15}, 0.3
    ),
    Phase(
        6_500, 9_000, {"color": 0.3, "count": 0.25, "composition": 0.4, "location": 0.03, "plain location": 0.02}, 0.3
    ),
    Phase(
        7_500, 9_500, {"color": 0.3, "count": 0.25, "composition": 0.4, "location": 0.03, "plain location": 0.02}, 1.0
    ),
    Phase(9_000, 14_000, {"color": 0.4, "count": 0.3, "composition": 0.28, "location": 0.02}, 0.5, guidance=3.0),
)

_ABOUT = """\
A rectified-flow transformer in diffusers' `StableDiffusion3Pipeline` layout: SD3's MMDiT of 6 layers of width 128 on
the latents of Shapes' autoencoder, in patches of 2, which makes 16 tokens of image and 16 of text. It draws the scenes
of `Shapes` (one to four circles, squares, triangles and stars in six colors), so that the same prompts and the same
exact detector serve it, and it leaves room for improvement on purpose.

It is distilled from Shapes: it begins with its text encoder, and below t = 0.9 learns the velocity that Shapes'
denoiser implies in place of noise less picture, at last that under guidance 3, so that it needs no guidance itself.
Made by `python -m tools.shapes_flow`; no outside data or weights. The sampler is Euler's method, eta = 0, or
Flow-GRPO's SDE."""


@dataclass(frozen=True)
class BuildConfig:
    """Train the embedded `ShapesFlow` model from scratch."""

    work: Path = Path("runs/shapes-flow-build")
    """Where the training set, the state and the snapshots are kept, to go on from."""
    out: Path = WEIGHTS
    """Where the chosen pipeline directory is written."""
    only: Literal["data", "train", "choose"] | None = None
    """One stage alone: draw and encode, train and keep the best snapshots, or choose one of them, polish and export
    it."""
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
    steps: int = 10_000
    """Steps of the training, in the phases of this file."""
    batch: int = 64
    """Latents a step."""
    lr: float = 8e-4
    """Peak learning rate of AdamW."""
    ema: float = 0.999
    """Decay of the moving average of the weights."""
    time_std: float = 1.2
    """Standard deviation of the logit of the times t that are trained on."""
    seconds: float = 36_000.0
    """Time after which the training stops, keeps its state and exports what it has."""
    snapshot_every: int = 500
    """Steps between two snapshots of the averaged weights, a multiple of 100."""
    samples: int = 64
    """Samples a family behind the rates of a snapshot; 0 does not measure while training."""
    card_samples: int = 256
    """Samples a family behind each number of the model card."""
    guidance: float = 1.0
    """Guidance scale of those rates."""
    teacher: bool = True
    """Distil Shapes: its text encoder to begin with, and its velocities in place of noise less picture."""
    graph: bool = True
    """On CUDA, replay a step as one recorded graph."""
    keep: int = 6
    """Snapshots that are copied to WORK/best, with their rates."""
    polish_queries: int = 15_360
    """Pictures that the detector judges while the chosen snapshot learns from it; 0 exports the snapshot itself."""
    snapshot: int | None = None
    """The snapshot to choose, by its step; by default the one whose rates leave most room within the ranges."""


def train(config: BuildConfig) -> None:
    """Draw and encode if need be, then train, with snapshots on the way."""
    started = time.monotonic()
    torch.set_num_threads(config.threads)
    tokenizer = write_tokenizer(config.work / "tokenizer")
    data = training_set(
        config.work / "data.safetensors",
        tokenizer,
        number=config.pictures,
        seed=config.seed,
        workers=config.workers,
        device=torch.device(config.device),
    )
    print(f"{len(data.latents)} pictures after {time.monotonic() - started:.0f} s", flush=True)
    if config.only == "data":
        return
    torch.manual_seed(config.seed)
    networks = make_trained(tokenizer)
    if config.teacher:
        begin_with_shapes(networks)
    networks.to(config.device)
    schedule = Schedule(
        steps=config.steps,
        batch=config.batch,
        lr=config.lr,
        ema=config.ema,
        phases=_PHASES,
        time_std=config.time_std,
    )
    teacher = Teacher(torch.device(config.device)) if config.teacher else None
    trainer = Trainer(networks, data, schedule, config.work, seed=config.seed, graph=config.graph, teacher=teacher)

    def look(step: int) -> bool:
        save_tensors(_snapshot(config, step), {name: value.half() for name, value in trainer.averaged().items()})
        return config.samples > 0 and is_too_good(_measure(config, step))

    trainer.run(started + config.seconds, look, config.snapshot_every)
    print(f"trained to step {trainer.step} after {time.monotonic() - started:.0f} s", flush=True)
    if not config.samples:
        return
    (config.work / "best").mkdir(exist_ok=True)
    for line in _best(config):
        shutil.copy(_snapshot(config, line["step"]), config.work / "best")
    shutil.copy(config.work / "rates.jsonl", config.work / "best")


def _snapshot(config: BuildConfig, step: int) -> Path:
    return config.work / "snapshots" / f"{step}.safetensors"


def _write(config: BuildConfig, step: int, folder: Path, changed: Mapping[str, torch.Tensor] | None = None) -> Path:
    """The pipeline directory of a snapshot, with `changed` in place of its weights of the same names."""
    stored = {name: value.float() for name, value in load_tensors(_snapshot(config, step)).items()}
    export(folder, {**stored, **(changed or {})})
    return folder


def _polished(config: BuildConfig, step: int) -> dict[str, torch.Tensor]:
    """The weights of a snapshot that polishing changed."""
    if not config.polish_queries:
        return {}
    return polish(
        _write(config, step, config.work / "chosen"),
        config.work / f"polish-{step}",
        queries=config.polish_queries,
        seed=config.seed,
        device=config.device,
        threads=config.threads,
    )


def _measure(config: BuildConfig, step: int) -> dict[str, float]:
    """Add a line to `rates.jsonl`."""
    folder = _write(config, step, config.work / "measured")
    found = rates(load(folder, torch.device(config.device)), config.samples, config.guidance)
    with (config.work / "rates.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "guidance": config.guidance, "samples": config.samples, **found}) + "\n")
    print(f"step {step}: " + ", ".join(f"{key} {value:.2f}" for key, value in found.items()), flush=True)
    return found


def _best(config: BuildConfig) -> list[dict[str, Any]]:
    """The lines of the `keep` snapshots that are best by `distance`, the best first."""
    lines = [json.loads(line) for line in (config.work / "rates.jsonl").read_text(encoding="utf-8").splitlines()]
    newest = {line["step"]: line for line in lines}
    here = [line for line in newest.values() if _snapshot(config, line["step"]).exists()]
    return sorted(here, key=distance)[: config.keep]


def main(config: BuildConfig) -> None:
    """Run the stages."""
    if config.only != "choose":
        train(config)
    if config.only in (None, "choose"):
        step = _best(config)[0]["step"] if config.snapshot is None else config.snapshot
        folder = _write(config, step, config.out, _polished(config, step))
        model = load(folder, torch.device(config.device))
        settings = [
            SamplerConfig(guidance_scale=guidance, num_inference_steps=steps, eta=eta)
            for eta, steps, guidance in (
                (0.0, 10, 1.0),
                (0.0, 20, 1.0),
                (0.0, 10, 2.0),
                (0.7, 10, 1.0),
                (0.7, 20, 1.0),
            )
        ]
        facts = {
            "parameters": parameter_counts(
                {"transformer": model.unet, "text encoder": model.text_encoder, "autoencoder": model.vae}
            ),
            "size": weights_size(folder),
            "training set": f"{config.pictures} pictures of 32x32, seed {config.seed}",
            "training": f"snapshot of step {step} of {config.steps}, {config.batch} latents a step; averaged weights",
            "polishing": f"AWM on captions of one and of two things, {config.polish_queries:,} pictures judged",
        }
        table = rate_table(model, settings, config.card_samples)
        write_model_card(folder / "README.md", "ShapesFlow", _ABOUT, facts, table)
        print(table)


if __name__ == "__main__":
    main(tyro.cli(BuildConfig))
