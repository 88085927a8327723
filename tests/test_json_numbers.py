"""JSON has no NaN and no infinity: what we write is read by every program, and our own readers take what it says."""

import ast
import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from diffusion_gym.agents.report.run import write_report
from diffusion_gym.agents.training.evaluation import Comparison, save_pictures, summary_text
from diffusion_gym.agents.training.records import append_record, drop_records_after, read_metrics
from diffusion_gym.agents.training.run_files import FORMAT
from diffusion_gym.agents.training.settings import starting_point
from diffusion_gym.storage import exact_json, json_text, number_or_nan, read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
# Not files and not answers: lists between our own processes, a size, a hash, words of tokenizers, an error's text.
OTHERS = {"processes.py", "remote.py", "cache.py", "files.py"}
OTHERS |= {"random_sd14.py", "random_checkpoints.py", "trust.py", "embedding_store.py"}
NOT_FINITE = [math.nan, math.inf, -math.inf]


def strictly(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("value", NOT_FINITE)
def test_what_is_not_finite_is_written_as_null_at_any_depth(tmp_path, value):
    found = {"a": value, "b": [1.5, (value, {"c": value})], "d": True, "e": "NaN", "f": 3}
    expected = {"a": None, "b": [1.5, [None, {"c": None}]], "d": True, "e": "NaN", "f": 3}
    assert strictly(json_text(found)) == expected
    write_json(tmp_path / "x.json", found)
    assert strictly((tmp_path / "x.json").read_text()) == read_json(tmp_path / "x.json") == expected
    assert math.isnan(number_or_nan(None)) and number_or_nan(2) == 2.0


@pytest.mark.parametrize("value", NOT_FINITE)
def test_what_is_gone_on_from_is_refused_rather_than_changed(value):
    with pytest.raises(ValueError, match="not finite"):
        exact_json({"a": [value]})
    assert strictly(exact_json({"a": [0.1, 1e308]})) == {"a": [0.1, 1e308]}


@pytest.mark.parametrize("value", NOT_FINITE)
def test_records_hold_null_also_after_a_resumption(tmp_path, value):
    path = tmp_path / "metrics.jsonl"
    row = {"reward_queries": 8, "reward_mean": value, "seconds": 1.0, "of_the_agent": value}
    append_record(path, {"iteration": 1, **row, "loss": value})
    path.write_text(path.read_text() + json.dumps({"iteration": 2, **row, "loss": value}) + "\n")  # as before
    drop_records_after(path, 2)
    assert [strictly(line)["loss"] for line in path.read_text().splitlines()] == [None, None]
    assert [strictly(line)["of_the_agent"] for line in path.read_text().splitlines()] == [None, None]
    assert [row["iteration"] for row in read_metrics(path)] == [1, 2]


def test_nothing_else_writes_json():
    found = set()
    for path in (path for room in ("agents", "diffusion_gym", "wrappers") for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dumps", "json.dump"):
                found.add(path.name)
    assert found - OTHERS == {"storage.py"}


@dataclass
class Sampled:
    """What `Comparison` reads of trajectories."""

    prompts: tuple
    rewards: torch.Tensor
    components: dict
    images = torch.zeros(4, 32, 32, 3, dtype=torch.uint8)

    def __len__(self):
        return len(self.prompts)


@pytest.mark.parametrize("failed", [[0], [0, 1], [0, 1, 2, 3]])
def test_an_evaluation_with_failed_rewards_is_written_printed_and_shown(tmp_path, failed):
    values = torch.tensor([1.0, 0.0, 1.0, 1.0])
    values[failed] = math.nan
    sampled = Sampled(("a red star", "a red star", "a dog", "a cat"), values, {"success": values})
    result = Comparison(sampled, sampled, torch.full((4,), math.inf)).summary()
    assert result["samples"] == 4 and ("reward_mean" in result) and result["success_ci95"][0] >= 0
    about = {"env": "E", "agent": "ddpo_is", "seed": 0, "iteration": 1, "reward_queries": 4}
    text = json_text({**about, **result, "held_out": result})
    stored = strictly(text)
    assert (stored["reward_mean"] is None) == (len(failed) == 4) and stored["kl_to_base"] is None
    assert stored["prompts"]["a red star"]["reward"] == (0.0 if failed == [0] else None)
    assert "training prompts, 4 samples" in summary_text(stored)

    settings = starting_point("DiffusionDenoise-Shapes-Composition-v0", "ddpo_is", None, None).to_json()
    write_json(tmp_path / "config.json", {"format": FORMAT, "settings": settings, "versions": {}})
    (tmp_path / "eval.json").write_text(text)
    for index in range(1, 4):
        row = {"iteration": index, "reward_queries": 64 * index, "reward_mean": 0.5, "seconds": 1.0}
        append_record(tmp_path / "metrics.jsonl", {**row, "loss": math.nan, "grad_norm": math.inf})
    means = dict.fromkeys(("reward_mean", "base_reward_mean", "difference_mean", "improved"))
    paths = {"reward_path": [None, 1.0], "base_reward_path": [None, None]}
    append_record(tmp_path / "development.jsonl", {"iteration": 3, "reward_queries": 192, **means, **paths})
    save_pictures(tmp_path / "images", Comparison(sampled, sampled, torch.zeros(4)))
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<p>–</p>" in text and text.count('class="pass"') == 2 * (4 - len({*failed, 1}))  # failed ones are unmarked
