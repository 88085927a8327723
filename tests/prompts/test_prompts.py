"""Prompt sets: what they hold, how they are named, drawn and held out."""

from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare

from diffusion_gym.agents.training.env_options import EnvOptions
from diffusion_gym.prompts import PROMPTS, PromptSet, make_prompts, names_prompt_set, prompts_of_words


def draws(prompts, seed, number=40):
    rng = np.random.default_rng(seed)
    return [prompts.draw(rng) for _ in range(number)]


# --- every registered set ---


@pytest.mark.parametrize("name", PROMPTS)
def test_registered_set_is_called_by_its_name_and_has_no_repeats(name):
    prompts = make_prompts(name)
    assert prompts.name == name and prompts.prompts
    for part in (prompts.prompts, prompts.held_out, *prompts.splits.values()):
        assert len(set(part)) == len(part)
        assert all(prompt == " ".join(prompt.split()) for prompt in part)


@pytest.mark.parametrize("name", PROMPTS)
def test_held_out_prompts_are_the_splits_and_are_not_trained_on(name):
    prompts = make_prompts(name)
    assert not set(prompts.prompts) & set(prompts.held_out)
    if prompts.splits:
        assert set(prompts.held_out) == {prompt for part in prompts.splits.values() for prompt in part}
    for split, part in prompts.splits.items():
        chosen = make_prompts(f"{name}/{split}")
        assert chosen.name == f"{name}/{split}" and chosen.prompts == part and chosen.held_out == ()


@pytest.mark.parametrize("name", PROMPTS)
def test_draw_depends_on_its_generator_alone(name):
    prompts = make_prompts(name)
    np.random.seed(0)
    first = draws(prompts, 0)
    np.random.seed(1)
    assert draws(prompts, 0) == first and set(first) <= set(prompts.prompts)
    if len(prompts.prompts) > 1:
        assert draws(prompts, 1) != first


@pytest.mark.parametrize("name", PROMPTS)
def test_draw_is_uniform(name):
    prompts = make_prompts(name)
    found = Counter(draws(prompts, 0, 40 * len(prompts.prompts)))
    counts = [found[prompt] for prompt in prompts.prompts]
    assert sum(counts) == 40 * len(prompts.prompts)
    if len(counts) > 1:
        assert chisquare(counts).pvalue > 1e-3


def test_an_uneven_draw_would_be_seen():
    """The test of uniformity fails where one of 45 prompts comes twice as often."""
    uneven = PromptSet("uneven", (*make_prompts("common-animals").prompts, "cat"))
    found = Counter(draws(uneven, 0, 40 * 45))
    assert chisquare(list(found.values())).pvalue < 1e-3


@pytest.mark.parametrize(
    ("name", "number", "held_out"),
    [
        ("common-animals", 45, {"new-animals": 38, "new-objects": 50}),
        ("imagenet-animals", 398, {}),
        ("animal-activities", 45 * 3, {"new-animals": 39 * 3, "new-activities": 45 * 3, "new-both": 39 * 3}),
        ("counting", 22 * 7, {"new-animals": 23 * 7, "new-numbers": 22 * 2}),
        ("dpok", 4, {"new-animals": 8, "new-colors": 2, "new-order": 1, "new-numbers": 2, "new-places": 2}),
        ("dpok-green-rabbit", 1, {"new-animals": 2, "new-colors": 2}),
        ("dpok-cat-and-dog", 1, {"new-animals": 2, "new-order": 1}),
        ("dpok-four-wolves", 1, {"new-animals": 2, "new-numbers": 2}),
        ("dpok-dog-on-the-moon", 1, {"new-animals": 2, "new-places": 2}),
        ("dpok-color", 6 * 8, {"new-animals": 6 * 4, "new-colors": 2 * 8}),
        ("dpok-count", 4 * 8, {"new-animals": 4 * 4, "new-numbers": 2 * 8}),
        ("dpok-composition", 8 * 7, {"new-animals": 8 * 4, "new-pairs": 4 * 3}),
        ("dpok-location", 8 * 4, {"new-animals": 4 * 4, "new-places": 8 * 2}),
    ],
)
def test_sizes(name, number, held_out):
    prompts = make_prompts(name)
    assert len(prompts.prompts) == number and prompts.source
    assert {split: len(part) for split, part in prompts.splits.items()} == held_out


# --- the papers' sets ---

# Appendix F.7, read down the columns: an order that the code does not have.
F7 = """cat deer lizard mouse pig dog cow beetle rat turkey horse goat ant snake fly monkey lion butterfly turtle llama
rabbit tiger fish frog camel zebra bear shark chicken bat spider raccoon whale duck gorilla bird fox dolphin goose
hedgehog sheep wolf squirrel bee kangaroo""".split()


def test_common_animals_are_those_of_the_paper():
    assert len(F7) == 45 and sorted(make_prompts("common-animals").prompts) == sorted(F7)


def test_imagenet_animals_are_the_first_classes():
    names = make_prompts("imagenet-animals").prompts
    known = {0: "tench", 2: "great white shark", 151: "Chihuahua", 268: "Mexican hairless", 285: "Egyptian cat"}
    known |= {207: "golden retriever", 340: "zebra", 388: "giant panda", 397: "puffer"}
    assert {index: names[index] for index in known} == known
    assert not {"abacus", ""} & set(names) and not any("," in name for name in names)


def test_animal_activities_say_the_prompts_that_the_paper_shows():
    prompts = make_prompts("animal-activities")
    assert {"a dolphin riding a bike", "an ant playing chess", "a bear washing dishes"} <= set(prompts.prompts)
    assert {"a capybara washing dishes", "a crab playing chess"} <= set(prompts.splits["new-animals"])
    assert "a horse typing on a keyboard" in prompts.splits["new-activities"]
    assert "a parrot driving a car" in prompts.splits["new-both"]
    assert {prompt for prompt in prompts.prompts if prompt.startswith("an ")} == {
        f"an ant {activity}" for activity in ("riding a bike", "playing chess", "washing dishes")
    }


def test_counting_has_two_to_eight():
    prompts = make_prompts("counting")
    first = Counter(prompt.split()[0] for prompt in prompts.prompts)
    assert first == dict.fromkeys("two three four five six seven eight".split(), 22)
    assert {"eight turtles", "two wolves", "three sheep", "four fish", "five foxes"} <= set(prompts.prompts)
    assert {"two mice", "three geese", "four deer", "six butterflies", "eight flies"} <= set(prompts.held_out)
    assert {"nine cats", "ten wolves"} < set(prompts.splits["new-numbers"])
    whole = {prompt.split()[1] for prompt in (*prompts.prompts, *prompts.splits["new-animals"])}
    assert len(whole) == 45


def test_dpok_says_the_four_prompts_of_figure_2():
    four = ("A green colored rabbit.", "A cat and a dog.", "Four wolves in the park.", "A dog on the moon.")
    names = ("green-rabbit", "cat-and-dog", "four-wolves", "dog-on-the-moon")
    assert make_prompts("dpok").prompts == four
    assert [make_prompts(f"dpok-{name}").prompts for name in names] == [(prompt,) for prompt in four]
    for family, prompt in zip(("color", "composition", "count", "location"), four, strict=True):
        assert make_prompts(f"dpok-{family}").prompts.count(prompt) == 1


def test_dpok_categories_are_grammatical():
    color = make_prompts("dpok-color").prompts
    assert {"An orange colored dog.", "A pink colored wolf."} <= set(color)
    held_out = make_prompts("dpok-composition").held_out
    assert {"A cat and an elephant.", "An elephant and a fox."} <= set(held_out)
    assert {"Two mice in the park.", "Seven sheep in the park."} <= set(make_prompts("dpok-count").held_out)
    assert "An elephant on the moon." in make_prompts("dpok-location/new-animals").prompts


# --- names, lists and sets ---


def test_held_out_prompts_go_by_their_name():
    prompts = make_prompts("animal-activities/held-out")
    whole = make_prompts("animal-activities")
    assert prompts.name == "animal-activities/held-out"
    assert prompts.prompts == whole.held_out == whole.held_out_set().prompts and prompts.held_out == ()
    assert make_prompts("shapes-color/held-out").prompts == make_prompts("shapes-color").held_out


def test_list_and_set_are_taken():
    assert make_prompts(["a cat", "a dog"]).prompts == ("a cat", "a dog")
    mine = PromptSet("mine", ("a cat",))
    assert make_prompts(mine) is mine


def test_splits_that_overlap_are_joined_once():
    mine = PromptSet("mine", ("a",), splits={"one": ("b", "c"), "two": ("c", "d")})
    assert mine.held_out == ("b", "c", "d") and mine.split("two").prompts == ("c", "d")
    assert mine == PromptSet("mine", ("a",), ("b", "c", "d"), {"one": ("b", "c"), "two": ("c", "d")})
    assert hash(mine) == hash(PromptSet("mine", ("a",), ("b", "c", "d"), {"one": ("b", "c"), "two": ("c", "d")}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"splits": {"one": ()}, "held_out": ()}, "the split 'one' is empty; leave it out"),
        ({"splits": {"one": ("b",)}, "held_out": ("c",)}, "splits must hold just the held-out prompts"),
        ({"splits": {"held-out": ("b",)}}, "'held-out' means all held-out prompts; rename the split"),
        ({"held_out": ("b", "a")}, "trains on the held-out prompt 'a'; take it out of one of the two"),
        ({"held_out": (3,)}, "holds 3, which is no string"),
        ({"metadata": {"b": {"n": 1}}}, "has metadata of 'b', which is none of its prompts"),
        ({"metadata": {"a": 5}}, "the metadata 5 of 'a' must be a mapping"),
        ({"metadata": {"a": {5: "n"}}}, "the metadata {5: 'n'} of 'a' must be a mapping"),
    ],
)
def test_a_bad_set_is_refused(arguments, message):
    with pytest.raises(ValueError, match=f"prompts='mine'.*{message}"):
        PromptSet("mine", ("a",), **arguments)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("comon-animals", "prompts='comon-animals' is unknown; did you mean 'common-animals'"),
        ("shapes-colour/held-out", "prompts='shapes-colour' is unknown; did you mean 'shapes-color'"),
        ("shapes-color/test", "prompts='shapes-color' has no split 'test'; choose one of held-out"),
        ("shapes-color#held-out", "a part of a set stands after a /; write 'shapes-color/held-out'"),
        ("shapes-colour#held-out", "prompts='shapes-colour' is unknown; did you mean 'shapes-color'"),
        (["dpok-color"], "is a list with a set's name; write prompts='dpok-color'"),
        (["shapes-color/held-out"], "write prompts='shapes-color/held-out'"),
        ("common-animals/x", "no split 'x'; choose one of held-out, new-animals, new-objects"),
        ("imagenet-animals/held-out", "prompts='imagenet-animals' has no held-out prompts"),
        ([], "is empty; give at least one prompt"),
        (["a cat", 5], r"prompts\[1\]=5 is no string; write a string, or \{"),
        (5, "prompts=5 must be a name, a prompt file, a list of strings or a PromptSet"),
    ],
)
def test_bad_prompts_are_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        make_prompts(prompts)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("common-animals", True),
        ("common-animals/new-animals", True),
        ("mine.txt", True),
        ("folder/mine.JSONL", True),
        ("folder/mine.JSON#Colors", True),
        ("mine.csv", True),
        ("counting#new-animals", True),
        ("held.jsonl/held-out", True),
        ("a cat", False),
        ("a very long prompt. " * 300, False),
        ("a cat/a dog", False),
        ("A dog on the moon.", False),
    ],
)
def test_names_are_told_from_prompts(text, named):
    assert names_prompt_set(text) == named


@pytest.mark.parametrize(
    ("words", "meaning"),
    [
        (["counting"], "counting"),
        (["counting/new-animals"], "counting/new-animals"),
        (["mine.jsonl/near"], "mine.jsonl/near"),
        (["a cat"], ["a cat"]),
        (["cat"], ["cat"]),
        (["mountain"], ["mountain"]),  # difflib: 0.75 of "counting"
        (["a common animal"], ["a common animal"]),
        (["cat", "comon-animals dog"], ["cat", "comon-animals dog"]),
    ],
)
def test_words_are_a_name_or_prompts(words, meaning):
    assert prompts_of_words(tuple(words)) == meaning


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["animal-activites"],
            "prompts='animal-activites' is no prompt set; did you mean 'animal-activities'.* .txt file",
        ),
        (["comon-animals/new-animals"], "did you mean 'common-animals'"),
        (["Countng"], "did you mean 'counting'"),
        (
            ["common-animals", "counting"],
            "has the set or file 'common-animals' among 2 words; give one set .* by itself",
        ),
        (["a cat", "mine.txt"], "prompts='a cat mine.txt' has the set or file 'mine.txt' among 2 words"),
    ],
)
def test_words_that_only_look_like_prompts_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        prompts_of_words(words)


def test_a_list_of_one_caption_is_a_set_though_a_set_is_called_so():
    assert make_prompts(["portraits"]).prompts == ("portraits",)
    assert make_prompts(["a well-known cat"]).prompts == ("a well-known cat",)


def test_a_path_that_is_no_prompt_file_is_refused_and_no_prompt(tmp_path):
    with pytest.raises(ValueError, match="is a directory"):
        make_prompts(prompts_of_words([str(tmp_path)]))
    (tmp_path / "a.yaml").write_text("- a cat")
    with pytest.raises(ValueError, match="is a file of another kind"):
        make_prompts(prompts_of_words([str(tmp_path / "a.yaml")]))


def test_the_prompts_of_the_command_line_are_read_so():
    assert EnvOptions(prompts=("counting",)).keywords()["prompts"] == "counting"
    assert EnvOptions(prompts=("a cat", "a dog")).keywords()["prompts"] == ["a cat", "a dog"]
    with pytest.raises(ValueError, match="did you mean 'animal-activities'"):
        EnvOptions(prompts=("animal-activites",)).keywords()
