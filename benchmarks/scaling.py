"""How an iteration of DDPO_IS grows with the batch, T, the latents and the prompts, and what a micro-batch costs.

    python benchmarks/scaling.py run                    # a record for each value; minutes on a CPU
    python benchmarks/scaling.py page                   # the tables of docs/speed.md from the records alone

Every value is measured in a process of its own, so that its peak memory is its own. Random weights do not change the
speed, and a UNet takes latents of any side: one pipeline serves all.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

import numpy as np
import torch
import tyro
from peers.page_options import PageOptions
from peers.workload import Meter, Workload
from scaling_page import numbers, tables

from diffusion_gym.agents.report.marked import write_marked
from diffusion_gym.storage import read_json, write_json

ROOT: Final = Path(__file__).resolve().parent.parent
RECORDS: Final = ROOT / "docs" / "results" / "scaling"
PAGE: Final = PageOptions(RECORDS, ROOT / "docs" / "speed.md")

Axis = Literal["batch", "steps", "latents", "prompts", "micro-batch"]


@dataclass(frozen=True)
class Setting:
    """What is sampled and trained in an iteration."""

    batch: int = 8
    """Trajectories, sampled at once and behind one update."""
    steps: int = 4
    """Denoising steps T."""
    side: int = 16
    """Height and width of the latents."""
    prompts: int = 16
    """Distinct prompts in the set."""
    micro_batch: int = 8
    """Transitions in one forward and backward pass."""


AXES: Final[dict[Axis, tuple[Setting, ...]]] = {
    "batch": tuple(Setting(batch=size) for size in (4, 8, 16, 32)),
    "steps": tuple(Setting(4, steps=size, micro_batch=4) for size in (5, 10, 20, 40)),
    "latents": tuple(Setting(4, side=size, micro_batch=4) for size in (8, 16, 24, 32)),
    "prompts": tuple(Setting(prompts=size) for size in (1, 16, 256, 4096)),
    "micro-batch": tuple(Setting(16, side=side, micro_batch=size) for side in (8, 16) for size in (4, 8, 16, 32, 64)),
}


@dataclass(frozen=True)
class RunOptions:
    """Measure every value of the axes."""

    pipeline: Path | None = None
    """A Stable Diffusion directory; by default a small one of random weights is written."""
    axes: tuple[Axis, ...] = tuple(AXES)
    """What grows."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """What the UNet computes in."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device."""
    records: Path = RECORDS
    """Where the records go."""


@dataclass(frozen=True)
class ValueOptions:
    """Measure one value and print it as JSON; `run` calls this."""

    json: str
    """Axis, setting and workload."""


def measure(axis: Axis, setting: Setting, workload: Workload) -> dict[str, Any]:
    """Rollouts and updates of one setting: the meter's line, and what the bare UNet takes where the latents grow."""
    workload.prepare()
    import gymnasium as gym
    from gymnasium.vector import AutoresetMode

    import diffusion_gym
    from diffusion_gym.agents import DenoisingPolicy
    from diffusion_gym.agents.algorithms import DDPOIS

    gym.register_envs(diffusion_gym)
    env = gym.make_vec(
        "DiffusionDenoise-v0",
        num_envs=setting.batch,
        model=workload.pipeline,
        reward="Compressibility",
        prompts=[f"animal number {number}" for number in range(setting.prompts)],
        num_inference_steps=setting.steps,
        guidance_scale=workload.guidance,
        eta=workload.eta,
        device=workload.device,
        autoreset_mode=AutoresetMode.DISABLED,
    )
    policy = DenoisingPolicy.from_env(env, trainable="full")
    sizes = {"batch_size": setting.batch, "micro_batch_size": setting.micro_batch}
    agent = DDPOIS(policy, DDPOIS.Config(trainable="full", mixed_precision=workload.precision, **sizes))
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak of loading
    loaded = torch.cuda.memory_allocated() / 2**20 if workload.device == "cuda" else None
    meter, sampled = Meter(workload), None
    for iteration in range(workload.warmup + workload.epochs):
        meter.next_iteration()
        with meter.phase("rollout"):
            trajectories = agent.sample(env, setting.batch, (workload.seed, iteration))
        sampled = sampled or meter.line("rollout", 0)  # the first one: no update has left memory behind
        with meter.phase("update"):
            agent.update(trajectories, np.random.default_rng(iteration))
    peaks = {f"rollout_{name}": sampled[name] for name in ("peak_rss_mb", "peak_cuda_mb")} if sampled else {}
    extra = {"axis": axis, "size": size(axis, setting), "setting": asdict(setting), "loaded_cuda_mb": loaded, **peaks}
    line = meter.line("diffusion_gym", sum(parameter.numel() for parameter in agent.parameters), **extra)
    return {**line, "bare": _bare(policy, setting, workload) if axis == "latents" else []}


def _bare(policy: Any, setting: Setting, workload: Workload) -> list[dict[str, float]]:
    """The UNet's own part of such iterations, with noise for latents."""
    model, meter, both = policy.model, Meter(workload), 2 * setting.batch  # guided: two predictions a latent
    latents = torch.randn(both, *model.latent_shape, device=policy.device)
    times = policy.table.network_timesteps[:1].expand(both)
    embeddings = model.embed(model.tokenize([""])).expand(both, -1, -1)

    def predict(count: int) -> torch.Tensor:
        own = [part[: 2 * count] for part in (latents, times, embeddings)]
        with torch.autocast(workload.device, workload.dtype, enabled=workload.precision != "no"):
            return cast(torch.Tensor, model.predict(policy.unet, *own))

    for _ in range(workload.warmup + workload.epochs):
        meter.next_iteration()
        with meter.phase("rollout"), torch.no_grad():
            for _ in range(setting.steps):
                predict(setting.batch)
        with meter.phase("update"):
            for _ in range(setting.batch * setting.steps // setting.micro_batch):
                predict(setting.micro_batch).float().square().mean().backward()
    return meter.iterations[workload.warmup :]


def run(options: RunOptions) -> None:
    """Measure every value in a process of its own; prints each as it comes.

    Raises:
        SystemExit: one failed.
    """
    from diffusion_gym.testing.random_pipeline import write_pipeline

    with tempfile.TemporaryDirectory() as folder:
        pipeline = options.pipeline or write_pipeline(Path(folder) / "small", "small", 0, torch.float32)
        for axis in options.axes:
            for setting in AXES[axis]:
                sized = with_side(pipeline, Path(folder) / str(setting.side) / pipeline.name, setting.side)
                record = _in_a_process(axis, setting, _workload(setting, sized, options.precision, options.device))
                write_json(options.records / f"{options.device}-{axis}-{_slug(axis, setting)}.json", record)
                found = ", ".join(f"{name} {value:.3g}" for name, value in numbers(record).items())
                print(f"{axis} {_slug(axis, setting)}: {found}", flush=True)


def _workload(setting: Setting, pipeline: Path, precision: Any, device: Any) -> Workload:
    sizes: dict[str, Any] = dict.fromkeys(("samples", "sample_batch", "train_batch"), setting.batch)
    sizes |= {"accumulation": 1, "micro_batch": setting.micro_batch, "steps": setting.steps}
    return Workload(str(pipeline), precision=precision, device=device, **sizes)


def _in_a_process(axis: Axis, setting: Setting, workload: Workload) -> dict[str, Any]:
    value = json.dumps({"axis": axis, "setting": asdict(setting), "workload": asdict(workload)})
    environment = {**os.environ, "OMP_NUM_THREADS": str(workload.threads)}
    command = [sys.executable, __file__, "value", "--json", value]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"error: {axis}, {setting} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _slug(axis: Axis, setting: Setting) -> str:
    return f"{setting.side}-{setting.micro_batch}" if axis == "micro-batch" else str(size(axis, setting))


def with_side(pipeline: Path, folder: Path, side: int) -> Path:
    """The pipeline for latents of another side, in `folder`: links to its files, and configs of its own."""
    if not folder.exists():
        shutil.copytree(pipeline.resolve(), folder, copy_function=os.symlink)
        unet, vae = folder / "unet" / "config.json", folder / "vae" / "config.json"
        pixels = side * 2 ** (len(read_json(vae)["block_out_channels"]) - 1)
        for path, value in ((unet, side), (vae, pixels)):
            config = {**read_json(path), "sample_size": value}
            path.unlink()  # the link: what is written goes through it
            write_json(path, config)
    return folder


def size(axis: Axis, setting: Setting) -> int:
    """What an axis's times and memory are held against: its own number, for latents their positions."""
    own = {"batch": setting.batch, "steps": setting.steps, "latents": setting.side**2, "prompts": setting.prompts}
    return own.get(axis, setting.micro_batch)


def page(options: PageOptions = PAGE) -> None:
    """Write the tables between the page's markers, from the records alone."""
    records = [read_json(path) for path in sorted(options.records.glob("*.json"))]
    text = tables(records) if records else "Not measured yet."
    write_marked(options.page, {"scaling": text})


def value(options: ValueOptions) -> None:
    """Measure one value and print it as JSON; `run` calls this."""
    asked = json.loads(options.json)
    print(json.dumps(measure(asked["axis"], Setting(**asked["setting"]), Workload(**asked["workload"]))))


def main() -> None:
    """Run a command."""
    commands = {"run": run, "page": page, "value": value}
    tyro.extras.subcommand_cli_from_dict(commands, config=(tyro.conf.OmitArgPrefixes,))


if __name__ == "__main__":
    main()
