"""`OCR` on rendered text, read by the real networks that come with rapidocr-onnxruntime."""

import functools
import importlib.util
import random
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from diffusion_gym.prompts import make_prompts
from diffusion_gym.prompts.ocr import PATH
from diffusion_gym.rewards import RewardError, evaluate, make_reward
from diffusion_gym.rewards.ocr import asked_text, edit_distance

TEXTS = {
    32: ["A7", "CAT", "GO"],
    64: ["CAT", "STOP", "Hello"],
    128: ["OPEN", "Good day", "Diffusion"],
    192: ["CLOSED", "Hello world", "Keep left"],
    256: ["Hello", "New York", "Deep learning"],
}


def picture(text, size, ink=(0, 0, 0), paper=(255, 255, 255)):
    """`text` over 85 % of a square picture, float `(3, size, size)` in [0, 1]."""
    image = Image.new("RGB", (size, size), paper)
    draw = ImageDraw.Draw(image)
    for points in range(size, 4, -1):
        font = ImageFont.load_default(points)
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        if max(right - left, bottom - top) <= 0.85 * size:
            break
    draw.text(((size - left - right) / 2, (size - top - bottom) / 2), text, font=font, fill=ink)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255


@functools.cache
def ocr(**kwargs):
    return make_reward("OCR", **kwargs)


def score(text, shown, **kwargs):
    return evaluate(ocr(**kwargs), picture(shown, 128)[None], [f'a sign that says "{text}"'])


@pytest.mark.parametrize("size", TEXTS)
def test_rendered_text_is_read_exactly(size):
    images = torch.stack(
        [picture(text, size) for text in TEXTS[size]] + [picture("STOP", size, (255, 255, 0), (40, 60, 120))]
    )
    texts = [*TEXTS[size], "STOP"]
    output = evaluate(ocr(), images, ["a sign"] * len(texts), [{"text": text} for text in texts])
    assert [read.replace(" ", "") for read in ocr().read] == [text.replace(" ", "") for text in texts]
    assert output.scores.tolist() == output.info["exact"].tolist() == [1.0] * len(texts)
    others = evaluate(ocr(), images, ["a sign"] * len(texts), [{"text": text} for text in (*texts[1:], texts[0])])
    assert (others.scores < 0.7).all() and not others.info["exact"].any()


@pytest.mark.parametrize(
    ("text", "shown", "keywords", "expected", "distance"),
    [
        ("CAR", "CAT", {}, 1 - 1 / 3, 1),
        ("CATS", "CAT", {}, 1 - 1 / 4, 1),
        ("cat", "CAT", {}, 1.0, 0),
        ("cat", "CAT", {"ignore_case": False}, 0.0, 3),
        ("HE LLO", "HELLO", {}, 1.0, 0),
        ("HE LLO", "HELLO", {"ignore_spaces": False}, 1 - 1 / 6, 1),
        ("HEL", "HELLO", {}, 1 - 2 / 5, 2),
        ("HEL", "HELLO", {"rule": "flow_grpo"}, 1.0, 2),
        ("HELP", "HELLO", {"rule": "flow_grpo"}, 1 - 2 / 4, 2),
        ("NO", "HELLO", {"rule": "flow_grpo"}, 0.0, 4),
    ],
)
def test_score_is_one_less_the_normalised_edit_distance(text, shown, keywords, expected, distance):
    output = score(text, shown, **keywords)
    assert output.info["distance"].item() == distance
    assert output.scores.item() == pytest.approx(expected, abs=1e-6)


def test_a_picture_without_text_scores_nothing_and_alone_as_in_a_batch():
    images = torch.stack([torch.full((3, 64, 64), 0.5), picture("CAT", 64), picture("DOG", 64)])
    together = evaluate(ocr(), images, ['"CAT"'] * 3).scores
    assert together[0] == 0 and together[1] == 1
    alone = [evaluate(ocr(), image[None], ['"CAT"']).scores.item() for image in images]
    assert together.tolist() == alone


def test_edit_distance_is_that_of_its_definition():
    @functools.cache
    def defined(first, second):
        if not first or not second:
            return len(first) + len(second)
        replaced = defined(first[1:], second[1:]) + (first[0] != second[0])
        return min(replaced, defined(first[1:], second) + 1, defined(first, second[1:]) + 1)

    rng = random.Random(0)
    for _ in range(200):
        first, second = ("".join(rng.choices("abc", k=rng.randrange(7))) for _ in range(2))
        assert edit_distance(first, second) == defined(first, second)


@pytest.mark.parametrize(
    ("prompt", "metadata", "text"),
    [
        ('a sign that says "Hello"', {}, "Hello"),
        ("a sign that says \u201cHello\u201d", {}, "Hello"),
        ('"one" above "two"', {}, "one two"),
        ('a sign "no"', {"text": "yes"}, "yes"),
    ],
)
def test_text_is_that_of_the_metadata_or_in_quotes(prompt, metadata, text):
    assert asked_text(prompt, metadata) == text


@pytest.mark.parametrize(("prompt", "told"), [("it's a cat's", {}), ("a cat", {"text": 3}), ('"b"', {"text": " "})])
def test_prompts_without_a_text_are_refused_before_anything_runs(prompt, told):
    lines = [{"prompt": '"a"'}, {"prompt": prompt, **told}]
    with pytest.raises(ValueError, match="reward='OCR=1' with prompts=.* asks for no text .* put it in double quotes"):
        gym.make_vec("DiffusionDenoise-v0", model="no/such/model", reward={"OCR": 1.0}, prompts=lines)
    with pytest.raises(RewardError, match="asks for no text"):
        evaluate(ocr(), torch.zeros(1, 3, 32, 32), [prompt], [told])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"rule": "exact"}, "rule='exact' must be one of"),
        ({"detector_side": 8}, "from 32"),
        ({"min_confidence": 2}, "0 to"),
    ],
)
def test_bad_keywords_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        make_reward("OCR", **keywords)


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setattr("diffusion_gym.rewards.ocr.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'diffusion-denoise-gym\[ocr\]'"):
        make_reward("OCR")


def test_the_prompt_set_is_what_the_script_writes(tmp_path):
    from tools.build_ocr_prompts import build

    build(tmp_path / "ocr.jsonl")
    assert (tmp_path / "ocr.jsonl").read_bytes() == PATH.read_bytes()
    prompts = make_prompts("ocr")
    for prompt in (*prompts.prompts, *prompts.held_out):
        assert prompts.metadata[prompt]["text"] == asked_text(prompt, {})
    trained = {prompts.metadata[prompt]["text"] for prompt in prompts.prompts}
    assert not trained & {prompts.metadata[prompt]["text"] for prompt in prompts.splits["new-texts"]}


def test_a_package_that_cannot_be_loaded_is_said_with_the_remedy(monkeypatch):
    empty = importlib.util.module_from_spec(importlib.util.find_spec("rapidocr_onnxruntime"))  # never run
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", empty)
    with pytest.raises(ValueError, match=r"reward='OCR'.*cannot be loaded.*libgl1"):
        make_reward("OCR", detector_side=77)  # other settings than those that are kept
