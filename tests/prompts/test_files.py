"""Prompt files in all their forms, and what is said of bad ones."""

import csv
import json
import re

import numpy as np
import pytest

from diffusion_gym.prompts import make_prompts

DRAWBENCH = [
    {"prompt": "A red colored car.", "category": "Colors"},
    {"prompt": "Two cats, one dog.", "category": "Counting"},
    {"prompt": "A pink colored car.", "category": "Colors"},
]


@pytest.fixture
def write(tmp_path):
    """`write(name, content)` gives the path as a string; content other than text is written as JSON."""

    def write(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return str(path)

    return write


def test_text_has_a_prompt_a_line(write):
    path = write("prompts.txt", "a cat\n\n  a naïve dog \n\na bird")
    prompts = make_prompts(path)
    assert prompts.prompts == ("a cat", "a naïve dog", "a bird")
    assert prompts.name == path and prompts.source == "prompts.txt"


def test_a_byte_order_mark_is_no_part_of_a_prompt(write):
    assert make_prompts(write("prompts.txt", "\ufeffa cat\n")).prompts == ("a cat",)
    assert make_prompts(write("prompts.csv", "\ufeffPrompts\na cat\n")).prompts == ("a cat",)


def as_csv(path, delimiter=","):
    with open(path, "w", newline="") as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerow(["Number", "Prompts", "Category"])
        rows.writerows([index, row["prompt"], row["category"]] for index, row in enumerate(DRAWBENCH))
    return str(path)


@pytest.fixture(params=["list", "prompts", "dpok", "jsonl", "csv", "tsv"])
def drawbench(request, write, tmp_path):
    """The same prompts in every form that has categories."""
    forms = {
        "list": lambda: write("bench.json", DRAWBENCH),
        "prompts": lambda: write("bench.json", {"prompts": DRAWBENCH}),
        "dpok": lambda: write("bench.json", {row["prompt"]: {"category": row["category"]} for row in DRAWBENCH}),
        "jsonl": lambda: write("bench.jsonl", "\n\n".join(map(json.dumps, DRAWBENCH)) + "\n"),
        "csv": lambda: as_csv(tmp_path / "bench.csv"),
        "tsv": lambda: as_csv(tmp_path / "bench.tsv", "\t"),
    }
    return forms[request.param]()


def test_every_form_gives_the_prompts_and_their_categories(drawbench):
    assert make_prompts(drawbench).prompts == tuple(row["prompt"] for row in DRAWBENCH)
    colors = make_prompts(f"{drawbench}#Colors")
    assert colors.prompts == ("A red colored car.", "A pink colored car.") and colors.name == f"{drawbench}#Colors"
    assert make_prompts(f"{drawbench}#counting").prompts == ("Two cats, one dog.",)
    with pytest.raises(ValueError, match="no category or held-out split 'Text'; choose one of Colors, Counting"):
        make_prompts(f"{drawbench}#Text")


def test_plain_lists_and_held_out_prompts(write):
    assert make_prompts(write("a.json", ["a cat", " a dog "])).prompts == ("a cat", "a dog")
    path = write("b.json", {"prompts": ["a cat"], "held_out": ["a dog", {"prompt": "a bird"}]})
    assert make_prompts(path).held_out == make_prompts(f"{path}#held-out").prompts == ("a dog", "a bird")
    path = write("c.json", {"prompts": ["a cat"], "held_out": {"near": ["a dog"], "far": ["a car"]}})
    assert make_prompts(path).splits == {"near": ("a dog",), "far": ("a car",)}
    assert make_prompts(f"{path}#far").prompts == ("a car",)
    assert make_prompts(f"{path}#held-out").prompts == ("a dog", "a car")


def test_a_template_file(write):
    content = {
        "template": "a(n) {animal} {activity}",
        "animal": ["cat", "ant"],
        "activity": ["sleeping", "eating"],
        "held_out": {"new-animals": {"animal": ["owl"]}},
    }
    path = write("mine.json", content)
    prompts = make_prompts(path)
    assert prompts.prompts == ("a cat sleeping", "a cat eating", "an ant sleeping", "an ant eating")
    assert make_prompts(f"{path}#new-animals").prompts == prompts.held_out == ("an owl sleeping", "an owl eating")


def test_a_file_with_a_hash_in_its_name_is_found(write):
    assert make_prompts(write("a#b.txt", "a cat")).prompts == ("a cat",)


def test_files_reach_the_environment(write, make_env):
    content = {"template": "{number} {shape:plural}", "number": ["two", "three"], "shape": ["star", "circle"]}
    env = make_env(num_envs=16, prompts=write("mine.json", {**content, "held_out": {"new": {"number": ["four"]}}}))
    _, info = env.reset(seed=0)
    assert set(np.asarray(info["prompt"])) == {"two stars", "two circles", "three stars", "three circles"}
    assert env.unwrapped.prompt_set.held_out == ("four stars", "four circles")


NOTHING = "is empty; give at least one prompt"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n \n", NOTHING),
        ("a.json", "", r"is not a JSON file \(Expecting value"),
        ("a.json", '["a cat",', "is not a JSON file"),
        ("a.json", [], NOTHING),
        ("a.json", {}, r"neither 'prompts' nor 'template', but \[\]; write a list of prompts"),
        ("a.json", 5, "the file holds 5, which is no list and no object; write"),
        ("a.json", {"prompt": ["a cat"]}, r"neither 'prompts' nor 'template', but \[\"prompt\"\]"),
        ("a.json", ["a cat", 5], "entry 2 is 5; write a string or an object with 'prompt'"),
        ("a.json", [{"text": "a cat"}], "entry 1 has the 'prompt' null; write a string that is not empty"),
        ("a.json", ["a cat", " "], "entry 2 has the 'prompt' \" \"; write a string"),
        ("a.json", [{"prompt": "a cat", "category": 3}], "entry 1 has the 'category' 3; write a string"),
        ("a.json", {"prompts": "a cat"}, "'prompts' is \"a cat\"; write a list that is not empty"),
        ("a.json", {"prompts": []}, r"'prompts' is \[\]; write a list that is not empty"),
        ("a.json", {"prompts": ["a"], "heldout": ["b"]}, "key 'heldout' is unknown .* known: prompts, held_out"),
        ("a.json", {"prompts": ["a"], "held_out": ["a"]}, "trains on the held-out prompt 'a'"),
        ("a.json", {"prompts": ["a"], "held_out": {"x": 3}}, "'held_out', split 'x', is 3; write a list"),
        ("a.json", {"template": "{a}", "b": ["c"]}, r"template='\{a\}' has no words for \{a\}; give a list named 'a'"),
        ("a.json", {"template": 3}, r"'template' is 3; write a string such as 'a\(n\) \{animal\}'"),
        ("a.json", {"template": "{a}", "a": "cat"}, "'a' is \"cat\"; write a list that is not empty"),
        ("a.json", {"template": "{a}", "a": ["cat", 1]}, "'a' holds 1; write strings that are not empty"),
        ("a.json", {"template": "{a}", "a": ["b"], "held_out": ["c"]}, "'held_out' is .* with a template, write"),
        ("a.json", {"template": "{a}", "a": ["b"], "held_out": {"x": {"a": "c"}}}, "'held_out', list 'a', is \"c\""),
        ("a.json", {"template": "{a}", "a": ["b"], "held_out": {"x": {"a": ["b"]}}}, "trains on the held-out prompt"),
        ("a.jsonl", '{"prompt": "a cat"}\n\n{"prompt": }\n', r"line 3 is not JSON \(.*\); write one object a line"),
        ("a.jsonl", '"a cat"\n5\n', "line 2 is 5; write a string or an object with 'prompt'"),
        ("a.csv", "Text,Category\na cat,Animals\n", r"columns \[\"Text\", \"Category\"\] but none named 'Prompts'"),
        ("a.csv", "Prompts,Category\n", NOTHING),
        (
            "a.csv",
            "Prompts\na cat\n\na dog, a bird\n",
            r"line 4 has more cells .* \(\"a bird\" is left over\); quote the",
        ),
        ("a.tsv", "Prompts\na cat, one\na dog\tx\n", "line 3 has more cells than the table has columns"),
        ("a.csv", "Prompts,Category\n,Animals\n", "row 1 has the 'prompt' \"\"; write a string"),
        ("a.yaml", "- a cat", "is a file of another kind; name it .txt, .json, .jsonl, .csv or .tsv"),
    ],
)
def test_bad_files_are_refused_by_name(write, name, content, message):
    path = write(name, content)
    with pytest.raises(ValueError, match=message) as caught:
        make_prompts(path)
    assert f"prompts={path!r}" in str(caught.value)


def test_bytes_that_are_no_text_are_refused_by_name(tmp_path):
    for name in ("a.txt", "a.json", "a.jsonl", "a.csv"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00cat")
        with pytest.raises(ValueError, match=name):
            make_prompts(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("missing.txt", "one prompt a line"),
        ("missing.json#Colors", "a list of prompts"),
        ("missing.jsonl", 'one {"prompt": "..."} a line'),
        ("some/folder/missing.csv", "a table with a column named 'Prompts'"),
        ("missing.TSV", "a table with a column named 'Prompts'"),
    ],
)
def test_a_missing_file_is_named_with_its_form(name, form):
    message = f"prompts={name!r} is no file; mend the path, or write {form}; see docs/prompts.md"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        make_prompts(name)


def test_a_directory_is_called_one(tmp_path):
    with pytest.raises(ValueError, match="is a directory; name a prompt file in it"):
        make_prompts(str(tmp_path))
    (tmp_path / "a.json").mkdir()
    with pytest.raises(FileNotFoundError, match="is a directory; name a prompt file in it"):
        make_prompts(str(tmp_path / "a.json"))


def test_a_part_after_a_slash_is_shown_after_a_hash(write):
    path = write("held.json", {"prompts": ["a cat"], "held_out": ["a dog"]})
    with pytest.raises(ValueError, match=f"a part of a file stands after a #; write '{path}#held-out'"):
        make_prompts(f"{path}/held-out")


def test_quoted_commas_and_empty_cells_at_the_end_are_kept(write):
    assert make_prompts(write("a.csv", 'Prompts\n"a cat, a dog"\na bird,\n')).prompts == ("a cat, a dog", "a bird")


def test_a_part_of_a_file_without_parts_is_refused(write):
    with pytest.raises(ValueError, match="no category or held-out split 'x'; the file has neither; leave the part"):
        make_prompts(write("a.txt", "a cat") + "#x")
