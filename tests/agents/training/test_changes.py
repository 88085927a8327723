"""What an evaluation says besides the reward: the change with its interval, diversity, and what a probe tells."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from command_line import failure, train_arguments
from diffusion_gym.agents.cli import main
from diffusion_gym.agents.diversity import by_prompt, centred, model_features, vendi_score
from diffusion_gym.agents.training import changes
from diffusion_gym.agents.training.changes import Probed, change_interval, diversity, probe_for
from diffusion_gym.agents.training.evaluation import compare, save_pictures, summary_text
from diffusion_gym.agents.training.pictures import cells


def test_the_interval_of_a_change_is_that_of_paired_differences():
    base, tuned = torch.tensor([0.1, 0.9, 0.4, float("nan"), 0.2]), torch.tensor([0.2, 1.0, 0.6, 1.0, float("inf")])
    expected = stats.ttest_rel([0.2, 1.0, 0.6], [0.1, 0.9, 0.4]).confidence_interval(0.95)
    assert change_interval(tuned, base) == pytest.approx(tuple(expected), rel=1e-5)
    assert change_interval(base[:1], base[:1]) == (0.0, 0.0)


def test_exploited_are_the_pictures_with_the_largest_rise_whose_probe_fell():
    base = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, float("nan")])
    tuned = torch.tensor([0.5, 2.0, 0.9, 0.2, 0.1, 0.0])
    rise = torch.tensor([1.0, 9.0, 0.5, 1.0, 0.0, 5.0])  # the probe of the second rose, the last has none
    assert Probed("x", tuned, base).exploited(rise) == [3, 0, 2]
    many = Probed("x", torch.zeros(50), torch.ones(50)).exploited(torch.arange(50.0))
    assert many == list(range(49, 41, -1))


@pytest.mark.parametrize(
    ("reward", "asked", "probe"),
    [
        ("Compressibility", None, None),
        ("Incompressibility", None, None),
        (lambda images, prompts, metadata: images.mean((1, 2, 3)), None, "Incompressibility"),
        ("Compressibility", "Incompressibility", "Incompressibility"),
        (lambda images, prompts, metadata: images.mean((1, 2, 3)), "none", None),
    ],
)
def test_the_probe_is_no_relative_of_the_reward(make_env, reward, asked, probe):
    assert probe_for(make_env(1, reward=reward), asked) == probe


@pytest.fixture
def comparison(make_env, make_policy, perturb):
    env = make_env(8, prompts=["a red circle", "two blue stars"], autoreset_mode="Disabled")
    policy = perturb(make_policy(env), 1.0)
    return env, policy, compare(env, policy, 8, 5, kl_samples=2, probe="Incompressibility")


def test_diversity_is_the_vendi_score_within_a_prompt(comparison):
    _, policy, found = comparison
    base = model_features(policy, found.base.finished)
    tuned = centred(model_features(policy, found.tuned.finished), base)
    assert found.diversity["vendi"] == pytest.approx(by_prompt(tuned, found.tuned.prompts)["vendi"])
    single = diversity(policy, *(part for part in (found.tuned, found.base)))
    assert single == found.diversity and single["base_vendi"] != single["vendi"]


def test_without_a_prompt_that_repeats_diversity_is_that_of_all_pictures(make_env, make_policy):
    env = make_env(2, prompts=[f"{count} stars" for count in range(400)], autoreset_mode="Disabled")
    policy = make_policy(env)
    found = compare(env, policy, 4, 5, kl_samples=2)
    assert len(set(found.base.prompts)) == 4
    features = model_features(policy, found.base.finished)
    assert found.diversity["base_vendi"] == pytest.approx(vendi_score(centred(features, features)))


def test_a_network_without_features_has_no_diversity(comparison, monkeypatch):
    _, policy, found = comparison
    monkeypatch.setattr(policy.model, "unet", torch.nn.Linear(2, 2))
    assert diversity(policy, found.tuned, found.base) == {}


def test_the_probe_scores_the_pictures_of_both_models(comparison, monkeypatch):
    from diffusion_gym.images import to_float
    from diffusion_gym.rewards import evaluate, make_reward

    env, _, found = comparison
    monkeypatch.setattr(changes, "_BATCH", 3)
    scored = changes.probed(env, make_reward("Incompressibility"), found.tuned, found.base)
    for part, scores in ((found.tuned, scored.tuned), (found.base, scored.base)):
        expected = evaluate(make_reward("Incompressibility"), to_float(part.images), list(part.prompts), [{}] * 8)
        assert torch.equal(scores, expected.scores.cpu())
    assert torch.equal(scored.tuned, found.probed.tuned) and scored.name == "Incompressibility"


def test_the_summary_and_the_pictures_are_of_the_same_places(comparison, tmp_path):
    _, _, found = comparison
    places = found.exploited
    assert places, "the fixture has nothing to show"
    row = found.summary()["probe"]
    assert [entry["prompt"] for entry in row["pictures"]] == [found.tuned.prompts[place] for place in places]
    assert all(entry["probe"] < entry["base_probe"] for entry in row["pictures"])
    save_pictures(tmp_path, found)
    shown = cells(Image.open(tmp_path / "exploited-after.png"), row["size"], len(places))
    for place, picture in zip(places, shown, strict=True):
        np.testing.assert_array_equal(np.asarray(picture), found.tuned.images[place])
    text = summary_text(found.summary())
    assert "Incompressibility, not trained on: " in text and "different pictures (Vendi score): " in text


def test_pictures_of_an_earlier_evaluation_do_not_stay(comparison, tmp_path, monkeypatch):
    _, _, found = comparison
    save_pictures(tmp_path, found)
    monkeypatch.setattr(Probed, "exploited", lambda self, rise: [])
    save_pictures(tmp_path, found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["after.png", "before.png"]


def test_eval_takes_the_probe_that_it_is_given_and_the_page_shows_it(tiny_pipeline, tmp_path, capsys):
    out = tmp_path / "run"
    main(train_arguments(tiny_pipeline, out))
    assert "probe='Nothing'" in failure(["eval", str(out), "--probe", "Nothing"], capsys).replace("reward=", "probe=")
    main(["eval", str(out), "--samples", "8", "--json"])
    assert "probe" not in json.loads(capsys.readouterr().out.splitlines()[-1] or "{}")
    main(["eval", str(out), "--samples", "8", "--probe", "Incompressibility"])
    assert f"Next: diffusion-gym report {out}" in capsys.readouterr().out
    assert json.loads((out / "eval.json").read_text())["probe"]["name"] == "Incompressibility"
    main(["report", str(out)])
    assert "Incompressibility" in (out / "report.html").read_text()
