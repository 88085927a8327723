"""Suites: what is in a file, what is refused, and that those of the package fit what they name."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmark_suites import write_suite
from diffusion_gym.agents.algorithms import AGENTS
from diffusion_gym.agents.benchmark.library_agents import LIBRARY_AGENTS, config_of
from diffusion_gym.agents.benchmark.matrix import cells_of
from diffusion_gym.agents.benchmark.suites import Suite, Task, suites
from diffusion_gym.envs.registration import environment_ids
from diffusion_gym.prompts import make_prompts
from diffusion_gym.rewards import REWARDS

OUT = Path("runs/x")


@pytest.mark.parametrize("name", suites())
def test_every_native_and_library_agent_has_settings_on_every_task(name):
    """`cells_of` builds them all, and refuses agents whose environments differ."""
    suite = Suite.load(name)
    cells = cells_of(name, [*AGENTS, *suite.agents, *LIBRARY_AGENTS], 1, OUT)
    assert len(cells) == len(suite.tasks) * len({*AGENTS, *suite.agents, *LIBRARY_AGENTS})
    for cell in cells:
        settings = cell.settings(cell.load_suite())
        assert settings.total_reward_queries == suite.budget and settings.env == suite.tasks[cell.task].env
        assert settings.samples_per_iteration % settings.rollout_batch == 0
        assert suite.points(settings.samples_per_iteration)[-1] <= suite.budget


@pytest.mark.parametrize("name", suites())
def test_what_a_suite_names_exists(name):
    suite = Suite.load(name)
    known = {id_ if re.search(r"-v\d+$", id_) else f"{id_}-v0" for id_ in environment_ids()}
    for task in suite.tasks.values():
        assert task.env in known
        assert task.probe in REWARDS
        for prompts in task.env_options.get("prompts", []):
            assert make_prompts(prompts).prompts


def test_shapes_v1_has_the_tasks_of_its_description():
    suite = Suite.load("shapes-v1")
    families = ["color", "count", "composition", "location"]
    assert list(suite.tasks) == [*families, "compressibility", "incompressibility"]
    for family in families:
        assert suite.tasks[family].env_options["strict"] is True
        prompts = make_prompts(suite.tasks[family].env_options["prompts"][0])
        assert len(prompts.prompts) == 4 and prompts.held_out


def test_values_of_preset_suite_variant_and_task(tmp_path, tiny_pipeline):
    suite = Suite.load(str(write_suite(tmp_path, tiny_pipeline)))
    suite = replace(suite, preset="replication")
    plain, variant = (suite.settings("size", name, "ddpo_is", 3, OUT) for name in ("ddpo_is", "frozen_null"))
    assert plain.agent_options.inner_epochs == 2  # the preset's
    assert plain.agent_options.learning_rate == 1e-3 and plain.env_options.guidance_scale == 2.0  # the suite's
    assert plain.env_options.prompts == ("shapes-color-4",) and plain.env_options.model == str(tiny_pipeline)
    assert (plain.seed, plain.out, plain.total_reward_queries, plain.pictures_every) == (3, OUT, 8, 0)
    assert plain.agent_options.cfg_training and not variant.agent_options.cfg_training
    assert replace(variant.agent_options, cfg_training=True) == plain.agent_options
    assert suite.trained("frozen_null") == "ddpo_is" and suite.trained("rwr") == "rwr"


@pytest.mark.parametrize(
    ("budget", "evaluations", "samples", "expected"),
    [
        (3200, 5, 128, [640, 1280, 1920, 2560, 3200]),
        (4096, 4, 640, [640, 1920, 2560, 3840]),  # whole iterations, never past a mark
        (10, 5, 4, [4, 8]),
        (8, 2, 8, [8]),
    ],
)
def test_points(budget, evaluations, samples, expected):
    suite = replace(Suite.load("smoke"), budget=budget, evaluations=evaluations)
    assert suite.points(samples) == expected


def test_a_budget_below_one_iteration_is_refused():
    with pytest.raises(ValueError, match="budget=100 is below one iteration, samples_per_iteration=128"):
        replace(Suite.load("shapes-v1"), budget=100).points(128)


def test_score():
    task = Task("X-v0", ceiling=2.0)
    assert [task.score(reward, 0.5) for reward in (0.5, 2.0, 1.25, 0.0)] == [0.0, 1.0, 0.5, pytest.approx(-1 / 3)]
    lower_is_better = Task("X-v0", ceiling=-0.65)  # kB, negated
    assert lower_is_better.score(-0.65, -1.65) == 1.0 and lower_is_better.score(-2.65, -1.65) == pytest.approx(-1.0)
    with pytest.raises(ValueError, match="ceiling=2.0 of X-v0 is what the pretrained model has"):
        task.score(1.0, 2.0)


TASK = '[tasks.size]\nenv = "DiffusionDenoise-v0"\nceiling = 1.0\n'
HEAD = 'description = "x"\nbudget = 8\nevaluations = 2\nsamples = 4\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("budget = = 3", "is no TOML file"),
        (HEAD, "the field 'tasks' is missing"),
        (HEAD + "tasks = 3\n", "tasks=3: input should be an object"),
        (HEAD + "tasks = {}\n", "tasks={}: dictionary should have at least 1 item"),
        (HEAD + "[tasks]\nsize = 3\n", "tasks.size=3: input should be an object"),
        (HEAD + "bugdet = 3\n" + TASK, "the field 'bugdet' is not known here; did you mean 'budget'"),
        (HEAD + TASK + "cieling = 1\n", "'tasks.size.cieling' is not known here; did you mean 'ceiling'"),
        (HEAD + '[tasks.size]\nenv = "X"\n', "the field 'tasks.size.ceiling' is missing"),
        (HEAD.replace("budget = 8\n", "") + TASK, "the field 'budget' is missing"),
        (HEAD.replace("8", '"many"') + TASK, "budget='many': input should be a valid integer"),
        (HEAD + "batch = 3\n" + TASK, "samples=4 must be a multiple of batch=3"),
        (HEAD + TASK.replace("1.0", '"high"'), "tasks.size.ceiling='high': input should be a valid number"),
        (HEAD + TASK + "env_options = { promts = ['a'] }\n", "env_options='promts' is unknown; did you mean 'prompts'"),
        (HEAD + TASK + "[agents.mine]\ncfg_training = false\n", "agents.mine: agent=None must name the agent"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as found:
        Suite.load(str(path))
    assert str(path) in str(found.value)


def test_an_unknown_suite_is_refused(tmp_path):
    with pytest.raises(ValueError, match="suite='shapes-v' is unknown; did you mean 'shapes-v[12]'"):
        Suite.load("shapes-v")
    with pytest.raises(FileNotFoundError, match=r"is no file; pass a .toml file or one of ddpo-paper"):
        Suite.load(str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("agents", "message"),
    [
        (["dpokk"], "agent='dpokk' is unknown; did you mean 'dpok'"),
        (["sb3/pppo"], "agent='sb3/pppo' is unknown; did you mean 'sb3/ppo'"),
        (["nowhere:Mine"], "agent='nowhere:Mine' cannot be imported"),
        ([], "agents is empty"),
    ],
)
def test_unknown_agents_are_refused_before_anything_runs(agents, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        cells_of("smoke", agents, 1, OUT)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": "-1.0"}, "learning_rate=-1.0 must be larger than 0"),
        ({"updates": "1\nlerning_rate = 1"}, "option='lerning_rate' is unknown; did you mean 'learning_rate'"),
        ({"cfg_training": "false\nkl_wieght = 1"}, "option='kl_wieght' is unknown"),
    ],
)
def test_a_bad_option_is_refused_before_anything_runs(tmp_path, tiny_pipeline, changed, message):
    path = write_suite(tmp_path, tiny_pipeline, **changed)
    with pytest.raises(ValueError, match=re.escape(message)):
        cells_of(str(path), ["frozen_null"], 1, OUT)


def test_agents_on_different_environments_are_refused(tmp_path, tiny_pipeline):
    """DPOK's preset has a guidance scale of its own; the suite must decide."""
    path = write_suite(tmp_path, tiny_pipeline)
    path.write_text(path.read_text().replace("guidance_scale = 2.0\n", ""))
    with pytest.raises(ValueError, match="by their presets 'ddpo_is' and 'dpok' would.*guidance_scale=5.0 and 7.5"):
        cells_of(str(path), ["ddpo_is", "dpok"], 1, OUT)


def test_a_library_that_is_missing_is_told(monkeypatch):
    monkeypatch.setattr("diffusion_gym.agents.benchmark.library_agents.find_spec", lambda name: None)
    expected = "agent='sb3/a2c' needs stable_baselines3; pip install 'diffusion-denoise-gym[sb3]'"
    with pytest.raises(ValueError, match=re.escape(expected)):
        config_of("sb3/a2c")
    assert config_of("ddpo_is") == "ddpo_is"
