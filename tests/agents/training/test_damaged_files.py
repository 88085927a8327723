"""Every kind of file that is read x every kind of damage: one clear error that names file and field, or all kept."""

import copy
import json
import math
import shutil
import tomllib
from pathlib import Path

import pytest

from benchmark_suites import suite_text, write_suite
from command_line import failure, train_arguments
from diffusion_gym.agents.algorithms import AGENTS
from diffusion_gym.agents.benchmark.cells import Cell, run_cell
from diffusion_gym.agents.benchmark.command import made_by_bench
from diffusion_gym.agents.benchmark.matrix import cells_of
from diffusion_gym.agents.benchmark.records import read_points, read_record
from diffusion_gym.agents.cli import main
from diffusion_gym.agents.training import trust
from diffusion_gym.agents.training.checkpoint import _State
from diffusion_gym.agents.training.folders import _taken
from diffusion_gym.agents.training.records import read_development, read_metrics
from diffusion_gym.agents.training.run_files import FORMAT, OLD_FORMAT, read_evaluation
from diffusion_gym.agents.training.runs import load_settings, read_settings
from diffusion_gym.agents.training.settings import ADDED, starting_point
from diffusion_gym.agents.training.tracking import _run_id
from diffusion_gym.schemas import checked, parse_checked
from diffusion_gym.storage import tensors_metadata, write_json

RECORD = "records/size--ddpo_is--seed-0.json"
POINTS = "runs/size--ddpo_is--seed-0/points.json"
CONFIG = "runs/size--ddpo_is--seed-0/config.json"
ENV = "DiffusionDenoise-Shapes-Color-v0"


@pytest.fixture(scope="module")
def run_folder(tiny_pipeline, tmp_path_factory):
    """A run of two iterations with every file that a run can have."""
    out = tmp_path_factory.mktemp("runs") / "run"
    followed = {"--development-every": 1, "--development-samples": 2, "--development-paths": 1, "--track": "none"}
    main(train_arguments(tiny_pipeline, out, **{"--checkpoint-every": 1, "--pictures-every": 0, **followed}))
    main(["eval", str(out), "--samples", "2"])
    return out


@pytest.fixture(scope="module")
def bench_folder(tiny_pipeline, tmp_path_factory):
    """A benchmark of one run, that has its points too."""
    out = tmp_path_factory.mktemp("bench") / "out"
    record = run_cell(Cell(str(write_suite(out, tiny_pipeline)), "size", "ddpo_is", 0, str(out)))
    assert "error" not in record, record
    trust.write_seal(out, trust.Seal())
    return out


@pytest.fixture
def run(run_folder, tmp_path):
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


@pytest.fixture
def bench(bench_folder, tmp_path):
    return Path(shutil.copytree(bench_folder, tmp_path / "bench"))


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- whole files, by the commands ------------------------------------------------------------------------------------

WHOLE = {
    "empty": b"",
    "an object of nothing": b"{}",
    "a list": b"[]",
    "a list of objects": b"[{}]",
    "a number": b"7",
    "a text": b'"text"',
    "null": b"null",
    "truncated": None,
    "binary": bytes(range(256)),
    "nested": b"[" * 100_000,
    "huge": b"9" * 100_000,
    "half a character": b'{"a": "\\ud800"}',
}


def whole(name, path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if WHOLE[name] is None else WHOLE[name])


def commands(kind, folder):
    bench = ["bench", "--suite", folder / "tiny.toml", "--agents", "ddpo_is", "--seeds", 1, "--out", folder]
    found = {
        "resume": ["train", "--resume", "--out", folder, "--total-reward-queries", 24],
        "eval": ["eval", folder, "--samples", 2],
        "report": ["report", folder],
        "bench": bench,
    }
    return [str(word) for word in found[kind]]


@pytest.mark.parametrize("damage", WHOLE)
@pytest.mark.parametrize(
    ("name", "command"),
    [
        *(("config.json", command) for command in ("resume", "eval", "report")),
        ("eval.json", "report"),
        ("metrics.jsonl", "resume"),
        ("metrics.jsonl", "report"),
        ("development.jsonl", "report"),
    ],
)
def test_a_file_of_a_run_that_is_none_is_named_by_every_command(run, capsys, name, command, damage):
    path = run / name
    whole(damage, path)
    if path.suffix == ".jsonl":
        path.write_bytes(path.read_bytes() + b"\n" if damage not in ("empty", "truncated") else b"{\n")
    before = files(run)
    error = failure(commands(command, run), capsys)
    assert error.startswith(f"error: {path}") and error.count("\n") == 1 and len(error) < 600
    assert files(run) == before


@pytest.mark.parametrize("damage", WHOLE)
@pytest.mark.parametrize(
    ("name", "command"),
    [(RECORD, "bench"), (RECORD, "report"), (POINTS, "bench"), (CONFIG, "bench"), ("tiny.toml", "report")],
)
def test_a_file_of_a_benchmark_that_is_none_is_named_by_every_command(bench, capsys, name, command, damage):
    if name in (POINTS, CONFIG):
        (bench / RECORD).unlink()
    if (name, damage) == (POINTS, "a list"):
        pytest.skip("the points before the first one")
    whole(damage, bench / name)
    before = files(bench)
    error = failure(commands(command, bench), capsys)
    assert name in error and error.count("\n") == 1 and len(error) < 600
    assert files(bench) == before


@pytest.mark.parametrize("damage", WHOLE)
def test_a_suite_that_is_none_does_not_make_a_folder_a_benchmark(bench, capsys, damage):
    whole(damage, bench / "tiny.toml")
    before = files(bench)
    error = failure(["bench", "--suite", "smoke", "--agents", "ddpo_is", "--out", str(bench)], capsys)
    assert "is not empty and no benchmark of diffusion-gym" in error and not made_by_bench(bench)
    assert files(bench) == before


@pytest.mark.parametrize("damage", WHOLE)
def test_small_files(run, damage):
    """A seal that is none counts as none, a holder as unknown; the id of a W&B run is not made up."""
    assert trust.seal_of(run) is not None
    whole(damage, run / ".seal.json")
    assert trust.seal_of(run) is None
    write_json(run / ".holder.json", {"pid": 1, "host": "here", "since": "now"})
    assert "in use by process 1 on here, since now" in _taken(run)
    whole(damage, run / ".holder.json")
    assert "in use by another process" in _taken(run)
    assert _run_id(run) == _run_id(run)
    whole(damage, run / "wandb.json")
    with pytest.raises(ValueError, match=r"wandb\.json.*"):
        _run_id(run)


# --- each field, by the readers --------------------------------------------------------------------------------------


def read_suite(path):
    return cells_of(str(path), ["ddpo_is", "dpok", "frozen_null"], 1, Path("runs/x"))


def read_state(path):
    """The state in a checkpoint's header, as `Checkpoints` reads it."""
    state = parse_checked(_State, path.read_text(), str(path), "mend it")
    checked(AGENTS["ddpo_is"].State, state.agent, f"{path}, agent", "mend it")


KINDS = {
    "config.json": lambda path: read_settings(path.parent),
    "config.json, to go on": lambda path: load_settings(path.parent, trust=True),
    "eval.json": lambda path: read_evaluation(path.parent),
    "metrics.jsonl": read_metrics,
    "development.jsonl": read_development,
    "wandb.json": lambda path: _run_id(path.parent),
    "state.json": read_state,
    "tiny.toml": read_suite,
    RECORD: read_record,
    POINTS: lambda path: read_points(path.parent),
}
WRONG = {"an object": {"": 1}, "a list": [[1]], "not a number": math.nan, "huge": 10**400}
# What each kind must have; of a config all that is in it.
COMPARED = "samples reward_mean reward_ci95 base_reward_mean base_reward_ci95 kl_to_base prompts".split()
EVALUATED = "iteration reward_queries reward_mean".split()
POINT = "reward_queries seconds network_evaluations reward".split()
REQUIRED = {
    "config.json": [],
    "eval.json": [("env",), ("agent",), ("seed",), ("iteration",), ("reward_queries",), *((key,) for key in COMPARED)],
    "metrics.jsonl": [*((key,) for key in EVALUATED), ("seconds",)],
    "development.jsonl": [(key,) for key in (*EVALUATED, "base_reward_mean", "improved", "reward_path")],
    "wandb.json": [("id",)],
    "state.json": [("iteration",), ("reward_queries",), ("agent",), ("agent", "optimizer")],
    "tiny.toml": [
        *((key,) for key in ("description", "budget", "evaluations", "samples", "tasks")),
        *(("tasks", "size", key) for key in ("env", "ceiling")),
        ("agents", "frozen_null", "agent"),
    ],
    RECORD: [
        *((key,) for key in "format task agent seed threads versions hardware suite trained settings points".split()),
        *(("points", 0, key) for key in POINT),
        *(("settings", key) for key in ("env_options", "agent_options", "total_reward_queries")),
    ],
    POINTS: [(0, key) for key in POINT],
}


def content_of(kind, run_folder, bench_folder):
    """The content of a file, and its name."""
    name = kind.partition(",")[0]
    path = (bench_folder if name in (RECORD, POINTS, "tiny.toml") else run_folder) / name
    if name == "state.json":
        checkpoint = run_folder / "checkpoints" / "iteration-000002.safetensors"
        return json.loads(tensors_metadata(checkpoint)["state"]), name
    if name == "wandb.json":
        return {"id": "abc"}, name
    if path.suffix == ".toml":
        return tomllib.loads(path.read_text()), name
    return json.loads(path.read_text().splitlines()[-1] if path.suffix == ".jsonl" else path.read_text()), name


def places(content, above=()):
    """The path of every value in a JSON value, of a list that of the first."""
    for key in content if isinstance(content, dict) else range(min(1, len(content))):
        yield (*above, key)
        if isinstance(content[key], dict | list):
            yield from places(content[key], (*above, key))


def is_free(name, place, wrong):
    """Whether a place may hold the wrong value: what an agent, a reward or a user's table may say as it likes."""
    if name == "metrics.jsonl" or name == "development.jsonl":
        known = {key for (key,) in REQUIRED[name]} | {"loss", "grad_norm", "clip_fraction", "approx_kl"}
        null = wrong == "not a number" and place[0] not in ("iteration", "reward_queries")  # as in the first versions
        return place[0] not in known or null
    if name == RECORD and len(place) > 1 and place[0] == "settings":  # compared as a whole, by `bench`
        return place != ("settings", "total_reward_queries")
    return wrong == "an object" and place[-1] in ("hardware", "loss_scale", "overrides")


def changed(content, place, act):
    """A copy in which `act(container, key)` was done at a place."""
    found = copy.deepcopy(content)
    part = found
    for key in place[:-1]:
        part = part[key]
    act(part, place[-1])
    return found


def damages(kind, content):
    """What and where, and the content, of every damage that is to be refused."""
    name = kind.partition(",")[0]
    for place in places(content):
        for wrong, value in WRONG.items():
            if not is_free(name, place, wrong):
                yield f"{wrong} at", place, changed(content, place, lambda part, key, v=value: part.__setitem__(key, v))
    missing = REQUIRED[name] or [place for place in places(content) if isinstance(place[-1], str) and len(place) > 1]
    for place in missing:
        if name != "config.json" or place[0] == "settings" and "reward_kwargs" not in place[:-1]:
            yield "nothing at", place, changed(content, place, lambda part, key: part.pop(key))
    if name not in (POINTS, "metrics.jsonl", "development.jsonl"):
        yield "unknown", ("surprise",), {**content, "surprise": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_a_missing_and_an_unknown_field_are_named(run_folder, bench_folder, tmp_path, kind):
    content, name = content_of(kind, run_folder, bench_folder)
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)

    def read(value):
        path.write_text(suite_text(value) if path.suffix == ".toml" else json.dumps(value) + "\n")
        return KINDS[kind](path)

    read(content)
    count = 0
    for what, place, damaged in damages(kind, content):
        with pytest.raises(ValueError) as caught:
            read(damaged)
            pytest.fail(f"{what} {place} was read")
        told = str(caught.value)
        assert Path(name).stem in told or name == "tiny.toml", f"{what} {place}: {told}"
        assert any(part in told for part in map(str, place)), f"{what} {place}: {told}"
        assert len(told) < 800 and "; " in told and "Traceback" not in told
        count += 1
    assert count > 3


# --- older formats ---------------------------------------------------------------------------------------------------


def config(tmp_path, settings, file_format=None):
    write_json(
        tmp_path / "config.json",
        {**({"format": file_format} if file_format else {}), "settings": settings, "versions": {"torch": "2"}},
    )
    return read_settings(tmp_path)


@pytest.mark.parametrize("agent", AGENTS)
def test_a_run_folder_of_the_versions_before_formats_is_read(tmp_path, agent):
    settings = starting_point(ENV, agent, None, None)
    stored = settings.to_json()
    before = {"out": "runs/a", "profile": False, "resume": False, "resume_from_older": False}
    assert config(tmp_path, {**stored, **before}).to_json() == config(tmp_path, stored, FORMAT).to_json() == stored


@pytest.mark.parametrize("name", ADDED[FORMAT])
def test_an_option_that_older_runs_lack_is_what_they_did_and_newer_files_may_not_lack_it(tmp_path, name):
    part, _, option = name.rpartition(".")
    stored = starting_point(ENV, "ddpo_is", None, None).to_json()
    table = stored[part] if part else stored
    del table[option]
    found = config(tmp_path, stored, OLD_FORMAT)
    assert getattr(getattr(found, part) if part else found, option) == ADDED[FORMAT][name]
    with pytest.raises(ValueError, match=f"the field '{option}' is missing; .*go on with the version that began"):
        config(tmp_path, stored, FORMAT)


def test_another_option_may_be_missing_in_no_format(tmp_path):
    """Else it would be this version's default."""
    stored = starting_point(ENV, "ddpo_is", None, None).to_json()
    for part in ("", "env_options", "agent_options"):
        for option in stored[part] if part else stored:
            if f"{part}.{option}".lstrip(".") not in ADDED[FORMAT]:
                less = copy.deepcopy(stored)
                del (less[part] if part else less)[option]
                for file_format in (None, OLD_FORMAT, FORMAT):
                    with pytest.raises(ValueError, match=f"the field '{option}' is missing"):
                        config(tmp_path, less, file_format)


def test_a_format_of_another_version_is_refused(tmp_path):
    stored = starting_point(ENV, "ddpo_is", None, None).to_json()
    with pytest.raises(ValueError, match="format='diffusion-gym-run-3': .*the version that began it"):
        config(tmp_path, stored, "diffusion-gym-run-3")


def test_a_value_out_of_range_is_told_with_the_file(tmp_path):
    stored = {**starting_point(ENV, "ddpo_is", None, None).to_json(), "seed": -1}
    with pytest.raises(ValueError, match=r"config\.json: seed=-1 must be at least 0"):
        config(tmp_path, stored, FORMAT)


def test_a_record_of_an_older_format_goes_on_only_as_what_it_was(bench, capsys):
    """An option that it lacks is what runs did then, not this version's default."""
    record = json.loads((bench / RECORD).read_text())
    again = commands("bench", bench)
    del record["settings"]["agent_options"]["renoise"]
    write_json(bench / RECORD, {**record, "format": "diffusion-gym-benchmark-1"})
    main(again)
    assert "1 finished before" in capsys.readouterr().out
    write_json(bench / RECORD, record)
    assert "renoise=False, there no such option" in failure(again, capsys)
    del record["settings"]["development_every"]
    write_json(bench / RECORD, {**record, "format": "diffusion-gym-benchmark-1"})
    assert "development_every=None, there 0" in failure(again, capsys)
