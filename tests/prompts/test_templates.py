"""Templates: sentences with gaps."""

import pytest

from diffusion_gym.prompts.templates import fill, template_set

WORDS = {"animal": ("ant", "wolf"), "place": ("moon", "sea")}


def test_the_last_gap_changes_fastest():
    assert fill("a {animal} on the {place}", WORDS) == (
        "a ant on the moon",
        "a ant on the sea",
        "a wolf on the moon",
        "a wolf on the sea",
    )


def test_articles_plurals_and_braces():
    words = {"animal": ("ant", "mouse")}
    assert fill("A(n) {animal} and a(n) old {animal}", words) == ("An ant and an old ant", "A mouse and an old mouse")
    assert fill("{animal:plural} {{sic}}", words) == ("ants {sic}", "mice {sic}")
    assert fill("a(n) {color} {animal}", {**words, "color": ["orange"]}) == ("an orange ant", "an orange mouse")


def test_words_are_not_templates():
    assert fill("{animal}!", {"animal": ["{place} a(n)"]}) == ("{place} a(n)!",)


def test_splits_change_some_of_the_lists():
    made = template_set(
        "mine",
        "a(n) {animal} on the {place}",
        WORDS,
        {"new-animals": {"animal": ["owl"]}, "new-both": {"animal": ["owl"], "place": ["roof"]}},
    )
    assert made.splits["new-animals"] == ("an owl on the moon", "an owl on the sea")
    assert made.splits["new-both"] == ("an owl on the roof",) and len(made.prompts) == 4
    assert made.held_out == (*made.splits["new-animals"], "an owl on the roof")


@pytest.mark.parametrize(
    ("template", "words", "message"),
    [
        ("a {animal} {activity}", {"animal": ["cat"]}, r"no words for \{activity\}; give a list named 'activity'"),
        ("a {animal}", {"animal": []}, r"no words for \{animal\}"),
        ("a {animal}", WORDS, r"no gap for the list 'place'; write \{place\} or drop the list"),
        ("a {animal", WORDS, r"cannot be read \(.*\); write a gap as \{animal\}"),
        ("a {animal:>9}", WORDS, r"a gap 'animal' that cannot be read; write \{animal\} or \{animal:plural\}"),
        ("a {animal.__class__}", WORDS, "a gap 'animal.__class__' that cannot be read"),
        ("a {animal!r}", WORDS, "a gap 'animal' that cannot be read"),
        ("a {}", WORDS, "a gap '' that cannot be read"),
        ("a cat", {}, "has no gap; write one as"),
    ],
)
def test_bad_templates_are_refused(template, words, message):
    with pytest.raises(ValueError, match=f"template=.*{message}"):
        fill(template, words)


def test_a_split_that_changes_nothing_is_refused():
    with pytest.raises(ValueError, match="trains on the held-out prompt 'ant'"):
        template_set("mine", "{animal}", {"animal": ["ant"]}, {"new": {}})
    with pytest.raises(ValueError, match="no gap for the list 'color'"):
        template_set("mine", "{animal}", {"animal": ["ant"]}, {"new": {"color": ["red"]}})
