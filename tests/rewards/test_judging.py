"""Judges with a number or a verdict on two pictures, behind a chat server, and the win rates that come of them."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_gym.rewards import RewardError, evaluate, make_reward
from diffusion_gym.rewards.judging import Pair, Scoring, pairs_within, parse_score, parse_verdict, win_rates


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("7", 7),
        ("I give it a 7.5.", 7.5),
        ("7 out of 10", None),
        ("Alignment Score: 3\nFinal Score: **4.2**", 4.2),
        ("<answer>3</answer>, not 5", 3),
        ("-1", -1),
        ("a fine picture", None),
        ("4x4", None),
    ],
)
def test_scores_are_read(answer, number):
    assert parse_score(answer) == number


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("1", 1),
        ("2.", 2),
        ("0", 0),
        ("Picture 2", 2),
        ("The second one.", 2),
        ("Image 1 is better than Image 2.", 1),
        ("Image 2 is much better", 2),
        ("<think>1 is dark</think><answer>Image 2 is better</answer>", 2),
        ("Neither is better.", 0),
        ("It is a tie", 0),
        ("1 and 2", None),
        ("1.5", None),
        ("12", None),
        ("", None),
    ],
)
def test_verdicts_are_read(answer, verdict):
    assert parse_verdict(answer) == verdict


def test_win_rates_by_hand():
    pairs = pairs_within([7, 3, 7, 7], both_orders=False)
    assert pairs == [(0, 2), (0, 3), (2, 3)]
    rates, compared = win_rates(pairs, [1, 0, None], 4)
    assert rates.tolist() == [0.75, 0.5, 0.0, 0.5] and compared.tolist() == [2, 0, 1, 1]
    assert pairs_within([1, 1], both_orders=True) == [Pair(0, 1), Pair(1, 0)]


def pixels(body):
    parts = [part for part in body["messages"][0]["content"] if part["type"] == "image_url"]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(p["image_url"]["url"].split(",")[1])))) for p in parts]


def question(body):
    return body["messages"][0]["content"][-1]["text"]


@pytest.fixture
def judge(server):
    def made(**keywords):
        return make_reward("PromptAlignment", vlm=server.url, backoff=0.001, retries=0, **keywords)

    return made


def grey(*levels):
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()


@pytest.mark.parametrize("both_orders", [True, False])
def test_win_rates_of_a_judge_that_likes_bright_pictures(both_orders, server, judge):
    server.reply = lambda number, body: server.completion(
        f"Image {1 + int(pixels(body)[1].mean() > pixels(body)[0].mean())} is better"
    )
    reward = judge(mode="compare", both_orders=both_orders)
    images, prompts = grey(0.1, 0.9, 0.5, 0.3, 0.7), ["a cat", "a cat", "a cat", "a dog", "a dog"]
    output = evaluate(reward, images, prompts)
    assert output.scores.tolist() == [0, 1, 0.5, 0, 1]
    times = 2 if both_orders else 1
    assert output.info["comparisons"].tolist() == [2 * times, 2 * times, 2 * times, times, times]
    assert len(server.requests) == 4 * times
    bodies = [request["body"] for request in server.requests]
    assert all(len(pixels(body)) == 2 for body in bodies)
    assert sorted('"a dog"' in question(body) for body in bodies) == [False] * (3 * times) + [True] * times
    by_group = reward.compare(images, prompts, [{}] * 5, [0, 0, 1, 1, 1])
    assert by_group.scores.tolist() == [0, 1, 0.5, 0, 1]
    assert reward.background


def test_a_judge_of_places_makes_all_equal_where_both_orders_are_asked(server, judge):
    server.reply = lambda number, body: server.completion("1")
    scores = evaluate(judge(mode="compare"), grey(0.1, 0.5, 0.9), ["a cat"] * 3).scores
    assert scores.tolist() == [0.5] * 3


def test_pictures_that_are_alone_are_not_asked_about(server, judge):
    output = evaluate(judge(mode="compare"), grey(0.1, 0.5), ["a cat", "a dog"])
    assert output.scores.tolist() == [0.5, 0.5] and output.info["comparisons"].tolist() == [0, 0]
    assert not server.requests


def test_pairs_without_a_verdict_do_not_count_and_none_at_all_is_an_error(server, judge):
    server.reply = lambda number, body: server.completion("1" if "dog" in question(body) else "hm")
    reward = judge(mode="compare", both_orders=False)
    with pytest.warns(UserWarning, match="gave no verdict on 1 of 2 pairs"):
        scores = evaluate(reward, grey(0.1, 0.5, 0.3, 0.7), ["a cat", "a cat", "a dog", "a dog"]).scores
    assert scores.tolist() == [0.5, 0.5, 1, 0]
    with pytest.raises(RewardError, match="gave no verdict on 1 pairs, such as 'hm'"):
        evaluate(reward, grey(0.1, 0.5), ["a cat", "a cat"])


def test_a_number_is_scored_on_its_scale(server, judge):
    server.reply = lambda number, body: server.completion(f"Final Score: {pixels(body)[0].mean() / 51:.0f}")
    output = evaluate(judge(mode="score", scale=(1, 5)), grey(0.2, 1.0, 0.6, 0.0), ["a cat"] * 4)
    assert output.info["answered"][:3].tolist() == [1, 5, 3] and output.info["answered"][3].isnan()
    assert output.scores[:3].tolist() == [0, 1, 0.5] and output.scores[3].isnan()
    assert 'show "a cat"' in question(server.requests[0]["body"]) and "1 to 5" in question(server.requests[0]["body"])


def test_own_questions_hold_the_prompt(server, judge):
    server.reply = lambda number, body: server.completion("2")
    evaluate(judge(mode="compare", question="{prompt}: 1 or 2?", both_orders=False), grey(0.1, 0.2), ["a cat"] * 2)
    assert question(server.requests[0]["body"]) == "a cat: 1 or 2?"
    for mode in ("score", "compare"):
        with pytest.raises(ValueError, match=r"question='which\?' must hold {prompt}"):
            judge(mode=mode, question="which?")


@pytest.mark.parametrize("scale", [(1, 1), (5, 1), (1,), "ab", (0, float("inf")), (float("nan"), 1)])
def test_a_scale_is_two_ends(scale):
    with pytest.raises(ValueError, match="scale=.* must be two numbers"):
        Scoring(scale=scale)


def test_a_model_in_process_cannot_compare(tmp_path):
    from diffusion_gym.testing.random_vlm import write_random_llava

    reward = make_reward("PromptAlignment", vlm=str(write_random_llava(tmp_path)), mode="compare")
    with pytest.raises(RewardError, match="give the URL of a chat server"):
        evaluate(reward, grey(0.1, 0.2), ["a cat"] * 2)
