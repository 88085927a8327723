"""Rewards on the command line and in `config.json`."""

import json

import pytest
import torch

from diffusion_gym.agents.cli import main, parse_train
from diffusion_gym.agents.training.env_options import EnvOptions
from diffusion_gym.agents.training.run_files import FORMAT
from diffusion_gym.agents.training.runs import load_settings
from diffusion_gym.agents.training.settings import make_env
from diffusion_gym.storage import load_tensors

BASE = ["--env", "DiffusionDenoise-v0", "--agent", "ddpo_is", "--out", "nowhere"]


def parse(*arguments):
    return parse_train([*BASE, *arguments])


def test_values_are_json_where_they_are_json():
    given = [
        "strict",
        "true",
        "number",
        "3",
        "name",
        "a name",
        "text",
        '"3"',
        "nested",
        '{"a": [1, null]}',
        "on",
        "True",
    ]
    options = parse("--env.reward", "Color", "--env.reward-kwargs", *given).env_options
    assert options.keywords()["reward_kwargs"] == {
        "strict": True,
        "number": 3,
        "name": "a name",
        "text": "3",
        "nested": {"a": [1, None]},
        "on": True,
    }


def test_strict_is_the_short_form():
    others = parse().env_options.keywords()
    assert not {"strict", "reward_kwargs"} & others.keys()
    assert parse("--env.strict", "True").env_options.keywords() == {**others, "strict": True}  # gym.make's own
    both = parse("--env.strict", "True", "--env.reward-kwargs", "other", "1").env_options
    assert both.keywords() == {**others, "strict": True, "reward_kwargs": {"other": 1}}


def test_they_survive_config_json(tmp_path):
    settings = parse(
        "--env.reward", "Color=1,Count=2", "--env.reward-kwargs", "keywords", '{"Color": {"strict": true}}'
    )
    config = {"format": FORMAT, "settings": settings.to_json(), "versions": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_settings(tmp_path)
    assert loaded.env_options == settings.env_options
    env = make_env(loaded, 1)
    assert env.reward.name == "Color=1,Count=2" and env.reward.rewards["Color"].strict is True


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:z_scores")
def test_a_resumed_run_with_standardised_rewards_equals_the_uninterrupted_one(tiny_pipeline, tmp_path, monkeypatch):
    def run(name, *more):
        """One run in a folder of its own, which also gets the statistics."""
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / name)
        main(["train", "--out", "run", *more])

    begin = [
        *["--env", "DiffusionDenoise-v0", "--env.model", str(tiny_pipeline), "--env.prompts", "a", "b"],
        *["--env.reward", "Compressibility=1,Incompressibility=-2", "--env.reward-kwargs", "z_scores", "scales.json"],
        *["--env.num-inference-steps", "2", "--agent", "ddpo_is", "--agent.learning-rate", "1e-3"],
        *["--samples-per-iteration", "8", "--rollout-batch", "4", "--agent.batch-size", "4"],
    ]
    run("whole", *begin, "--total-reward-queries", "32")
    run("broken", *begin, "--total-reward-queries", "16")
    run("broken", "--resume", "--total-reward-queries", "32")
    expected, found = (
        load_tensors(tmp_path / name / "run" / "checkpoints" / "iteration-000004.safetensors")
        for name in ("whole", "broken")
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert (tmp_path / "whole" / "scales.json").read_text() == (tmp_path / "broken" / "scales.json").read_text()


@pytest.mark.parametrize(
    ("keywords", "variable"),
    [
        (["token", "abc"], "DIFFUSION_GYM_REWARD_TOKEN"),
        (["api_key", "abc"], "DIFFUSION_GYM_VLM_API_KEY"),
        (["api-key", "abc"], "DIFFUSION_GYM_VLM_API_KEY"),
        (["keywords", '{"PromptAlignment": {"api_key": "abc"}}'], "DIFFUSION_GYM_VLM_API_KEY"),
    ],
)
def test_secrets_are_kept_out_of_config_json(keywords, variable, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", *BASE, "--env.reward-kwargs", *keywords])
    assert ended.value.code == 2 and f"set {variable} in the environment" in capsys.readouterr().err
    with pytest.raises(ValueError, match=variable):
        EnvOptions(reward_kwargs=dict(zip(keywords[::2], keywords[1::2], strict=True)))


@pytest.mark.parametrize("part", ["agent_options", "env_options"])
def test_an_option_that_is_no_more_is_named(part, tmp_path):
    stored = parse().to_json()
    stored[part]["gone"] = 1
    (tmp_path / "config.json").write_text(json.dumps({"format": FORMAT, "settings": stored, "versions": {}}))
    with pytest.raises(
        ValueError, match=f"settings.{part}: the field 'gone' is not known here; .*go on with the version"
    ):
        load_settings(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["Compresibility"], "did you mean 'Compressibility'"),
        (["Compressibility", "--host", "0.0.0.0"], "give a token with --token or DIFFUSION_GYM_REWARD_TOKEN"),
        (["Compressibility", "--max-batch", "0"], "max_batch=0 must be at least 1"),
        (["Color", "--reward-kwargs", "strickt", "true"], "strickt"),
        (["Compressibility", "--max-memory", "1000"], "max_memory=1000 must be at least 16 * max_bytes=1073741824"),
        (["Compressibility", "--token", ""], "the token, from --token or DIFFUSION_GYM_REWARD_TOKEN, is empty"),
        (
            ["not:there", "--port", "-1"],
            "port=-1 must be 1 to 65535, or 0 for a free one",
        ),  # before the reward is built
        (["not:there", "--port", "70000"], "port=70000 must be 1 to 65535, or 0 for a free one"),
    ],
)
def test_a_mistake_in_serving_is_one_line(arguments, words, capsys, monkeypatch):
    monkeypatch.delenv("DIFFUSION_GYM_REWARD_TOKEN", raising=False)
    with pytest.raises(SystemExit) as ended:
        main(["serve-reward", *arguments])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and words in error and error.count("\n") == 1


def test_an_empty_token_in_the_environment_is_refused(capsys, monkeypatch):
    """Such as of `export DIFFUSION_GYM_REWARD_TOKEN=$(cat gone)`: everybody would be let in."""
    monkeypatch.setenv("DIFFUSION_GYM_REWARD_TOKEN", "")
    with pytest.raises(SystemExit) as ended:
        main(["serve-reward", "Compressibility"])
    assert ended.value.code == 2 and "DIFFUSION_GYM_REWARD_TOKEN, is empty" in capsys.readouterr().err
