"""The reward `PromptAlignment`: question, description, score."""

import huggingface_hub
import pytest
import torch

from diffusion_gym.images import to_uint8
from diffusion_gym.rewards import REWARDS, RewardError, default_prompts, evaluate, make_reward
from diffusion_gym.rewards.bertscore import BERTScore
from diffusion_gym.testing.random_vlm import random_prompt_alignment
from waiting import at_once

PROMPTS = ["a cat riding a bike", "a dog playing chess", "a wolf washing dishes"]
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Scripted:
    """A vision-language model that gives the answers of a list."""

    name, remote = "scripted", True

    def __init__(self, *answers):
        self.answers = list(answers)

    def describe(self, pictures, questions):
        self.pictures, self.questions = pictures, list(questions)
        return self.answers[: len(questions)]

    def cancel(self):
        self.cancelled = True


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The keywords of the reward on tiny random models."""
    return random_prompt_alignment(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def bert(tiny):
    return {key: value for key, value in tiny.items() if key.startswith("bertscore")}


def recall(bert, answers, references):
    return BERTScore(bert["bertscore_model"], layers=bert["bertscore_layers"])(answers, references).recall


def test_score_is_the_recall_of_the_prompt_in_the_description(bert):
    answers = ["a cat and a bike in a picture", "a dog playing chess", "green"]
    vlm = Scripted(*answers)
    output = evaluate(make_reward("PromptAlignment", vlm=vlm, **bert), IMAGES, PROMPTS)
    assert torch.equal(output.scores, recall(bert, answers, PROMPTS))
    assert output.scores[1].item() == pytest.approx(1, abs=1e-5)
    # The roles matter: the prompt is the reference.
    assert not torch.allclose(output.scores, recall(bert, PROMPTS, answers), atol=1e-3)
    assert vlm.questions == ["what is happening in this image?"] * 3
    assert torch.equal(vlm.pictures, to_uint8(IMAGES))


@pytest.mark.parametrize(
    "thought",
    ["<think>two of them? no.\n</think>\n\n{}", "so, a cat.</think>{}", "<think>a</think> <think>b</think>{}", " {}"],
)
@pytest.mark.parametrize("mode", ["describe", "count"])
def test_what_a_model_thinks_aloud_is_not_judged(bert, mode, thought):
    prompts = PROMPTS if mode == "describe" else ["two cats", "three dogs", "four wolves"]
    answers = ["a cat and a bike", "a dog", "green"] if mode == "describe" else ["two", "3", "five"]
    options = {"mode": mode, **bert}
    plain = evaluate(make_reward("PromptAlignment", vlm=Scripted(*answers), **options), IMAGES, prompts)
    reward = make_reward("PromptAlignment", vlm=Scripted(*map(thought.format, answers)), **options)
    assert torch.equal(evaluate(reward, IMAGES, prompts).scores, plain.scores)
    assert [answer.strip() for answer in reward.descriptions] == answers


@pytest.mark.parametrize("cut", ["<think>The picture shows two", "<THINK>hm</THINK>", "hm</think>\n"])
def test_a_model_that_only_thought_gave_no_answer(bert, cut):
    reward = make_reward("PromptAlignment", vlm=Scripted("a cat", cut, "a wolf"), **bert)
    with pytest.warns(
        UserWarning, match="no answer after its <think> for 1 of 3 pictures, which score NaN; .*max_tokens"
    ):
        output = evaluate(reward, IMAGES, PROMPTS)
    assert output.scores.isnan().tolist() == [False, True, False]
    assert reward.descriptions == ["a cat", None, "a wolf"]


def test_bertscore_by_its_package_scores_alike(bert):
    native, package = (
        evaluate(
            make_reward("PromptAlignment", vlm=Scripted("a cat", "a bike", "dishes"), bertscore=kind, **bert),
            IMAGES,
            PROMPTS,
        )
        for kind in ("native", "package")
    )
    torch.testing.assert_close(native.scores, package.scores, atol=1e-5, rtol=0)


def test_info_holds_the_three_scores_of_each_picture(bert):
    output = evaluate(
        make_reward("PromptAlignment", vlm=Scripted("a cat", "a bike", "dishes"), **bert), IMAGES, PROMPTS
    )
    assert set(output.info) == {"precision", "recall", "f1"}
    precision, found, f1 = (output.info[key] for key in ("precision", "recall", "f1"))
    assert torch.equal(found, output.scores)
    torch.testing.assert_close(f1, 2 * precision * found / (precision + found))


def test_question_and_reference_may_be_others(bert):
    vlm = Scripted("a cat", "a dog", "a wolf")
    question, reference = "what animal is this?", "The image contains {prompt}"
    reward = make_reward("PromptAlignment", vlm=vlm, question=question, reference=reference, **bert)
    scores = evaluate(reward, IMAGES, PROMPTS).scores
    assert vlm.questions == [question] * 3
    assert torch.equal(scores, recall(bert, vlm.answers, [f"The image contains {prompt}" for prompt in PROMPTS]))


def test_descriptions_of_the_last_batch_are_kept(bert):
    reward = make_reward("PromptAlignment", vlm=Scripted("a cat", None, "a wolf"), **bert)
    assert reward.descriptions == []
    evaluate(reward, IMAGES, PROMPTS)
    assert reward.descriptions == ["a cat", None, "a wolf"]


def test_picture_without_description_scores_nan_and_leaves_the_others(bert):
    output = evaluate(make_reward("PromptAlignment", vlm=Scripted("a cat", None, "a wolf"), **bert), IMAGES, PROMPTS)
    assert output.scores.isnan().tolist() == [False, True, False]
    assert torch.equal(output.scores[[0, 2]], recall(bert, ["a cat", "a wolf"], [PROMPTS[0], PROMPTS[2]]))
    assert all(part.isnan().tolist() == [False, True, False] for part in output.info.values())


def test_no_description_at_all_is_an_error(bert):
    with pytest.raises(RewardError, match="described none of 3 pictures"):
        evaluate(make_reward("PromptAlignment", vlm=Scripted(None, None, None), **bert), IMAGES, PROMPTS)


def test_empty_description_scores_zero(bert):
    output = evaluate(make_reward("PromptAlignment", vlm=Scripted("", " ", "a wolf"), **bert), IMAGES, PROMPTS)
    assert output.scores[:2].tolist() == [0, 0] and output.scores[2] > 0


def test_count_scores_the_number_and_needs_no_encoder():
    vlm = Scripted("There are four wolves.", "3", None)
    reward = make_reward("PromptAlignment", vlm=vlm, mode="count")
    output = evaluate(reward, IMAGES, ["four wolves", "two cats", "two dogs"])
    assert output.scores[:2].tolist() == [1, 0] and output.scores[2].isnan()
    assert output.info["counted"][:2].tolist() == [4, 3]
    assert vlm.questions[1] == "How many cats are there in this image? Answer with a number."


def test_count_refuses_prompts_without_a_number():
    reward = make_reward("PromptAlignment", vlm=Scripted("one"), mode="count")
    with pytest.raises(RewardError, match="prompt='a cat riding a bike'|prompt='cats'"):
        evaluate(reward, IMAGES[:1], ["cats"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "guess"}, "mode='guess' must be describe, count, score or compare"),
        ({"bertscore": "other"}, "bertscore='other' must be 'native' or 'package'"),
        ({"reference": "a picture"}, "reference='a picture' must hold {prompt}"),
        ({"mode": "count", "question": "How many?"}, "must hold {things}"),
    ],
)
def test_option_that_makes_no_sense_is_named(options, message, bert):
    with pytest.raises(ValueError, match=message):
        make_reward("PromptAlignment", vlm=Scripted(), **bert, **options)


def test_misspelt_keyword_is_named(tiny):
    with pytest.raises(TypeError, match="'max_token' is unknown; did you mean 'max_tokens'"):
        make_reward("PromptAlignment", **tiny, max_token=3)


@pytest.mark.parametrize(("name", "meant"), [("max_token", "max_tokens"), ("mod", "mode"), ("zzz", None)])
def test_keywords_are_looked_at_before_the_weights(name, meant):
    words = f"'{name}' is unknown" + (f"; did you mean '{meant}'" if meant else "")
    with pytest.raises(TypeError, match=words):
        make_reward("PromptAlignment", bertscore_model="/nowhere", vlm="/nowhere", **{name: 3})


def test_defaults_are_the_papers_and_fail_at_once_without_their_files(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with at_once(), pytest.raises(FileNotFoundError, match="bertscore_model='microsoft/deberta-xlarge-mnli'"):
        make_reward("PromptAlignment")
    with at_once(), pytest.raises(FileNotFoundError, match="vlm='llava-hf/llava-1.5-7b-hf'"):
        make_reward("PromptAlignment", mode="count")


def test_registered_for_photographs_with_prompts():
    assert REWARDS.fits("PromptAlignment", {"prompt", "photo"})
    assert not REWARDS.fits("PromptAlignment", {"photo", "face"})
    assert REWARDS.default_prompts("PromptAlignment") == "animal-activities"


def test_prompts_by_default_go_with_the_mode(bert):
    described, counted = (
        make_reward("PromptAlignment", vlm=Scripted(), mode=mode, **bert) for mode in ("describe", "count")
    )
    assert default_prompts("PromptAlignment", described) == default_prompts("mine", described) == "animal-activities"
    assert default_prompts("PromptAlignment", counted) == default_prompts("mine", counted) == "counting"
    source = {"PromptAlignment": 1.0}
    keywords = {"PromptAlignment": {"vlm": Scripted(), "mode": "count"}}
    assert default_prompts(source, make_reward(source, keywords=keywords)) == "counting"


# --- with a tiny LLaVA in process, and a real environment ---


def test_cancel_reaches_the_model(bert, tmp_path):
    vlm = Scripted()
    make_reward("PromptAlignment", vlm=vlm, cache=str(tmp_path), **bert).cancel()
    assert vlm.cancelled


def test_llava_and_bert_together(tiny, bert):
    reward = make_reward("PromptAlignment", **tiny)
    output = evaluate(reward, IMAGES, PROMPTS)
    assert not reward.background and len(reward.descriptions) == 3
    assert torch.equal(output.scores, recall(bert, reward.descriptions, PROMPTS))
    again = evaluate(make_reward("PromptAlignment", **tiny), IMAGES, PROMPTS)
    assert torch.equal(output.scores, again.scores)


def test_cache_is_used(tiny, tmp_path):
    for _ in range(2):
        reward = make_reward("PromptAlignment", **tiny, cache=str(tmp_path / "answers"))
        evaluate(reward, IMAGES, PROMPTS)
    assert len(list((tmp_path / "answers").rglob("*.json"))) == 3


def test_environment_scores_its_pictures(make_env, tiny):
    env = make_env(2, reward="PromptAlignment", reward_kwargs=tiny, prompts=PROMPTS, num_inference_steps=2)
    env.reset(seed=0)
    for _ in range(2):
        actions = torch.zeros(env.action_space.shape)
        _, rewards, _, _, info = env.step(actions)
    final = info["final_info"]
    references = list(final["prompt"])
    descriptions = env.reward.vlm.describe(torch.as_tensor(final["image"]), [env.reward._judge.question] * 2)
    assert descriptions == env.reward.descriptions
    bertscore = BERTScore(tiny["bertscore_model"], layers=tiny["bertscore_layers"])
    torch.testing.assert_close(rewards, bertscore(descriptions, references).recall)
    env.close()
