"""What a reward of one's own may return, and what becomes of its pictures."""

import threading
import warnings

import numpy as np
import pytest
import torch

from diffusion_gym.rewards import RewardError, RewardOutput, evaluate, make_reward

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c"]


@pytest.mark.parametrize("answer", [[1, 2, 3], torch.tensor([1.0, 2.0, 3.0]), RewardOutput(torch.tensor([1, 2, 3]))])
def test_numbers_tensors_and_outputs_are_taken(answer):
    scores = evaluate(lambda *_: answer, IMAGES, PROMPTS).scores
    assert scores.dtype == torch.float32 and scores.tolist() == [1, 2, 3]


@pytest.mark.parametrize("answer", [None, "good", 1.0, [1.0, 2.0], torch.ones(3, 1)])
def test_anything_else_names_the_reward(answer):
    def mine(images, prompts, metadata):
        return answer

    with pytest.raises(RewardError, match=r"reward='mine' returned .*one number an image, shape \(3,\)"):
        evaluate(mine, IMAGES, PROMPTS)


def test_a_reward_that_raises_names_the_line(tmp_path):
    (tmp_path / "mine.py").write_text("import json\n\n\ndef mine(*batch):\n    return json.loads('no')\n")
    space = {}
    exec(compile((tmp_path / "mine.py").read_text(), str(tmp_path / "mine.py"), "exec"), space)
    with pytest.raises(RewardError, match=r"reward='mine' raised JSONDecodeError: .* \(mine.py:5\)$"):
        evaluate(space["mine"], IMAGES, PROMPTS)


def test_an_error_within_a_library_names_the_line_that_called_it():
    def mine(images, prompts, metadata):
        return torch.nn.functional.interpolate(images, mode="no such mode")

    line = mine.__code__.co_firstlineno + 1
    with pytest.raises(RewardError, match=rf"\(test_base.py:{line}\)$"):
        evaluate(mine, IMAGES, PROMPTS)


# --- components ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [
        [1, 0, 1],
        (1.0, 0.0, 1.0),
        [torch.tensor(1.0), torch.tensor(0.0), torch.tensor(1.0)],
        np.array([1.0, 0.0, 1.0]),
        np.array([True, False, True]),
        np.array([1, 0, 1], np.uint8)[::-1],
        torch.tensor([1, 0, 1]),
        torch.tensor([True, False, True]),
        torch.tensor([1.0, 0.0, 1.0], requires_grad=True),
    ],
    ids=repr,
)
def test_components_may_be_any_numbers(part):
    found = evaluate(lambda *_: RewardOutput(torch.ones(3), {"part": part}), IMAGES, PROMPTS).info["part"]
    assert found.dtype == torch.float32 and found.tolist() == [1, 0, 1] and not found.requires_grad


@pytest.mark.parametrize("part", [0.5, np.float64(0.5), torch.tensor(0.5)])
def test_a_single_number_is_a_component_of_each_picture(part):
    found = evaluate(lambda *_: RewardOutput(torch.ones(3), {"part": part}), IMAGES, PROMPTS).info["part"]
    assert found.tolist() == [0.5] * 3


@pytest.mark.parametrize("part", [None, "good", [1.0, 2.0], np.ones((3, 1)), ["a", "b", "c"]])
def test_a_component_that_is_no_number_a_picture_is_named(part):
    with pytest.raises(RewardError, match=r"returned part .*one number an image, shape \(3,\)"):
        evaluate(lambda *_: RewardOutput(torch.ones(3), {"part": part}), IMAGES, PROMPTS)


@pytest.mark.parametrize("info", [{"scores": torch.zeros(3)}, {"_part": torch.zeros(3)}, {5: torch.zeros(3)}])
def test_a_component_with_a_name_that_means_something_else_is_refused(info):
    with pytest.raises(RewardError, match=f"a component named {next(iter(info))!r}; name it by a string other than"):
        evaluate(lambda *_: RewardOutput(torch.ones(3), info), IMAGES, PROMPTS)


@pytest.mark.parametrize("info", [None, [torch.zeros(3)]])
def test_components_without_names_are_refused(info):
    with pytest.raises(RewardError, match="return components by name"):
        evaluate(lambda *_: RewardOutput(torch.ones(3), info), IMAGES, PROMPTS)


def test_what_a_reward_returned_is_not_written_again():
    scores, part = torch.zeros(3), np.zeros(3, np.float32)

    def counting(images, prompts, metadata):
        scores.add_(1)
        part[:] += 1
        return RewardOutput(scores, {"part": part})

    first = evaluate(counting, IMAGES, PROMPTS)
    evaluate(counting, IMAGES, PROMPTS)
    assert first.scores.tolist() == first.info["part"].tolist() == [1, 1, 1]


# --- pictures --------------------------------------------------------------------------------------------------


def red(images, prompts, metadata):
    return RewardOutput(images.mean((1, 2, 3)), {"red": images[:, 0].mean((1, 2))})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("bad", [[1], [0, 2]])
def test_a_picture_that_is_not_finite_scores_nan_and_leaves_the_others(bad, value):
    images = IMAGES.clone()
    images[bad, 0, 0, 0] = value
    seen = []

    def reward(images, prompts, metadata):
        assert images.isfinite().all()
        seen.extend(zip(prompts, metadata, strict=True))
        return red(images, prompts, metadata)

    metadata = [{"row": row} for row in range(3)]
    with pytest.warns(UserWarning, match=f"{len(bad)} of 3 pictures hold NaN or infinite values and score NaN"):
        output = evaluate(reward, images, PROMPTS, metadata)
    good = [row for row in range(3) if row not in bad]
    assert seen == [(PROMPTS[row], metadata[row]) for row in good]
    assert output.scores[bad].isnan().all() and output.info["red"][bad].isnan().all()
    torch.testing.assert_close(output.scores[good], IMAGES[good].mean((1, 2, 3)))
    torch.testing.assert_close(output.info["red"][good], IMAGES[good, 0].mean((1, 2)))


def test_a_reward_is_not_asked_where_no_picture_is_finite():
    with pytest.warns(UserWarning, match="3 of 3 pictures"):
        output = evaluate(lambda *_: pytest.fail("called"), torch.full_like(IMAGES, torch.nan), PROMPTS)
    assert output.scores.shape == (3,) and output.scores.isnan().all() and not output.info


@pytest.mark.parametrize("source", ["Compressibility", {"Compressibility": 1.0, "Incompressibility": 0.5}])
def test_registered_rewards_and_sums_score_it_nan_too(source):
    images = IMAGES.clone()
    images[1] = torch.nan
    reward = make_reward(source)
    with pytest.warns(UserWarning, match="1 of 3 pictures"):
        scores = evaluate(reward, images, PROMPTS).scores
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted = evaluate(reward, IMAGES, PROMPTS).scores
    assert scores[1].isnan() and torch.equal(scores[[0, 2]], wanted[[0, 2]])


def test_a_reward_that_writes_into_its_arguments_writes_into_copies():
    def writing(images, prompts, metadata):
        images.zero_()
        prompts.clear()
        metadata.clear()
        return torch.ones(3)

    images, prompts, metadata = IMAGES.clone(), list(PROMPTS), [{"row": row} for row in range(3)]
    parts = {writing: 1.0, red: 1.0}
    output = evaluate(make_reward(parts), images, prompts, metadata)
    assert torch.equal(images, IMAGES) and prompts == PROMPTS and len(metadata) == 3
    torch.testing.assert_close(output.info["red"], IMAGES.mean((1, 2, 3)))  # the sum's second part


# --- threads ---------------------------------------------------------------------------------------------------


def test_two_threads_take_turns_with_one_reward_and_not_with_two():
    entered, gate, inside, most = threading.Semaphore(0), threading.Event(), [], []

    class Slow:
        def __call__(self, images, prompts, metadata):
            inside.append(self)
            most.append(inside.count(self))
            entered.release()
            assert gate.wait(30)
            inside.remove(self)
            return torch.ones(3)

    one, other = Slow(), Slow()
    threads = [threading.Thread(target=evaluate, args=(reward, IMAGES, PROMPTS)) for reward in (one, one, other)]
    for thread in threads:
        thread.start()
    assert entered.acquire(timeout=30) and entered.acquire(timeout=30)  # one of the first two, and the third
    assert not entered.acquire(timeout=0.1)
    gate.set()
    for thread in threads:
        thread.join(30)
    assert most == [1, 1, 1]
