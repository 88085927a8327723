"""Prompt files, text and JSON lines, and what is said of bad ones."""

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
    """`write(name, content)` gives the path as a string; a list's entries are written as lines of JSON."""

    def write(name, content):
        path = tmp_path / name
        text = content if isinstance(content, str) else "\n".join(map(json.dumps, content))
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_a_text_file_has_a_prompt_a_line(write):
    path = write("prompts.txt", "\ufeffa cat\n\n  a naïve dog  \r\na\u2028bird")
    prompts = make_prompts(path)
    assert prompts.prompts == ("a cat", "a naïve dog", "a\u2028bird") and prompts.metadata == {}
    assert prompts.name == path and prompts.source == "prompts.txt"


def test_the_other_keys_of_a_line_are_its_metadata(write):
    prompts = make_prompts(write("bench.JSONL", DRAWBENCH))
    assert prompts.prompts == tuple(row["prompt"] for row in DRAWBENCH)
    told = prompts.metadata_of(["Two cats, one dog.", "A red colored car.", "a stranger"])
    assert told == [{"category": "Counting"}, {"category": "Colors"}, {}]


def test_a_byte_order_mark_empty_lines_and_a_line_separator_in_a_string_are_read(write):
    prompts = make_prompts(
        write("a.jsonl", '\ufeff{"prompt": "a cat"}\n\n{"prompt": " a\u2028dog ", "n": [1, null]}\n')
    )
    assert prompts.prompts == ("a cat", "a\u2028dog") and prompts.metadata == {"a\u2028dog": {"n": [1, None]}}


def test_a_prompt_that_stands_twice_is_drawn_twice_as_often(write):
    prompts = make_prompts(write("a.jsonl", [{"prompt": "a", "n": 1}, {"prompt": "b"}, {"prompt": "a", "n": 1}]))
    assert prompts.prompts == ("a", "b", "a") and prompts.metadata == {"a": {"n": 1}}


def test_held_out_prompts_and_their_splits_with_their_metadata(write):
    lines = [
        {"prompt": "a cat", "legs": 4},
        {"prompt": "a bird", "legs": 2, "held_out": "near"},
        {"prompt": "a car", "held_out": "far"},
    ]
    path = write("mine.jsonl", lines)
    prompts = make_prompts(path)
    assert prompts.prompts == ("a cat",) and prompts.splits == {"near": ("a bird",), "far": ("a car",)}
    near, held_out = make_prompts(f"{path}/near"), make_prompts(f"{path}/held-out")
    assert near.name == f"{path}/near" and near.prompts == ("a bird",) and near.metadata == {"a bird": {"legs": 2}}
    assert held_out.prompts == prompts.held_out == ("a bird", "a car")
    with pytest.raises(ValueError, match="has no split 'middle'; choose one of held-out, near, far"):
        make_prompts(f"{path}/middle")
    with pytest.raises(ValueError, match="has no held-out prompts"):
        make_prompts(write("a.txt", "a cat") + "/held-out")


def test_a_list_takes_the_objects_of_a_file():
    prompts = make_prompts(["a cat", DRAWBENCH[0]])
    assert prompts.prompts == ("a cat", "A red colored car.")
    assert prompts.metadata == {"A red colored car.": {"category": "Colors"}}
    with pytest.raises(ValueError, match=r"prompts\[1\]: the field 'prompt' is missing; write \{"):
        make_prompts(["a cat", {"text": "a dog"}])


def test_a_file_with_a_hash_in_its_name_is_found(write):
    assert make_prompts(write("a#b.txt", "a cat")).prompts == ("a cat",)


def test_a_draw_from_many_prompts_looks_at_one(write):
    class Watched(tuple):
        def __iter__(self):
            raise AssertionError("a draw goes through all prompts")

    prompts = make_prompts(write("big.jsonl", [{"prompt": str(number), "n": number} for number in range(3000)]))
    object.__setattr__(prompts, "prompts", Watched(prompts.prompts))
    drawn = [prompts.draw(np.random.default_rng(seed)) for seed in range(100)]
    assert len(set(drawn)) > 90 and prompts.metadata_of(drawn) == [{"n": int(prompt)} for prompt in drawn]


# --- what is refused -------------------------------------------------------------------------------------------------

NOTHING = "is empty; give at least one prompt"
A_LINE = r'; write one {"prompt": "..."} a line'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n \n", NOTHING),
        ("a.jsonl", "", NOTHING),
        ("a.jsonl", '{"prompt": "a bird", "held_out": "x"}', NOTHING),
        ("a.jsonl", '{"prompt": "a cat"}\n\n{"prompt": }\n', ", line 3 is not JSON (Expecting value"),
        ("a.jsonl", '{"prompt": "a cat"}\n"a dog"\n', ", line 2: 'a dog': input should be "),
        ("a.jsonl", "[1]", ", line 1: [1]: input should be "),
        ("a.jsonl", '{"text": "a cat"}', f", line 1: the field 'prompt' is missing{A_LINE}"),
        ("a.jsonl", '{"prompt": 5}', f", line 1: prompt=5: input should be a valid string{A_LINE}"),
        ("a.jsonl", '{"prompt": null}', ", line 1: prompt=None: input should be a valid string"),
        ("a.jsonl", '{"prompt": ["a"]}', ", line 1: prompt=['a']: input should be a valid string"),
        ("a.jsonl", '{"prompt": " "}', ", line 1: prompt=' ': string should have at least 1 character"),
        ("a.jsonl", '{"prompt": "\\ud800"}', ", line 1 is not JSON (a text of it has \\ud800, half"),
        ("a.jsonl", '{"prompt": "a", "held_out": true}', ", line 1: held_out=True: input should be a valid string"),
        ("a.jsonl", '{"prompt": "a", "held_out": "x/y"}', ", line 1: held_out='x/y': string should match pattern"),
        ("a.jsonl", '{"prompt": "a", "held_out": ""}', ", line 1: held_out='': string should match pattern"),
        ("a.jsonl", '{"prompt": "a", "n": NaN}', ", line 1: n.float=nan: input should be a finite number"),
        ("a.jsonl", '{"prompt": "a", "n": 1}\n{"prompt": "a"}', ", line 2: prompt='a' stands there before with other"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "a", "held_out": "x"}', "trains on the held-out prompt 'a'"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b", "held_out": "held-out"}', "rename the split"),
        ("a.yaml", "- a cat", "is a file of another kind; name it .txt or .jsonl"),
    ],
)
def test_bad_files_are_refused_by_name_line_and_value(write, name, content, message):
    path = write(name, content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        make_prompts(path)
    assert f"prompts={path!r}" in str(caught.value)


def test_bytes_that_are_no_text_are_refused_by_name(tmp_path):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00cat")
        with pytest.raises(ValueError, match=f"{name}' is not UTF-8 from byte 0 on; save it as UTF-8"):
            make_prompts(str(tmp_path / name))


def test_json_nested_too_deep_is_refused(write):
    with pytest.raises(ValueError, match="line 1 is not JSON .*nested more than 100 levels deep"):
        make_prompts(write("a.jsonl", "[" * 100_000))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("missing.txt", "one prompt a line"),
        ("some/folder/missing.JSONL", 'one {"prompt": "..."} a line'),
        ("missing.jsonl/held-out", 'one {"prompt": "..."} a line'),
    ],
)
def test_a_missing_file_is_named_with_its_form(name, form):
    message = f"prompts={name.removesuffix('/held-out')!r} is no file; mend the path, or write {form}; see docs/prompts"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        make_prompts(name)


def test_a_directory_is_called_one(tmp_path):
    with pytest.raises(ValueError, match="is a directory; name a prompt file in it"):
        make_prompts(str(tmp_path))
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(FileNotFoundError, match="is a directory; name a prompt file in it"):
        make_prompts(str(tmp_path / "a.jsonl"))


def test_a_part_after_a_hash_is_shown_after_a_slash(write):
    path = write("held.jsonl", [{"prompt": "a cat"}])
    with pytest.raises(ValueError, match=f"a held-out split stands after a /; write '{path}/near'"):
        make_prompts(f"{path}#near")


# --- files of kinds that are not read --------------------------------------------------------------------------------


def as_table(path, delimiter):
    with open(path, "w", newline="") as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerows([["Prompts", "Category"], *([row["prompt"], row["category"]] for row in DRAWBENCH)])


@pytest.mark.parametrize("name", ["bench.json", "bench.csv", "bench.tsv", "bench.csv#Colors"])
def test_the_line_that_the_error_shows_writes_the_file(tmp_path, name):
    path = tmp_path / name.partition("#")[0]
    if path.suffix == ".json":
        path.write_text(json.dumps([*DRAWBENCH, "a cat"]))
    else:
        as_table(path, "\t" if path.suffix == ".tsv" else ",")
    with pytest.raises(ValueError, match="is of a kind that is not read; write a .jsonl file") as caught:
        make_prompts(str(tmp_path / name))
    exec(re.search(r"^ +(import csv.*)$", str(caught.value), re.MULTILINE)[1], {})
    written = make_prompts(str(path.with_suffix(".jsonl")))
    assert written.prompts[:3] == tuple(row["prompt"] for row in DRAWBENCH)
    found = [{key.lower(): value for key, value in told.items()} for told in written.metadata_of(written.prompts[:3])]
    assert found == [{"category": row["category"]} for row in DRAWBENCH]


def test_the_line_refuses_a_json_object(tmp_path):
    (tmp_path / "bench.json").write_text('{"template": "a {b}"}')
    with pytest.raises(ValueError, match="not read") as caught:
        make_prompts(str(tmp_path / "bench.json"))
    with pytest.raises((TypeError, KeyError)):
        exec(re.search(r"^ +(import csv.*)$", str(caught.value), re.MULTILINE)[1], {})
