"""Builds the sdist and the wheel, looks into them, and tries the wheel in a new environment outside the clone.

    python -m tools.package build    # dist/, and what is in it
    python -m tools.package try      # a new environment in a temporary folder: the demo, Stable-Baselines3, py.typed

`try --packages-of FOLDER` takes what the wheel depends on from the site-packages of another environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path
from typing import Final

import tyro

ROOT: Final = Path(__file__).resolve().parents[1]
DIST: Final = ROOT / "dist"
PACKAGE: Final = "diffusion_gym"
LAUNCHER: Final = f"{PACKAGE}_launcher.py"
# What is no module and must be there all the same.
DATA: Final = (
    "py.typed",
    "models/shapes/weights/model_index.json",
    "models/shapes_flow/weights/model_index.json",
    "agents/report/templates/",
    "agents/benchmark/suites/",
)
SOURCES: Final = ("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml")
DEMO_QUERIES: Final = 256
_USER: Final = f"""
import gymnasium as gym
import {PACKAGE}

def first_reward(seed: int) -> float:
    env = gym.make("DiffusionDenoise-Shapes-Color-v0", num_inference_steps=2)
    obs, info = env.reset(seed=seed)
    return float(env.step(obs["latents"])[1])

reveal_type({PACKAGE}.__version__)
"""


@dataclass(frozen=True)
class BuildOptions:
    """Build the sdist and the wheel, and look into them."""

    out: Path = DIST
    """Where they go; wheels and sdists that are there are removed."""


@dataclass(frozen=True)
class TryOptions:
    """Install the wheel into a new environment and use it as a stranger would."""

    dist: Path = DIST
    """The folder of the wheel."""
    packages_of: Path | None = None
    """The site-packages whose packages stand in for those that pip would fetch."""


def build(options: BuildOptions) -> None:
    """Build both, the wheel from the sdist.

    Raises:
        SystemExit: the build failed, or a file is missing or too many; each is printed.
    """
    for old in (*options.out.glob("*.whl"), *options.out.glob("*.tar.gz")):
        old.unlink()
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(options.out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    (wheel,), (sdist,) = options.out.glob("*.whl"), options.out.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
        metadata = opened.read(next(name for name in names if name.endswith(".dist-info/METADATA")))
    with tarfile.open(sdist) as opened_sdist:
        sources = opened_sdist.getnames()
    if found := [*wheel_problems(names, modules()), *metadata_problems(metadata), *sdist_problems(sources)]:
        raise SystemExit("\n".join(found))
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1e6:.1f} MB; {sdist.name}")


def modules() -> set[str]:
    """The modules of the clone, as paths within the wheel."""
    return {LAUNCHER, *(str(path.relative_to(ROOT)) for path in _walk(ROOT / PACKAGE) if path.suffix == ".py")}


def _walk(folder: Path) -> Iterable[Path]:
    for directory, _, files in os.walk(folder, followlinks=True):
        yield from (Path(directory, file) for file in files)


def wheel_problems(names: Iterable[str], expected: set[str]) -> list[str]:
    """What is missing from a wheel or too much in it."""
    names = list(names)
    found = [f"the wheel lacks {name}" for name in sorted(expected - set(names))]
    found += [f"the wheel lacks {PACKAGE}/{data}" for data in DATA if not any(f"{PACKAGE}/{data}" in n for n in names)]
    foreign = {name.split("/")[0] for name in names} - {PACKAGE, LAUNCHER}
    return found + [f"the wheel would install {name}" for name in sorted(foreign) if not name.endswith(".dist-info")]


def metadata_problems(metadata: bytes) -> list[str]:
    """What an index's page of the package would lack."""
    said = message_from_bytes(metadata)
    wanted = ("Version", "Summary", "License-Expression", "Requires-Python", "Project-URL", "Description-Content-Type")
    return [f"the metadata lacks {name}" for name in wanted if not said[name]]


def sdist_problems(names: Iterable[str]) -> list[str]:
    """What is missing from an sdist; its names begin with its folder."""
    inner = {name.partition("/")[2] for name in names}
    return [f"the sdist lacks {name}" for name in SOURCES if name not in inner]


def try_wheel(options: TryOptions) -> None:
    """Use the wheel outside the clone.

    Raises:
        SystemExit: no wheel, or a step that failed.
    """
    wheels = sorted(options.dist.resolve().glob("*.whl"))
    if not wheels:
        raise SystemExit(f"dist={str(options.dist)!r} holds no wheel; run `python -m tools.package build` first")
    with tempfile.TemporaryDirectory(prefix="diffusion-gym-try-") as name:
        place = Path(name)
        venv.create(place / "env", with_pip=True)
        python = place / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
        if options.packages_of is None:
            _run(
                place,
                python,
                "-m",
                "pip",
                "install",
                "-q",
                "-c",
                ROOT / "constraints.txt",
                f"{wheels[-1]}[sb3]",
                "mypy",
            )
        else:
            own = next((place / "env").rglob("site-packages"))
            (own / "zz_packages.pth").write_text(f"{options.packages_of.resolve()}\n", encoding="utf-8")
            _run(place, python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheels[-1])
        (place / "user.py").write_text(_USER, encoding="utf-8")
        _run(place, python, "-c", f"import {PACKAGE}; assert {str(place)!r} in {PACKAGE}.__file__, {PACKAGE}.__file__")
        _run(place, python, "-m", "mypy", "--strict", "user.py")
        queries = ("--total-reward-queries", DEMO_QUERIES, "--samples", 64)
        _run(place, python, "-m", f"{PACKAGE}.agents.cli", "demo", *queries, "--out", "demo")
        _run(place, python, "-c", f"import {PACKAGE}.agents.sb3")
    print(f"{wheels[-1].name} works outside the clone")


def _run(place: Path, *command: object) -> None:
    print("$", *command, flush=True)
    if subprocess.run([str(part) for part in command], cwd=place, env={**os.environ, "PYTHONPATH": ""}).returncode:
        raise SystemExit("failed; see above")


def main() -> None:
    """Run a command."""
    options = tyro.cli(
        tyro.extras.subcommand_type_from_defaults({"build": BuildOptions(), "try": TryOptions()}),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    build(options) if isinstance(options, BuildOptions) else try_wheel(options)


if __name__ == "__main__":
    main()
