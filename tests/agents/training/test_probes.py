"""Rewards that a training evaluates on its development pictures and never trains on."""

import json

import pytest
import torch

from command_line import DEVELOPED
from diffusion_gym.agents.cli import main
from diffusion_gym.agents.report.development import development
from diffusion_gym.agents.training import trust
from diffusion_gym.agents.training.checkpoint import Progress
from diffusion_gym.agents.training.development import DevelopmentSet
from diffusion_gym.agents.training.settings import make_probes, starting_point
from diffusion_gym.agents.training.tracking import Tracker
from diffusion_gym.images import to_float
from diffusion_gym.rewards import RewardError, evaluate, make_reward
from diffusion_gym.testing.random_checkpoints import CHECKPOINTS
from run_folders import metrics_rows


def train(pipeline, out, *more):
    words = [str(word) for pair in {**DEVELOPED, "--env.model": pipeline, "--out": out}.items() for word in pair]
    main(["train", *words, *more])


def rows(out):
    return [json.loads(line) for line in (out / "development.jsonl").read_text().splitlines()]


def test_probes_are_evaluated_and_change_nothing(tiny_pipeline, tmp_path):
    clip = CHECKPOINTS["CLIPScore"](tmp_path / "clip")
    probes = ["--probes", "Incompressibility", "CLIPScore", "--probe-kwargs", "CLIPScore", json.dumps(clip)]
    train(tiny_pipeline, tmp_path / "probed", *probes)
    train(tiny_pipeline, tmp_path / "plain")
    assert metrics_rows(tmp_path / "probed") == metrics_rows(tmp_path / "plain")
    found = rows(tmp_path / "probed")
    assert len(found) == 2
    for row in found:
        assert row["probe_Incompressibility"] == pytest.approx(-row["reward_mean"])
        assert row["base_probe_Incompressibility"] == pytest.approx(-row["base_reward_mean"])
        assert 0 <= row["probe_CLIPScore"] <= 2.5
    plain = [{key: value for key, value in row.items() if "probe" not in key and key != "seconds"} for row in found]
    assert plain == [{key: value for key, value in row.items() if key != "seconds"} for row in rows(tmp_path / "plain")]
    titles = [chart.title for chart in development(tmp_path / "probed")["charts"]]
    assert titles[-2:] == ["Incompressibility, not trained on", "CLIPScore, not trained on"]
    # Resumed with the same probes, from what the folder says.
    main(["train", "--resume", "--out", str(tmp_path / "probed"), "--total-reward-queries", "12"])
    assert "probe_CLIPScore" in rows(tmp_path / "probed")[2]
    assert rows(tmp_path / "probed")[2]["base_probe_CLIPScore"] == found[0]["base_probe_CLIPScore"]


@pytest.fixture
def followed(make_env, tmp_path):
    def made(probe, reward="Compressibility", **keywords):
        env = make_env(3, num_inference_steps=2, autoreset_mode="Disabled", reward=reward, **keywords)
        return DevelopmentSet(env, tmp_path, 0, 6, 0, probes={"probe": probe})

    return made


def test_a_probe_scores_the_pictures_with_prompts_and_metadata(followed, make_policy):
    seen = []

    def probe(images, prompts, metadata):
        seen.append((images.clone(), list(prompts), [entry["wanted"] for entry in metadata]))
        return torch.tensor([float(entry["wanted"]) for entry in metadata])

    lines = [{"prompt": f"{number} stars", "wanted": number} for number in range(1, 5)]
    chosen = followed(probe, prompts=lines)
    policy = make_policy(chosen.env)
    chosen.track(policy, Progress(1, 6), Tracker())
    evaluation = chosen.evaluate(policy)
    (row,) = rows(chosen.folder)
    for part, key in ((evaluation.original, "base_probe_probe"), (evaluation.current, "probe_probe")):
        assert row[key] == pytest.approx(sum(int(prompt[0]) for prompt in part.prompts) / 6)
    images = torch.cat([images for images, *_ in seen])
    assert [len(prompts) for _, prompts, _ in seen] == [3] * 4
    torch.testing.assert_close(images[:6], to_float(evaluation.original.images))
    torch.testing.assert_close(images[6:], to_float(evaluation.current.images))


def test_pictures_whose_reward_failed_do_not_count(followed, make_policy):
    def half(images, prompts, metadata):
        return torch.where(images.mean((1, 2, 3)) > 0.5, 1.0, torch.nan)

    chosen = followed(lambda images, prompts, metadata: images.mean((1, 2, 3)), reward=half)
    policy = make_policy(chosen.env)
    evaluation = chosen.evaluate(policy)
    brightness = to_float(evaluation.current.images).mean((1, 2, 3))
    counted = brightness[evaluation.current.rewards.isfinite()]
    found = chosen._probed(evaluation)["probe_probe"]
    assert found == (pytest.approx(counted.mean().item(), abs=1e-6) if len(counted) else None)


def test_a_probe_that_fails_is_named(followed, make_policy):
    def broken(images, prompts, metadata):
        raise KeyError("no such thing")

    chosen = followed(broken)
    with pytest.raises(RewardError, match="reward='broken' raised KeyError"):
        chosen.track(make_policy(chosen.env), Progress(1, 6), Tracker())


def settings(**changed):
    start = starting_point("DiffusionDenoise-Shapes-Color", "ddpo_is", None, None)
    return type(start)(**{**vars(start), "development_every": 1, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"probes": ("Color",), "development_every": 0}, "which this run has not; give development_every"),
        ({"probes": ("Color", "Color")}, "names a reward twice"),
        ({"probe_kwargs": {"RemoteReward": '{"token": "secret"}'}}, "^probe_kwargs holds 'token'"),
        ({"probes": ("Colour",)}, "reward='Colour' is unknown; did you mean 'Color'"),
        ({"probes": ("Color",), "probe_kwargs": {"Count": "{}"}}, "probe_kwargs='Count' is unknown"),
        ({"probes": ("Color",), "probe_kwargs": {"Color": "strict"}}, "'Color' has 'strict'; give a JSON object"),
        ({"probes": ("Color",), "probe_kwargs": {"Color": '{"strict": "no"}'}}, "strict='no' must be True or False"),
    ],
)
def test_bad_probes_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        make_probes(settings(**changed))


def test_probes_have_the_time_limit_of_the_reward():
    options = settings().env_options
    limited = settings(probes=("Color",), env_options=type(options)(reward_seconds=3.0))
    assert make_probes(limited)["Color"].seconds == 3.0
    plain = make_probes(settings(probes=("Color",), probe_kwargs={"Color": '{"strict": true}'}))["Color"]
    image = torch.ones(1, 3, 64, 64)
    strict = make_reward("Color", strict=True)
    assert evaluate(plain, image, ["a red circle"]).scores == evaluate(strict, image, ["a red circle"]).scores


def test_what_the_prompts_lack_is_told_before_anything_is_written(tiny_pipeline, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(tiny_pipeline, tmp_path / "run", "--probes", "OCR", "--env.prompts", "a red circle")
    assert "reward='OCR' with probes='OCR'" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()


def test_what_probes_name_has_to_be_trusted():
    stored = settings(
        probes=("my_module:score", "Color", "http://10.0.0.1"), probe_kwargs={"Color": '{"clip": "/etc"}'}
    )
    told = [(claim.act, claim.option) for claim in trust.run_claims(json.loads(json.dumps(stored.to_json())))]
    assert told == [("run", "probes"), ("contact", "probes"), ("read", "probe_kwargs Color clip")]
