"""Weighted sums against NumPy; standardisation that a resumed run and an evaluation find again."""

import json

import numpy as np
import pytest
import torch

from diffusion_gym.rewards import RewardError, RewardOutput, evaluate, make_reward
from diffusion_gym.rewards.weighted import WeightedSum


def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2))


def green(images, prompts, metadata):
    score = images[:, 1].mean((1, 2))
    return RewardOutput(100 * score, {"brightest": images[:, 1].amax((1, 2))})


def flat(images, prompts, metadata):
    return torch.full((len(prompts),), 2.0)


def broken(images, prompts, metadata):
    scores = red(images, prompts, metadata)
    scores[0] = float("nan")
    return scores


def batch(seed, number=6):
    return torch.rand(number, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def score(reward, images):
    return evaluate(reward, images, ["a"] * len(images))


def channel_means(images):
    return images.double().numpy().mean((2, 3)).T


def test_weighted_sum_and_its_parts():
    images = batch(0)
    output = score(make_reward({red: 0.5, green: -2}), images)
    first, second, _ = channel_means(images)
    np.testing.assert_allclose(output.scores.numpy(), 0.5 * first - 200 * second, rtol=1e-5)
    np.testing.assert_allclose(output.info["red"].numpy(), first, rtol=1e-5)
    np.testing.assert_allclose(output.info["green"].numpy(), 100 * second, rtol=1e-5)
    assert torch.equal(output.info["green/brightest"], images[:, 1].amax((1, 2)))
    assert set(output.info) == {"red", "green", "green/brightest"}


def test_given_statistics_standardise_the_named_parts():
    images = batch(0)
    output = score(make_reward({red: 1, green: 2}, z_scores={"green": [40.0, 5.0]}), images)
    first, second, _ = channel_means(images)
    np.testing.assert_allclose(output.scores.numpy(), first + 2 * (100 * second - 40) / 5, rtol=1e-4)
    np.testing.assert_allclose(output.info["green"].numpy(), 100 * second, rtol=1e-5)  # its own scale


def test_statistics_are_estimated_once_and_kept(tmp_path):
    path = tmp_path / "scales.json"
    reward = make_reward({red: 1, green: 1, flat: 1}, z_scores=str(path))
    with pytest.warns(UserWarning, match="estimated from 6 pictures"):
        score(reward, batch(0))
    first, second, _ = channel_means(batch(0))
    stored = json.loads(path.read_text())
    np.testing.assert_allclose(stored["red"], [first.mean(), first.std()], rtol=1e-5)
    np.testing.assert_allclose(stored["green"], [100 * second.mean(), 100 * second.std()], rtol=1e-5)
    assert stored["flat"] == [2, 1]  # no spread to divide by
    other_first, other_second, _ = channel_means(batch(1))
    expected = (other_first - first.mean()) / first.std() + (other_second - second.mean()) / second.std()
    later = score(reward, batch(1)).scores
    np.testing.assert_allclose(later.numpy(), expected, rtol=1e-3, atol=1e-4)
    resumed = make_reward({red: 1, green: 1, flat: 1}, z_scores=str(path))
    assert torch.equal(score(resumed, batch(1)).scores, later)


@pytest.mark.filterwarnings("ignore:z_scores")
def test_environments_of_one_run_share_the_statistics(tmp_path):
    """Made before either has scored, as for training and for the pictures."""
    pictures, training = (make_reward({red: 1}, z_scores=str(tmp_path / "scales.json")) for _ in range(2))
    score(pictures, batch(0))
    assert torch.equal(score(training, batch(1)).scores, score(pictures, batch(1)).scores)


@pytest.mark.filterwarnings("ignore:z_scores")
def test_statistics_leave_out_what_could_not_be_scored(tmp_path):
    reward = make_reward({broken: 1}, z_scores=str(tmp_path / "scales.json"))
    score(reward, batch(0))
    rest = channel_means(batch(0))[0][1:]
    stored = json.loads((tmp_path / "scales.json").read_text())["broken"]
    np.testing.assert_allclose(stored, [rest.mean(), rest.std()], rtol=1e-5)


def test_too_small_a_batch_gives_no_statistics(tmp_path):
    reward = make_reward({red: 1}, z_scores=str(tmp_path / "scales.json"))
    with pytest.raises(RewardError, match="cannot be estimated for 'red' from 1 scores"):
        score(reward, batch(0, number=1))
    assert not (tmp_path / "scales.json").exists()


def test_processes_do_not_each_estimate_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="does not exist, and every process would estimate other numbers"):
        make_reward({red: 1}, z_scores=str(tmp_path / "scales.json"))
    (tmp_path / "scales.json").write_text('{"red": [0.5, 0.1]}')
    make_reward({red: 1}, z_scores=str(tmp_path / "scales.json"))


@pytest.mark.parametrize(
    ("z_scores", "words"),
    [
        ({"rde": [0, 1]}, "did you mean 'red'"),
        ({"red": [0, 0]}, r"z_scores: red.1=0: input should be greater than 0; give \[mean, std\] by name"),
        ({"red": [0]}, "z_scores: the field 'red.1' is missing"),
        ({"red": [0, 1, 2]}, r"z_scores: red=\[0, 1, 2\]: tuple should have at most 2 items"),
        ({"red": "01"}, "z_scores: red='01': input should be a list"),
        ({"red": ["0", 1]}, "z_scores: red.0='0': input should be a valid number"),
        ({"red": [True, 1]}, "z_scores: red.0=True: input should be a valid number"),
        ({"red": [0, float("inf")]}, "z_scores: red.1=inf: input should be a finite number"),
        ({5: [0, 1]}, "z_scores: 5.*=5: input should be a valid string"),
        ([1, 2], r"z_scores: \[1, 2\]: input should be an object"),
    ],
)
def test_statistics_that_do_not_fit(z_scores, words):
    with pytest.raises(ValueError, match=words):
        make_reward({red: 1}, z_scores=z_scores)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "scales.json").write_text('{"red": [0.')
    with pytest.raises(ValueError, match="scales.json is not a JSON file"):
        make_reward({red: 1}, z_scores=str(tmp_path / "scales.json"))


def test_what_one_part_cannot_score_is_not_scored():
    assert score(make_reward({red: 1, broken: 1}), batch(0)).scores.isnan().tolist() == [True] + [False] * 5
    recorded = score(make_reward({red: 1, broken: 0}), batch(0))
    assert recorded.scores.isfinite().all() and recorded.info["broken"].isnan()[0]


def test_a_part_that_fails_is_named():
    def failing(images, prompts, metadata):
        raise OSError("gone")

    with pytest.raises(RewardError, match=r"^reward='failing' raised OSError: gone \(test_weighted.py:\d+\)$"):
        score(make_reward({red: 1, failing: 1}), batch(0))


def test_background_and_cancel_are_those_of_the_parts():
    class Waiting:
        background, cancelled = True, False

        def __call__(self, images, prompts, metadata):
            return red(images, prompts, metadata)

        def cancel(self):
            self.cancelled = True

    waiting = Waiting()
    reward = WeightedSum({"here": (red, 1.0), "there": (waiting, 1.0)})
    assert reward.background and not make_reward({red: 1}).background
    reward.cancel()
    assert waiting.cancelled
