"""Files that hold anything: each command reads them as they are meant, or refuses them in one line that names them."""

import json
import shutil
import tomllib
import warnings
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmark_folders import write_run
from benchmark_folders import write_suite as write_made_suite
from diffusion_gym.agents.algorithms import DDPOIS
from diffusion_gym.agents.benchmark.records import read_record
from diffusion_gym.agents.benchmark.results import Results
from diffusion_gym.agents.benchmark.suites import Suite
from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.training.checkpoint import Checkpoints, Progress, checksum
from diffusion_gym.agents.training.records import read_metrics
from diffusion_gym.agents.training.run_files import FORMAT, read_evaluation
from diffusion_gym.agents.training.runs import read_settings
from diffusion_gym.agents.training.settings import ADDED, starting_point
from diffusion_gym.prompts.files import read_prompt_file
from diffusion_gym.storage import exact_json, load_tensors, save_tensors, tensors_metadata, write_json
from fuzzing import JSON, bounded, changed, command, damaged, no_hang, stop_what_is_expensive

OF_COMMAND_LINES = {"out", "profile", "resume", "resume_from_older"}  # in files of the first format, and not read
ENV = "DiffusionDenoise-Shapes-Color-v0"
PROMPTS = {"a red circle": {"samples": 3, "reward": 0.5, "base_reward": 0.25}}
EVALUATION = {
    "env": ENV,
    "agent": "ddpo_is",
    "seed": 1000,
    "iteration": 2,
    "reward_queries": 16,
    "samples": 4,
    "reward_mean": 0.5,
    "reward_ci95": [0.4, 0.6],
    "base_reward_mean": 0.25,
    "base_reward_ci95": [0.2, 0.3],
    "kl_to_base": 1.5,
    "prompts": PROMPTS,
}
METRICS = [
    {"iteration": number, "reward_queries": 8 * number, "reward_mean": 0.5, "loss": 0.1, "seconds": 1.0}
    for number in (1, 2)
]
PROMPT_FILES = {
    "a.jsonl": [{"prompt": "a cat", "weight": 1, "boxes": [{"x": 0.5}]}, {"prompt": "a dog"}],
    "b.jsonl": [{"prompt": "a cat"}, {"prompt": "a fox", "held_out": "far"}],
}
SUITE = """description = "fuzzed"
budget = 8
evaluations = 1
samples = 4
batch = 4

[overrides]
learning_rate = 1e-3

[agents.mine]
agent = "ddpo_is"
cfg_training = false

[tasks.size]
env = "DiffusionDenoise-Shapes-Color-v0"
env_options = { reward = "Color" }
ceiling = 1.0
probe = "Compressibility"
"""
TOML = ["", "nan", "-1", "0", "1.5", "true", '""', '"x"', "[]", "[[[]]]", "{}", "{ a = 1 }", "1979-05-27", "9" * 400]


@pytest.fixture(autouse=True)
def nothing_expensive(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    stop_what_is_expensive(monkeypatch)


@pytest.fixture
def run(tmp_path):
    """A run of two iterations that was evaluated; its checkpoint is no file of ours."""
    folder = tmp_path / "run"
    settings = replace(starting_point(ENV, "ddpo_is", None, None), out=folder, total_reward_queries=32)
    versions = {"python": "3.11.7", "torch": "2.9.0"}
    write_json(folder / "config.json", {"settings": settings.to_json(), "versions": versions})
    write_lines(folder / "metrics.jsonl", METRICS)
    write_json(folder / "eval.json", EVALUATION)
    return folder


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")}


def holds_all(found, stored):
    """Whether settings that were read are those of the file; what came to be since the first runs may be missing."""
    since = {name.rpartition(".")[2] for name in ADDED[FORMAT]}
    if isinstance(found, dict) and isinstance(stored, dict):
        return {*stored} <= {*found} and all(
            holds_all(value, stored[name]) if name in stored else name in since for name, value in found.items()
        )
    return json.dumps(found) == json.dumps(stored) or found == stored


def check_read(run, name, change):
    """What was read of a file of a run is what the file says."""
    if name == "config.json":
        stored = {key: value for key, value in change["settings"].items() if key not in OF_COMMAND_LINES}
        found = read_settings(run).to_json()
        assert holds_all(found, stored), (found, stored)
    elif name == "eval.json":
        assert json.loads(json.dumps(read_evaluation(run))) == change
    else:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            rows = read_metrics(run / name)
        change = change if isinstance(change, list) else [change]
        assert len(rows) == len(change) or told
        assert all(row in change for row in rows)


VERBS = [["report"], ["eval"], ["train", "--resume", "--out"]]


@pytest.mark.parametrize(
    ("verb", "name"),
    [(verb, name) for verb in VERBS for name in ("config.json", "metrics.jsonl", "eval.json")],
    ids=lambda part: part if isinstance(part, str) else part[0],
)
def test_a_run_folder(run, verb, name):
    whole = (run / name).read_bytes()
    written = METRICS if name.endswith("l") else json.loads(whole)

    @bounded(6)
    @given(change=changed(written), bytes_=damaged(whole), bad=st.booleans())
    def check(change, bytes_, bad):
        if bad:
            (run / name).write_bytes(bytes_)
        elif name.endswith("l"):
            write_lines(run / name, change if isinstance(change, list) else [change])
        else:
            (run / name).write_text(json.dumps(change))
        before = files(run)
        error = command([*verb, run, *([] if verb == ["report"] else ["--trust"])])
        if error:
            assert str(run) in error or "=" in error
            assert files(run) == before
        elif not bad and (name == "config.json" or verb == ["report"]):  # the others do not come to the rest
            check_read(run, name, change)

    check()


def test_a_benchmark_folder(tmp_path):
    write_made_suite(tmp_path)
    write_run(tmp_path, "ddpo_is", "color", 0, [0.1, 0.5], samples=False)
    record = next((tmp_path / "records").glob("*.json"))
    whole = record.read_bytes()

    @bounded(20)
    @given(change=changed(json.loads(whole)), bytes_=damaged(whole), bad=st.booleans())
    def check(change, bytes_, bad):
        record.write_bytes(bytes_ if bad else json.dumps(change).encode())
        with no_hang():
            try:
                Results.read(tmp_path)
            except ValueError as error:
                assert str(record) in str(error)
            else:
                assert bad or read_record(record) == change

    check()


@bounded(15)
@given(data=st.data())
def test_a_suite(tmp_path, data):
    lines = SUITE.splitlines()
    for _ in range(data.draw(st.integers(1, 2))):
        number = data.draw(st.integers(0, len(lines) - 1))
        key = lines[number].partition("=")[0]
        with_value = f"{key}= {data.draw(st.sampled_from(TOML))}"
        lines[number] = data.draw(st.sampled_from([with_value, with_value, "", "x = 1", lines[number] * 2]))
    path = tmp_path / "fuzzed.toml"
    path.write_text("\n".join(lines))
    refused = command(
        ["bench", "--suite", path, "--agents", "ddpo_is", "--seeds", "1", "--out", tmp_path / "out", "--trust"]
    )
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    if not refused:
        written, found = tomllib.loads(path.read_text()), asdict(Suite.load(str(path)))
        assert all(agrees(found[key], value) for key, value in written.items()), (found, written)


def agrees(found, written):
    """Whether what was read holds all that was written; it may hold defaults besides."""
    if isinstance(written, dict):
        return all(key in found and agrees(found[key], value) for key, value in written.items())
    return found == written


@pytest.mark.parametrize("name", [*PROMPT_FILES, "c.txt"])
def test_a_prompt_file(tmp_path, name):
    path = tmp_path / name
    content = PROMPT_FILES.get(name, [])
    whole = "".join(f"{json.dumps(row)}\n" for row in content).encode() or b"a cat\na dog\n"

    @bounded(20)
    @given(change=changed(content) if content else JSON, bytes_=damaged(whole), bad=st.booleans())
    def check(change, bytes_, bad):
        if bad or not content:
            path.write_bytes(bytes_)
        else:
            write_lines(path, change if isinstance(change, list) else [change])
        with no_hang():
            try:
                found = read_prompt_file(str(path)).prompts
            except ValueError as error:
                assert name in str(error) and "Traceback" not in str(error)
            else:
                assert found and all(isinstance(prompt, str) and prompt.strip() for prompt in found)
                if not bad and content:
                    rows = change if isinstance(change, list) else [change]
                    assert list(found) == [row["prompt"].strip() for row in rows if row.get("held_out") is None]

    check()


@pytest.fixture(scope="module")
def agents(make_env):
    """An agent with a checkpoint, and another one of the same kind."""
    policies = [DenoisingPolicy.from_env(make_env(), trainable="lora", lora_rank=1) for _ in range(2)]
    return [DDPOIS(policy, DDPOIS.Config(batch_size=4)) for policy in policies]


def test_a_checkpoint(agents, tmp_path):
    saved, other = agents
    path = Checkpoints(tmp_path).save(saved, Progress(1, 8))
    whole, tensors, metadata = path.read_bytes(), load_tensors(path), tensors_metadata(path)
    state, names = json.loads(metadata["state"]), sorted(tensors)

    @bounded(25)
    @given(
        change=changed(state), bytes_=damaged(whole), how=st.sampled_from(["bytes", "state", "tensor"]), at=st.data()
    )
    def check(change, bytes_, how, at):
        if how == "bytes":
            path.write_bytes(bytes_)
        else:
            kept = dict(tensors)
            if how == "tensor":
                name = at.draw(st.sampled_from(names))
                kept[name] = at.draw(st.sampled_from([torch.zeros(0), kept[name].half(), kept[name].flatten()]))
            text = json.dumps(change if how == "state" else state)
            save_tensors(path, kept, {**metadata, "state": text, "sha256": checksum(kept, text)})
        before = {name: value.clone() for name, value in other.tensors().items()}
        try:
            Checkpoints(tmp_path).load(other)
        except ValueError as error:
            assert str(path) in str(error)
            assert all(torch.equal(value, before[name]) for name, value in other.tensors().items())
        else:
            stored = load_tensors(path)
            assert all(torch.equal(value, stored[name]) for name, value in other.tensors().items())
            assert (
                how == "bytes"
                or json.loads(exact_json(other.state())) == (change if how == "state" else state)["agent"]
            )

    check()


def test_tensors(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2, dtype=torch.bfloat16)}, {"k": "v"})
    whole = path.read_bytes()

    @bounded(40)
    @given(bytes_=damaged(whole))
    def check(bytes_):
        path.write_bytes(bytes_)
        try:
            assert set(load_tensors(path)) and tensors_metadata(path) is not None
        except ValueError as error:
            assert str(path) in str(error)

    check()
