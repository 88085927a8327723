"""Everything that is measured on a CUDA GPU, in one go: it needs no network, can be cut off, and goes on where it was.

    python benchmarks/gpu.py run --trl TRL/bin/python      # on a machine with a GPU: prints each table as it has it
    python benchmarks/gpu.py page                          # the tables of docs/gpu.md from the records alone

The parts come in the order of their importance: the tests that need a GPU, LoRA on Stable Diffusion 1.4's exact shape,
TRL beside this package in turns, all weights, variants of how the network runs, larger models, and the embedded model
trained to the demonstration's success. Pipelines have random weights, which do not change the speed; they are written
to `--work` when they are missing. Each result is a record of its own; what has one is not measured again. `--trl` is
described in `peers/trl_ddpo.py`. `--scale tiny --device cpu` runs the same on a CPU in minutes, as a test.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
import tyro
from gpu_rows import Row, measure
from peers.page_options import PageOptions

from diffusion_gym.agents.report.marked import markdown_table, write_marked
from diffusion_gym.storage import read_json, write_json

ROOT: Final = Path(__file__).resolve().parent.parent
RECORDS: Final = ROOT / "docs" / "results" / "gpu"
PAGE: Final = PageOptions(RECORDS, ROOT / "docs" / "gpu.md")
_OUT_OF_MEMORY: Final = "out of memory"
_SIZES: Final = {
    "exact": {"SD 1.4": "sd14", "SDXL": "sdxl", "SD 3.5 medium": "sd35-medium"},
    "tiny": {"SD 1.4": "tiny", "SDXL": "tiny-sdxl", "SD 3.5 medium": "tiny-sd3"},
}
_GUIDANCE: Final = {"SD 3.5 medium": 4.5}


@dataclass(frozen=True)
class RunOptions:
    """Measure what has no record yet."""

    parts: tuple[str, ...] = ("tests", "lora", "peers", "full", "variants", "models", "shapes")
    """Which parts, in this order."""
    seconds: float = 540.0
    """No part begins, and none goes on, after this."""
    scale: Literal["exact", "tiny"] = "exact"
    """The published shapes, or tiny ones of the same classes with few steps."""
    device: str = "cuda"
    """Device."""
    trl: Path | None = None
    """Python of TRL's virtual environment; without it `peers` has no rows of TRL's."""
    work: Path = ROOT / "build" / "gpu"
    """Where pipelines and the trained run are written."""
    records: Path | None = None
    """Where the records go; by default docs/results/gpu for exact shapes on a GPU, else a folder in `--work`."""

    @property
    def folder(self) -> Path:
        """The folder of the records."""
        measures = self.scale == "exact" and self.device.startswith("cuda")
        return self.records or (RECORDS if measures else self.work / f"records-{self.scale}-{self.device}")


@dataclass(frozen=True)
class PartOptions(RunOptions):
    """Measure one part in this process; `run` calls this."""

    part: str = "lora"
    """Its name."""


# The rows of a part -------------------------------------------------------------------------------------------------


def rows(part: str, options: RunOptions) -> dict[str, Row]:
    """The rows of a part by name; the model is given by its name until `_pipeline` writes it."""
    exact = options.scale == "exact"
    largest = 16 if exact else 2
    base = Row("SD 1.4", device=options.device, dtype="bfloat16" if exact else "float32", steps=50 if exact else 2)
    if part in ("lora", "full"):
        found = {
            f"{part}-{batch}": replace(base, batch=batch) for batch in ((1, 4, largest) if exact else (1, largest))
        }
        if part == "lora":
            found["lora-4-float32"] = replace(base, batch=4, dtype="float32", steps=10 if exact else 2)
        return {name: replace(row, trainable=part, samples=max(4, row.batch)) for name, row in found.items()}  # type: ignore[arg-type]
    if part == "variants":
        large, small = replace(base, samples=largest, batch=largest), replace(base, batch=1, samples=2)
        found = {name: replace(large, variant=name) for name in ("autotuned", "channels-last")}
        compiled = {
            "compiled": replace(large, variant="compiled"),
            "graphs-1": replace(small, variant="compiled-graphs"),
        }
        return {**found, **compiled} if exact else found  # on a CPU compiling takes minutes
    names = [name for name in _SIZES[options.scale] if name != "SD 1.4"]
    steps = {"SDXL": 50, "SD 3.5 medium": 10} if exact else dict.fromkeys(names, 2)
    base = replace(base, batch=4 if exact else 2, samples=4)
    return {
        _SIZES["exact"][name]: replace(base, model=name, steps=steps[name], guidance=_GUIDANCE.get(name, base.guidance))
        for name in names
    }


def measure_rows(options: PartOptions) -> None:
    """Measure the rows of a part one after another; each is a record as soon as it is there."""
    for name, row in rows(options.part, options).items():
        if _is_done(options.folder / f"{options.part}--{name}.json"):
            continue
        try:
            found = measure(replace(row, model=str(_pipeline(row.model, options))))
        except (RuntimeError, ValueError) as error:  # torch.compile's errors are RuntimeErrors, too
            memory = isinstance(error, torch.OutOfMemoryError)
            found = {"error": _OUT_OF_MEMORY if memory else f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        record = {"part": options.part, "name": name, **asdict(row), **found}
        write_json(options.folder / f"{options.part}--{name}.json", record)
        print(" | ".join(_cells(record)), flush=True)


def _pipeline(model: str, options: RunOptions) -> Path:
    """The random pipeline of a model, written on the device, which draws the weights sooner."""
    from diffusion_gym.testing.random_pipeline import write_pipeline

    size = _SIZES[options.scale][model]
    folder = options.work / size
    if not (folder / "model_index.json").exists():
        with torch.device(options.device):
            write_pipeline(folder, size, 0, torch.float32 if size in ("sd14", "tiny") else torch.bfloat16)
    return folder


# The other parts ----------------------------------------------------------------------------------------------------


def run_tests(options: PartOptions) -> None:
    """The tests marked `gpu` (on a CPU, in place of them, a few others)."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    missing = [name for name in ("stable_baselines3", "tianshou") if importlib.util.find_spec(name) is None]
    folders = {"stable_baselines3": "sb3", "tianshou": "tianshou"}
    files = [path for path in files if not any(folders[name] in path.parts for name in missing)]
    if options.device == "cpu":
        files = [ROOT / "tests" / "test_registry.py"]
    report = options.work / "tests.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    marked = ["-m", "gpu"] if options.device != "cpu" else []
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *marked]
    subprocess.run([*command, *map(str, files)], cwd=ROOT, check=False)
    suite = next(iter(xml.parse(report).getroot()))
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = [str(case.get("name")) for case in suite.iter("testcase") if case.find("failure") is not None]
    _write(options, "tests", {**counts, "failed": failed, "left_out": missing})


def run_peers(options: PartOptions) -> None:
    """TRL and this package in turns: `peers/compare.py` on Stable Diffusion's shape with LoRA."""
    pipeline = _pipeline("SD 1.4", options)
    exact = options.scale == "exact"
    sizes = ("--samples", "8", "--steps", "20" if exact else "2", "--rounds", "2" if exact else "1")
    flags = ("--precision", "bf16" if exact else "no", "--device", options.device, "--trainables", "lora")
    trl = ("--trl", str(options.trl)) if options.trl else ()
    script = ROOT / "benchmarks" / "peers" / "compare.py"
    records = options.folder / "peers"
    command = [sys.executable, str(script), "run", "--pipeline", str(pipeline), "--records", str(records), *sizes]
    subprocess.run([*command, *flags, "--threads", "4", *trl], check=True)
    _write(options, "turns", {"programs": len(list(records.glob("*.json")))})


def run_shapes(options: PartOptions) -> None:
    """The embedded models trained as the demonstration does, and measured."""
    for model in _RESULTS["shapes"]:
        if not _is_done(options.folder / f"{options.part}--{model}.json"):
            _write(options, model, _train_and_measure(model, options))


def _train_and_measure(model: str, options: PartOptions) -> dict[str, Any]:
    from diffusion_gym.agents.demo import RECIPES

    folder, (agent, preset) = options.work / model, RECIPES[model]
    if (folder / "config.json").exists():
        train = ["--resume"]
    else:
        train = ["--env", f"DiffusionDenoise-{model}-Location-v0", "--agent", agent, "--preset", preset]
        train += ["--seed", "0", "--env.device", options.device]
        if options.scale == "tiny":
            train += ["--total-reward-queries", "64"]
    command = [sys.executable, "-P", "-m", "diffusion_gym.agents.cli"]
    subprocess.run([*command, "train", *train, "--out", str(folder)], check=True)
    samples = "256" if options.scale == "exact" else "16"
    done = subprocess.run(
        [*command, "eval", str(folder), "--json", "--samples", samples], check=True, stdout=-1, text=True
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = json.loads(done.stdout)
    return {
        "seconds": sum(line["seconds"] for line in lines),
        "reward_queries": lines[-1]["reward_queries"],
        "samples": int(samples),
        **{key: found[key] for key in ("success", "base_success")},
    }


def _write(options: PartOptions, name: str, found: Mapping[str, Any]) -> None:
    card = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    write_json(
        options.folder / f"{options.part}--{name}.json", {"part": options.part, "name": name, "card": card, **found}
    )


PARTS: Final[dict[str, Callable[[PartOptions], None]]] = {
    "tests": run_tests,
    "lora": measure_rows,
    "peers": run_peers,
    "full": measure_rows,
    "variants": measure_rows,
    "models": measure_rows,
    "shapes": run_shapes,
}
_RESULTS: Final = {"tests": ("tests",), "peers": ("turns",), "shapes": ("Shapes", "ShapesFlow")}


# Running and showing ------------------------------------------------------------------------------------------------


def run(options: RunOptions) -> None:
    """Run each part in a process of its own within what is left of the time.

    Raises:
        SystemExit: the device is not there, or a part is unknown.
    """
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(f"error: device={options.device!r} is not available here; run this on a machine with a GPU")
    if unknown := [part for part in options.parts if part not in PARTS]:
        raise SystemExit(f"error: parts={unknown} are not known; there are {', '.join(PARTS)}")
    end = time.monotonic() + options.seconds
    for part in options.parts:
        names = _RESULTS.get(part) or rows(part, options)
        if all(_is_done(options.folder / f"{part}--{name}.json") for name in names):
            continue
        left, began = end - time.monotonic(), time.monotonic()
        how = "no time was left" if left < 10 else _in_process(PartOptions(**{**asdict(options), "part": part}), left)
        print(f"\n## {part}: {how} ({time.monotonic() - began:.0f} s)\n\n{table(part, options.folder)}\n", flush=True)


def _in_process(options: PartOptions, left: float) -> str:
    """Run a part in a process of its own; what became of it."""
    command = [sys.executable, __file__, "part", "--json", json.dumps(asdict(options), default=str)]
    try:
        code = subprocess.run(command, timeout=left, env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode
    except subprocess.TimeoutExpired:
        return "cut off"
    return "done" if code == 0 else f"ended with {code}"


@dataclass(frozen=True)
class JsonOptions:
    """Measure one part; `run` calls this."""

    json: str
    """Its options."""


def part(options: JsonOptions) -> None:
    """Measure one part in this process."""
    values = json.loads(options.json)
    paths = {key: Path(values[key]) for key in ("trl", "work", "records") if values[key]}
    chosen = PartOptions(**{**values, **paths, "parts": tuple(values["parts"])})
    PARTS[chosen.part](chosen)


def _is_done(path: Path) -> bool:
    """Whether a record is there, and no failure but that of memory, which would come again."""
    return path.exists() and read_json(path).get("error", _OUT_OF_MEMORY) == _OUT_OF_MEMORY


def page(options: PageOptions = PAGE) -> None:
    """Write the tables between the page's markers; without records it says that nothing was measured.

    Raises:
        SystemExit: the records are not of a GPU.
    """
    cards = sorted({read_json(path).get("card") or "" for path in options.records.glob("*.json")} - {""})
    if "CPU" in cards:
        raise SystemExit(f"error: records={str(options.records)!r} are of a CPU; the page is for those of a GPU")
    parts = [(name, table(name, options.records)) for name in PARTS]
    shown = [f"### {_TITLES[name]}\n\n{text}" for name, text in parts if text]
    text = (
        "\n\n".join([f"Card: {', '.join(cards)}.", *shown]) if shown else "Not measured yet: no CUDA GPU was at hand."
    )
    write_marked(options.page, {"gpu": text})


_TITLES: Final = {
    "tests": "Tests",
    "lora": "LoRA on Stable Diffusion 1.4's shape",
    "peers": "Beside TRL, in turns",
    "full": "All weights of Stable Diffusion 1.4's shape",
    "variants": "How the network runs",
    "models": "Larger models, LoRA",
    "shapes": "The embedded models",
}


def table(part: str, records: Path) -> str:
    """What the records of a part say, as Markdown; empty without any."""
    if part == "peers":
        found = [read_json(path) for path in sorted((records / "peers").glob("*.json"))]
        return _peers(found) if found else ""
    found = [read_json(path) for path in records.glob(f"{part}--*.json")]
    if not found:
        return ""
    if part == "tests":
        return "\n".join(map(_tests, found))
    if part == "shapes":
        return "\n".join(map(_shapes, found))
    found.sort(key=lambda record: (record["model"], record["batch"], record["name"]))
    return markdown_table(list(_HEAD), [_cells(record) for record in found])


def _peers(records: Sequence[Mapping[str, Any]]) -> str:
    from peers.summary import summary

    return summary(records)


def _tests(record: Mapping[str, Any]) -> str:
    passed = record["tests"] - record["failures"] - record["errors"] - record["skipped"]
    failed = f", failed: {', '.join(record['failed'])}" if record["failed"] else ""
    without = f" (not those of {', '.join(record['left_out'])})" if record["left_out"] else ""
    return f"{passed} of {record['tests']} tests marked `gpu`{without} passed{failed}."


def _shapes(record: Mapping[str, Any]) -> str:
    success = f"{record['base_success']:.2f} before, {record['success']:.2f} after ({record['samples']} samples)"
    training = f"The demonstration's training of {record['name']}, {record['reward_queries']:,} reward queries,"
    return f"{training} takes {record['seconds']:.0f} s: strict success {success}."


_HEAD: Final = (
    "model",
    "trains",
    "weights",
    "T",
    "batch",
    "runs",
    "rollout, images/s",
    "of the card",
    "update, transitions/s",
    "of the card",
    "images/s",
    "largest abs(ratio - 1)",
    "peak memory, GB",
)


def _cells(record: Mapping[str, Any]) -> list[str]:
    kind = "float32" if record["trainable"] == "full" else record["dtype"]
    cells = [record["model"], record["trainable"], kind, str(record["steps"]), str(record["batch"]), record["variant"]]
    if "error" in record:
        return [*cells, record["error"], *[""] * (len(_HEAD) - len(cells) - 1)]
    memory = record["peak_memory_gb"]
    return [
        *cells,
        f"{record['rollout_images_per_second']:.2f}",
        f"{record['rollout_share']:.0%}",
        f"{record['update_transitions_per_second']:.1f}",
        f"{record['update_share']:.0%}",
        f"{record['images_per_second']:.3f}",
        f"{record['ratio_deviation']:.1e}",
        "" if memory is None else f"{memory:.1f}",
    ]


def main() -> None:
    """Run a command."""
    commands = {"run": run, "page": page, "part": part}
    tyro.extras.subcommand_cli_from_dict(commands, config=(tyro.conf.OmitArgPrefixes,))


if __name__ == "__main__":
    main()
