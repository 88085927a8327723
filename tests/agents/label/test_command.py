"""`label` and `fit-preferences` from the command line's side, on the tiny pipeline; the page is its own test."""

import pytest
import torch

from command_line import failure, train_arguments
from diffusion_gym.agents.cli import main
from diffusion_gym.agents.label.command import FitOptions, LabelOptions, run_fit, run_label, summary
from diffusion_gym.agents.label.questions import Questions
from diffusion_gym.rewards import evaluate, make_reward
from diffusion_gym.rewards.preference.labels import Labels

PROMPTS = ("a red circle", "two blue stars")


def by_brightness(number):
    """Stands in for the page: somebody answers `number` questions, for the brighter picture."""

    def answer(labels, features):
        questions = Questions(labels, features)
        names = list(labels.pictures)
        bright = dict(zip(names, labels.images(names).mean((1, 2, 3)).tolist(), strict=True))
        for _ in range(number):
            asked = questions.question("anna")
            better = "first" if bright[asked.first] > bright[asked.second] else "second"
            assert questions.answer("anna", asked.number, better)

    return answer


def test_label_fit_and_train_on_the_answers_in_one_folder(tiny_pipeline, tmp_path, capsys):
    out, run = tmp_path / "labels", tmp_path / "run"
    options = LabelOptions(model=str(tiny_pipeline), prompts=PROMPTS, out=out, pictures=24, group=12)
    run_label(options, by_brightness(110))
    labels = Labels(out)
    assert [picture.prompt for picture in labels.pictures.values()].count("a red circle") == 12
    assert len(labels.answers["anna"]) == 110 and "anna: 110 answers" in capsys.readouterr().out
    run_fit(FitOptions(out))
    told = capsys.readouterr().out
    assert "held-out accuracy" in told and "same answer 11 of 11 times" in told and "--env.reward" in told
    reward = make_reward(str(out / "labels.safetensors"))
    names = list(labels.pictures)[:12]
    images = labels.images(names)
    output = evaluate(reward, images, ["a red circle"] * 12)
    brightness = images.mean((1, 2, 3))
    assert torch.corrcoef(torch.stack([output.scores, brightness]))[0, 1] > 0.7
    assert (output.info["uncertainty"] > 0).all()

    arguments = {"--env.reward": out / "labels.safetensors", "--agent.trainable": "full"}
    main(train_arguments(tiny_pipeline, run, **arguments))
    capsys.readouterr()
    second = LabelOptions(run=run, out=out, pictures=4, group=2)
    run_label(second, by_brightness(1))
    run_label(second, by_brightness(1))  # the same pictures
    again = Labels(out)
    assert len(again.pictures) == 28 and len(again.answers["anna"]) == 112
    assert {picture.made_by for picture in again.pictures.values()} == {
        f"{tiny_pipeline}, seed 0",
        f"{run}, iteration 2, seed 0",
    }
    assert summary(again).startswith("anna: 112 answers")


def test_label_and_fit_with_a_transformer(tmp_path):
    out = tmp_path / "labels"
    options = LabelOptions(model="ShapesFlow", prompts=PROMPTS, out=out, pictures=16, group=8)
    run_label(options, by_brightness(60))
    run_fit(FitOptions(out))
    labels, reward = Labels(out), make_reward(str(out / "labels.safetensors"))
    names = list(labels.pictures)
    images, prompts = labels.images(names), [labels.pictures[name].prompt for name in names]
    scores, bright = evaluate(reward, images, prompts).scores, images.mean((1, 2, 3))
    for start in (0, 8):  # pictures of one prompt were compared
        rows = slice(start, start + 8)
        assert torch.corrcoef(torch.stack([scores[rows], bright[rows]]))[0, 1] > 0.5


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "out is missing"),
        (["somewhere", "--model", "Shapes"], "both name what makes the pictures"),
        (["--model", "Shapes"], "out is missing"),
        (["--model", "Shapes", "--out", "OUT", "--pictures", "30"], "pictures=30 must be a multiple of group=16"),
        (["--model", "Shapes", "--out", "OUT", "--group", "1"], "group=1 must be at least 2"),
        (["--model", "Shapes", "--out", "OUT", "--answers", "0"], "answers=0 must be at least 1"),
        (["--model", "Shapes", "--out", "OUT", "--port", "70000"], "port=70000 must be"),
        (["--out", "OUT"], "holds no labels"),
        (["--model", "Shapess", "--out", "OUT"], "model='Shapess'"),
        (["OUT"], "config.json"),
    ],
)
def test_mistakes_of_label(arguments, told, tmp_path, capsys):
    out = tmp_path / "labels"
    given = [str(out) if argument == "OUT" else argument for argument in arguments]
    assert told in failure(["label", *given], capsys)
    assert not (out / "labels.json").exists()


def test_mistakes_of_fit_preferences(tmp_path, capsys):
    assert "holds no labels" in failure(["fit-preferences", str(tmp_path)], capsys)


def test_the_file_of_a_fit_has_the_name_by_which_a_reward_is_known(tiny_pipeline, tmp_path, capsys):
    out = tmp_path / "labels"
    run_label(LabelOptions(model=str(tiny_pipeline), prompts=PROMPTS, out=out, pictures=4, group=2), by_brightness(1))
    wrong = failure(["fit-preferences", str(out), "--out", str(tmp_path / "reward.pt")], capsys)
    assert "must end in .safetensors" in wrong
    assert "holds 1 answers that choose a picture" in failure(["fit-preferences", str(out)], capsys)
