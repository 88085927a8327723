"""The Shapes rewards, on drawn pictures whose content is known."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from scipy import ndimage

from diffusion_gym.images import to_float
from diffusion_gym.rewards import RewardError, evaluate, make_reward
from diffusion_gym.rewards.shapes_detector import detect
from diffusion_gym.shapes.captions import COLORS, FAMILIES, NUMBERS, RELATIONS, SHAPES, Caption, all_captions
from diffusion_gym.shapes.scenes import SceneObject, draw, place, random_background

SCENES_A_FAMILY = 500


def is_true(caption: Caption, objects: list[SceneObject]) -> bool:
    """The meaning of a caption, spelled out: some assignment of all objects to all mentions fits."""
    mentions = [thing for thing in caption.things for _ in range(thing.number)]
    for order in itertools.permutations(objects):
        if len(order) != len(mentions):
            return False
        if all(o.shape == m.shape and m.color in (None, o.color) for o, m in zip(order, mentions, strict=True)):
            dx, dy = order[0].x - order[-1].x, order[0].y - order[-1].y
            vertical = abs(dy) > abs(dx)
            actual = ("above" if dy < 0 else "below") if vertical else ("left of" if dx < 0 else "right of")
            if caption.relation in (None, actual):
                return True
    return False


def false_captions(caption: Caption, objects: list[SceneObject]) -> list[Caption]:
    """All captions that differ from a true one in a single fact, or in which half is which, and are false."""
    changed = []
    for i, thing in enumerate(caption.things):
        new = [replace(thing, shape=shape) for shape in SHAPES] + [replace(thing, color=color) for color in COLORS]
        if len(caption.things) == 1:
            new += [replace(thing, number=number) for number in NUMBERS.values()]
        changed += [replace(caption, things=(*caption.things[:i], n, *caption.things[i + 1 :])) for n in new]
    if len(caption.things) == 2:
        a, b = caption.things
        swapped = replace(a, color=b.color), replace(b, color=a.color)
        changed += [replace(caption, things=swapped), replace(caption, things=(b, a))]
        if caption.relation:  # other scenes may lie on the diagonal, where centre and centroid can disagree
            changed += [replace(caption, relation=relation) for relation in RELATIONS]
    return [c for c in changed if not is_true(c, objects)]


@cache
def scenes(family: str) -> tuple[list[Caption], list[list[SceneObject]], np.ndarray]:
    """Captions, objects and pictures uint8 (500, 32, 32, 3) of one family."""
    rng = np.random.default_rng(FAMILIES.index(family))
    captions = [all_captions(family)[k] for k in rng.integers(len(all_captions(family)), size=SCENES_A_FAMILY)]
    objects = [place(caption, rng) for caption in captions]
    return captions, objects, np.stack([draw(items, random_background(rng)) for items in objects])


def softened(pictures: np.ndarray) -> np.ndarray:
    """Worse than the autoencoder's reconstructions: blur of 0.5 pixels and noise of 6 levels."""
    rng = np.random.default_rng(7)
    blurred = ndimage.gaussian_filter(pictures.astype(np.float64), (0, 0.5, 0.5, 0))
    return (blurred + rng.normal(0, 6, pictures.shape)).round().clip(0, 255).astype(np.uint8)


def blurred(pictures: np.ndarray) -> np.ndarray:
    """Much less sharp than the autoencoder's reconstructions: 29 dB from blur alone."""
    return ndimage.gaussian_filter(pictures, (0, 0.8, 0.8, 0))


def score(pictures: np.ndarray, captions: list, family: str = "color", **kwargs) -> torch.Tensor:
    """Scores by the family's reward, through the checks of `evaluate`."""
    images = to_float(torch.from_numpy(pictures))
    return evaluate(make_reward(family.capitalize(), **kwargs), images, [str(c) for c in captions]).scores


def picture(*objects: tuple[str, str, float, float]) -> np.ndarray:
    """A picture (1, 32, 32, 3) of (color, shape, x, y) of radius 5 on mid grey."""
    items = [SceneObject(shape, color, x, y, 5.0) for color, shape, x, y in objects]
    return draw(items, np.full((32, 32), 128.0))[None].copy()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change, rate", [(np.copy, 0.998), (softened, 0.99), (blurred, 0.99)])
def test_true_captions_succeed(family, change, rate):
    captions, _, pictures = scenes(family)
    assert score(change(pictures), captions, family, strict=True).mean() >= rate


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", [np.copy, softened])
def test_false_captions_fail(family, change):
    captions, objects, pictures = scenes(family)
    rng = np.random.default_rng(5)
    wrong = [rng.choice(false_captions(c, o)) for c, o in zip(captions, objects, strict=True)]
    assert score(change(pictures), wrong, family, strict=True).mean() <= 0.002
    assert score(change(pictures), wrong, family).max() < 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_single_falsehood_about_a_scene_fails(family):
    captions, objects, pictures = scenes(family)
    pairs = [(k, wrong) for k in range(12) for wrong in false_captions(captions[k], objects[k])]
    assert len(pairs) > 100
    assert score(pictures[[k for k, _ in pairs]], [wrong for _, wrong in pairs], strict=True).max() == 0


def test_detector_finds_what_was_drawn_where_it_was_drawn():
    captions, objects, pictures = scenes("count")
    exact = 0
    for truth, found in zip(objects, detect(pictures), strict=True):
        exact += Counter((o.shape, o.color) for o in truth) == Counter((o.shape, o.color) for o in found)
        for item in found:
            drawn = min(truth, key=lambda o: np.hypot(o.x - item.x, o.y - item.y))
            drop = 0.2 * drawn.radius if drawn.shape == "triangle" else 0.0
            assert np.hypot(drawn.x - item.x, drawn.y + drop - item.y) < 0.5
            assert item.radius == pytest.approx(drawn.radius, rel=0.1)
    assert exact >= 0.998 * len(captions)


# Red circle left, blue square right. The facts of each caption are counted by hand beside it.
RED_CIRCLE_BLUE_SQUARE = (("red", "circle", 8, 16), ("blue", "square", 24, 16))


@pytest.mark.parametrize(
    "prompt, held, asked",
    [
        ("a red circle and a blue square", 7, 7),
        ("a blue square and a red circle", 7, 7),
        ("a red square and a blue circle", 5, 7),  # the binding is swapped: neither colored shape is there
        ("a red circle and a green square", 5, 7),  # no green, no green square
        ("a red circle and a blue star", 5, 7),  # no star, no blue star
        ("a red circle", 3, 4),  # two objects, not one
        ("a green star", 0, 4),
        ("two circles", 2, 3),  # two objects, one circle
        ("two red circles", 4, 7),  # one red, one circle, one red circle
        ("four blue stars", 1, 13),  # one blue
        ("a red circle left of a blue square", 8, 8),
        ("a red circle above a blue square", 7, 8),
        ("a blue square left of a red circle", 7, 8),
        ("a circle left of a square", 4, 4),
        ("a square left of a circle", 3, 4),
        ("a circle and a circle", 2, 3),  # one circle cannot be both
        ("a circle and a red circle", 4, 5),
    ],
)
def test_graded_score_is_the_share_of_facts(prompt, held, asked):
    output = evaluate(
        make_reward("Composition"), to_float(torch.from_numpy(picture(*RED_CIRCLE_BLUE_SQUARE))), [prompt]
    )
    assert output.scores.item() == pytest.approx(held / asked)
    assert output.info["graded"].item() == pytest.approx(held / asked)
    assert output.info["success"].item() == (held == asked)


@pytest.mark.parametrize("family", FAMILIES)
def test_strict_and_graded_carry_the_same_components(family):
    pictures = np.concatenate([picture(*RED_CIRCLE_BLUE_SQUARE), picture(("red", "circle", 16, 16))])
    images, prompts = to_float(torch.from_numpy(pictures)), ["a red circle", "a red circle"]
    graded = evaluate(make_reward(family.capitalize()), images, prompts)
    strict = evaluate(make_reward(family.capitalize(), strict=True), images, prompts)
    assert graded.scores.tolist() == [0.75, 1.0]
    assert strict.scores.tolist() == [0.0, 1.0]
    for output in (graded, strict):
        assert output.info["graded"].tolist() == [0.75, 1.0]
        assert output.info["success"].tolist() == [0.0, 1.0]
        assert {value.dtype for value in output.info.values()} == {torch.float32}


def test_an_empty_picture_scores_zero_also_among_others():
    empty = np.full((1, 32, 32, 3), 128, np.uint8)
    assert score(empty, ["a red circle"]).tolist() == [0.0]
    both = np.concatenate([empty, picture(("red", "circle", 16, 16))])
    assert score(both, ["a red circle"] * 2).tolist() == [0.0, 1.0]


def test_a_malformed_blob_counts_as_an_object_without_shape():
    half = picture(("red", "circle", 8, 16), ("blue", "circle", 23, 16))
    half[:, 16:, 16:] = 128  # the lower half of the blue circle is gone
    kinds = [(item.shape, item.color) for item in sorted(detect(half)[0], key=lambda item: item.x)]
    assert kinds == [("circle", "red"), (None, "blue")]
    assert score(half, ["a red circle"], strict=True).tolist() == [0.0]


def test_a_two_colored_object_is_two_malformed_ones():
    red, blue = picture(("red", "square", 16, 16)), picture(("blue", "square", 16, 16))
    red[:, :, 16:] = blue[:, :, 16:]
    assert sorted((item.shape, item.color) for item in detect(red)[0]) == [(None, "blue"), (None, "red")]


@pytest.mark.parametrize("first, second", [("red", "red"), ("red", "blue"), ("green", "yellow"), ("blue", "purple")])
@pytest.mark.parametrize("shapes", [("circle", "circle"), ("square", "circle"), ("square", "square")])
def test_touching_objects_are_told_apart(first, second, shapes):
    reach = sum({"circle": 0.92 * 5, "square": 0.82 * 5}[shape] for shape in shapes)
    touching = picture((first, shapes[0], 10, 14), (second, shapes[1], 10 + reach, 17))
    found = sorted(detect(touching)[0], key=lambda item: item.x)
    assert [(item.shape, item.color) for item in found] == [(shapes[0], first), (shapes[1], second)]
    assert sum(item.radius for item in found) == pytest.approx(5 + 5, rel=0.025)  # no pixel counts twice


def test_a_bar_is_not_taken_for_two_squares():
    bar = np.full((1, 32, 32, 3), 128, np.uint8)
    bar[:, 11:20, 6:25] = (214, 39, 40)
    assert [item.shape for item in detect(bar)[0]] == [None]


def test_a_dot_too_small_for_a_shape_still_counts():
    dotted = picture(("red", "circle", 16, 16))
    dotted[:, 2:6, 2:6] = (31, 80, 220)
    assert sorted((item.color, item.shape) for item in detect(dotted)[0]) == [("blue", None), ("red", "circle")]


def test_a_heap_of_stripes_counts_as_one_object():
    striped = picture(("red", "circle", 8, 16))
    for k, color in enumerate([(31, 80, 220), (240, 215, 30), (44, 160, 44), (140, 50, 190)]):
        striped[:, 12 + 2 * k : 14 + 2 * k, 18:28] = color
    assert sorted(str(item.shape) for item in detect(striped)[0]) == ["None", "circle"]
    assert score(striped, ["a red circle"], strict=True).tolist() == [0.0]


def test_specks_are_no_objects():
    dotted = picture(("red", "circle", 16, 16))
    dotted[:, 2:4, 2:4] = (31, 80, 220)
    dotted[:, 29, 3:30] = (31, 80, 220)
    assert score(dotted, ["a red circle"], strict=True).tolist() == [1.0]


def test_an_object_between_two_colors_does_not_crumble():
    mixed = np.full((40, 32, 32, 3), 128.0)
    mixed[:, 10:20, 12:22] = 0.45 * np.array([31, 80, 220]) + 0.55 * np.array([140, 50, 190])  # blue and purple
    noise = np.random.default_rng(0).normal(0, 6, mixed.shape)
    found = detect((mixed + noise).round().clip(0, 255).astype(np.uint8))
    assert sum([item.shape for item in items] == ["square"] for items in found) >= 30
    assert {item.color for items in found for item in items} <= {"blue", "purple"}


def test_larger_pictures_are_read_at_the_scale_of_the_model():
    small = picture(*RED_CIRCLE_BLUE_SQUARE)
    large = small.repeat(4, axis=1).repeat(4, axis=2)
    assert detect(large) == detect(small)


def test_an_empty_batch_is_scored():
    assert score(np.zeros((0, 32, 32, 3), np.uint8), []).shape == (0,)


def test_a_prompt_outside_the_language_is_named():
    with pytest.raises(RewardError, match=r"'Color'.*prompt='a dog' is not a Shapes caption"):
        score(picture(("red", "circle", 16, 16)), ["a dog"])


@pytest.mark.parametrize("shape", [(1, 33, 33, 3), (1, 32, 64, 3), (1, 32, 32, 4), (32, 32, 3)])
def test_pictures_of_another_size_are_refused(shape):
    with pytest.raises(ValueError, match=r"pictures=uint8 \(.*multiple of 32"):
        detect(np.zeros(shape, np.uint8))


def test_float_pictures_are_refused():
    with pytest.raises(ValueError, match="pictures=float64"):
        detect(np.zeros((1, 32, 32, 3)))


def test_an_unknown_keyword_is_refused():
    with pytest.raises(TypeError, match="strickt"):
        make_reward("Count", strickt=True)
