"""The caption language of the Shapes model, and its prompt sets."""

import itertools

import pytest

from diffusion_gym.prompts import make_prompts
from diffusion_gym.prompts.shapes import is_held_out
from diffusion_gym.shapes.captions import (
    COLORS,
    FAMILIES,
    RELATIONS,
    SHAPES,
    Caption,
    Thing,
    all_captions,
    holds,
    parse,
)

PAIRS = ("composition", "location")


# --- captions ---


@pytest.mark.parametrize("family", FAMILIES)
def test_parse_is_the_inverse_of_str(family):
    for caption in all_captions(family):
        assert parse(str(caption)) == caption


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_are_distinct_and_know_their_family(family):
    captions = all_captions(family)
    assert len({str(caption) for caption in captions}) == len(captions)
    assert {caption.family for caption in captions} == {family}


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("a green square", Caption((Thing("square", "green"),))),
        ("three circles", Caption((Thing("circle", None, 3),))),
        ("two red stars", Caption((Thing("star", "red", 2),))),
        ("a red circle and a blue square", Caption((Thing("circle", "red"), Thing("square", "blue")))),
        ("a star above a triangle", Caption((Thing("star"), Thing("triangle")), "above")),
        ("a red star left of a cyan star", Caption((Thing("star", "red"), Thing("star", "cyan")), "left of")),
    ],
)
def test_examples_of_the_language(text, caption):
    assert parse(text) == caption and str(caption) == text
    assert parse(f"  {text.upper().replace(' ', '   ')} ") == caption


@pytest.mark.parametrize(
    "text",
    ["", "cat", "a pink square", "a green square.", "two square", "a squares", "one star", "five stars"]
    + ["two stars and a circle", "a red circle beside a star", "a star above", "a red circle and a star and a square"],
)
def test_other_sentences_are_refused_with_examples(text):
    with pytest.raises(ValueError, match="is not a Shapes caption; write it like") as caught:
        parse(text)
    assert f"prompt={text!r}" in str(caught.value) and "circle, square, triangle, star" in str(caught.value)


@pytest.mark.parametrize(("family", "number"), [("color", 24), ("count", 84), ("composition", 552), ("location", 2256)])
def test_families_have_all_their_captions(family, number):
    assert len(all_captions(family)) == number


def test_two_things_of_a_caption_can_be_told_apart():
    for family in PAIRS:
        for caption in all_captions(family):
            one, other = caption.things
            assert one != other and (one.shape != other.shape or (one.color and other.color))


def test_number_counts_all_objects():
    assert [parse(text).number for text in ("a star", "four stars", "a star and a circle")] == [1, 4, 2]


def test_unknown_family_is_refused():
    with pytest.raises(ValueError, match="family='colour' is unknown; choose one of color"):
        all_captions("colour")


def test_exactly_one_relation_holds_for_two_places():
    for dx, dy in itertools.product(range(-3, 4), repeat=2):
        held = [relation for relation in RELATIONS if holds(relation, dx, dy)]
        assert len(held) == int(abs(dx) != abs(dy)), (dx, dy, held)
    assert holds("above", 1, -5) and holds("below", 1, 5) and holds("left of", -5, 1) and holds("right of", 5, 1)


# --- the Shapes sets ---


@pytest.mark.parametrize("family", FAMILIES)
def test_training_and_held_out_captions_part_the_family(family):
    prompts = make_prompts(f"shapes-{family}")
    seen, unseen = set(prompts.prompts), set(prompts.held_out)
    assert not seen & unseen
    assert seen | unseen == {str(caption) for caption in all_captions(family)}
    assert 0.1 < len(unseen) / len(seen | unseen) < 0.3


@pytest.mark.parametrize("family", PAIRS)
def test_both_orders_of_a_pair_are_on_the_same_side(family):
    for caption in all_captions(family):
        assert is_held_out(caption) == is_held_out(Caption(caption.things[::-1], caption.relation)), str(caption)


def test_all_relations_of_a_pair_are_on_the_same_side():
    for caption in all_captions("composition"):
        sides = {is_held_out(Caption(caption.things, relation)) for relation in (None, *RELATIONS)}
        assert len(sides) == 1, str(caption)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_speaks_of_every_shape_and_color(family):
    words = set(" ".join(make_prompts(f"shapes-{family}").prompts).replace("s ", " ").split())
    assert {word.rstrip("s") for word in words} >= {*SHAPES, *COLORS}
