"""Prompts "n animals", and what counts as the right answer."""

import math

import pytest
import torch

from diffusion_gym.prompts import make_prompts
from diffusion_gym.rewards.question_answer import Counting, parse_answer, parse_prompt


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("4", 4),
        ("Four", 4),
        ("four.", 4),
        ("There are four wolves in this image.", 4),
        ("four (4)", 4),
        ("There are 12 wolves", 12),
        ("Twelve!", 12),
        ("zero", 0),
        ("1,200 ants", 1200),
        ("2.5", 2.5),
        ("", None),
        ("many", None),
        ("someone", None),
        ("the 4th", None),
        ("two or three", None),
        ("4 wolves and 1 dog", None),
        ("3-4", None),
        ("twenty-one", None),
        ("1.2.3", None),
        ("fourteenth", None),
    ],
)
def test_an_answer_is_the_one_number_in_it(answer, number):
    assert parse_answer(answer) == number


@pytest.mark.parametrize(
    ("prompt", "number", "things"),
    [
        ("four wolves", 4, "wolves"),
        ("Four polar bears.", 4, "polar bears"),
        ("7 geese", 7, "geese"),
        ("eleven ants", 11, "ants"),
        ("a cat", 1, "cats"),
        ("an ant", 1, "ants"),
        ("one wolf", 1, "wolves"),
    ],
)
def test_a_prompt_is_a_number_and_a_noun(prompt, number, things):
    assert parse_prompt(prompt) == (number, things)


@pytest.mark.parametrize("prompt", ["", "wolves", "four", "the four wolves", "fourteenth wolf", "some wolves"])
def test_other_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match=f"prompt={prompt!r} is not of the form 'n things'"):
        Counting().questions([prompt])


def test_every_prompt_of_the_counting_set_can_be_judged():
    chosen = make_prompts("counting")
    for prompt in (*chosen.prompts, *chosen.held_out):
        number, things = parse_prompt(prompt)
        assert 1 <= number <= 10 and prompt.endswith(f" {things}")


def test_score_is_one_for_the_prompts_number_and_else_zero():
    judged = Counting().judge(
        ["four", "3", "I cannot tell", "There are 2."],
        ["four wolves", "four wolves", "two cats", "2 cats"],
        torch.device("cpu"),
    )
    assert judged.scores.tolist() == [1, 0, 0, 1]
    counted = judged.info["counted"].tolist()
    assert counted[:2] + counted[3:] == [4, 3, 2] and math.isnan(counted[2])


def test_question_names_the_things():
    assert Counting().questions(["four wolves", "a cat"]) == [
        "How many wolves are there in this image? Answer with a number.",
        "How many cats are there in this image? Answer with a number.",
    ]
    assert Counting("{things}?").questions(["four wolves"]) == ["wolves?"]
    with pytest.raises(ValueError, match="question='How many\\?' must hold {things}"):
        Counting("How many?")


@pytest.mark.parametrize(
    "prompt",
    ["a cat riding a bike", "a dog washing dishes", "an ant and flies", "a polar bear on ice", "a cat in a hat."],
)
def test_an_article_that_begins_a_scene_counts_nothing(prompt):
    with pytest.raises(ValueError, match="use prompts='counting'"):
        parse_prompt(prompt)


@pytest.mark.parametrize("prompt", ["a king", "a black king", "a running dog", "a polar bear", "an inn"])
def test_an_article_before_one_thing_counts_one(prompt):
    assert parse_prompt(prompt)[0] == 1


def test_no_prompt_of_the_activities_is_taken_for_a_number():
    for prompt in make_prompts("animal-activities").prompts:
        with pytest.raises(ValueError, match="is not of the form"):
            parse_prompt(prompt)
