"""The answers at the head of a run's page, by numbers whose answer is known."""

import pytest

from diffusion_gym.agents.report.answers import answers

PART = {
    "samples": 64,
    "reward_mean": 0.9,
    "reward_ci95": [0.8, 1.0],
    "base_reward_mean": 0.4,
    "base_reward_ci95": [0.3, 0.5],
    "kl_to_base": 12.5,
}


def words(found):
    return {answer.question: answer.word for answer in found}


@pytest.mark.parametrize(
    ("change", "word", "good"),
    [([0.1, 0.3], "yes", True), ([-0.1, 0.3], "not shown", None), ([-0.4, -0.1], "no, it became worse", False)],
)
@pytest.mark.parametrize("part", ["training", "held out"])
def test_it_learnt_where_the_interval_of_the_change_excludes_0(change, word, good, part):
    measured = PART | {"reward_change_ci95": change}
    evaluation = measured if part == "training" else PART | {"held_out": measured}
    answer = answers(evaluation, 100, 60.0)[0 if part == "training" else 1]
    assert (answer.word, answer.good) == (word, good)
    assert "95 % interval" in answer.values[0].details[0]


@pytest.mark.parametrize(
    ("base", "word"), [([0.3, 0.5], "yes"), ([0.3, 0.85], "not shown"), ([1.1, 1.2], "no, it became worse")]
)
def test_an_evaluation_without_that_interval_is_judged_by_the_two_it_has(base, word):
    assert answers(PART | {"base_reward_ci95": base}, 0, 0.0)[0].word == word


def test_a_strict_reward_is_shown_once():
    success = {"success": 0.9, "base_success": 0.4, "success_ci95": [0.8, 0.95], "base_success_ci95": [0.3, 0.5]}
    assert [value.name for value in answers(PART | success, 0, 0.0)[0].values] == ["Strict success, training prompts"]
    graded = answers(PART | success | {"reward_mean": 0.95}, 0, 0.0)[0].values
    assert [value.name for value in graded] == ["Strict success, training prompts", "Reward, training prompts"]


def test_the_cost_has_queries_time_nats_and_diversity():
    evaluation = PART | {"vendi": 2.0, "base_vendi": 5.0, "held_out": PART | {"kl_to_base": 8.0}}
    cost = answers(evaluation, 6400, 240.0)[2]
    assert [(value.before, value.after) for value in cost.values] == [
        ("", "6,400"),
        ("", "12.500 nats"),
        ("5.000", "2.000"),
    ]
    assert "4.0 minutes of training, 26.7 images/s" in cost.values[0].details[0]
    assert "held-out prompts 8.000" in cost.values[1].details[0]
    assert [answer.question for answer in answers(None, 10, 0.0)] == ["What did it cost?"]


@pytest.mark.parametrize(
    ("change", "good"), [([-0.3, -0.1], False), ([-0.3, 0.1], True), ([0.1, 0.3], True), ([None, None], True)]
)
def test_it_exploited_where_the_probe_fell(change, good):
    probe = {"name": "Aesthetic", "mean": 4.8, "base_mean": 5.0, "change_ci95": change, "pictures": [{}, {}]}
    answer = answers(PART | {"probe": probe}, 0, 0.0)[-1]
    assert answer.question == "What did it exploit?" and answer.good is good
    assert answer.values[0].name == "Aesthetic" and "The 2 pictures" in answer.values[0].details[-1]
