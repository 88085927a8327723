"""What a reward of one's own may return."""

import pytest
import torch

from diffusion_gym.rewards import RewardError, RewardOutput, evaluate

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
