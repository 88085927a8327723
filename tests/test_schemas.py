from typing import Annotated, Any

import pytest
from pydantic import Field

from diffusion_gym.schemas import Schema, checked, parse_checked, read_checked


class _Inner(Schema):
    count: Annotated[int, Field(ge=1)]


class _Row(Schema):
    name: str
    rows: list[_Inner] = []
    score: float | None = None


def test_reads_what_is_declared(tmp_path):
    row = {"name": "a", "rows": [{"count": 2}], "score": 1}
    (tmp_path / "row.json").write_text('{"name": "a", "rows": [{"count": 2}], "score": 1}')
    wanted = _Row(name="a", rows=[_Inner(count=2)], score=1.0)
    assert checked(_Row, row, "here", "") == read_checked(_Row, tmp_path / "row.json", "") == wanted
    assert parse_checked(list[int], "[1, 2]", "here", "") == [1, 2]


@pytest.mark.parametrize(
    "value, words",
    [
        ({}, "the field 'name' is missing"),
        ([], "[]: input should be an object"),
        (7, "7: "),
        ({"name": 3}, "name=3: "),
        ({"name": "a", "nane": 1}, "the field 'nane' is not known here; did you mean 'name'?"),
        (
            {"name": "a", "rows": [{"count": 1, "coumt": 1}]},
            "the field 'rows.0.coumt' is not known here; did you mean 'count'",
        ),
        ({"name": "a", "rows": {}}, "rows={}: input should be a list"),
        ({"name": "a", "rows": [{"count": 0}]}, "rows.0.count=0: "),
        ({"name": "a", "rows": [{"count": "2"}]}, "rows.0.count='2': "),
        ({"name": "a", "rows": [{"count": True}]}, "rows.0.count=True: "),
        ({"name": "a", "score": float("nan")}, "score=nan: "),
        ({"name": 3, "score": []}, "(and 1 more)"),
        ({"name": ["x" * 1000]}, "..."),
    ],
)
def test_names_place_field_value_and_remedy(value, words):
    with pytest.raises(ValueError, match=r"^runs/a: .*; begin anew$") as caught:
        checked(_Row, value, "runs/a", "begin anew")
    assert words in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("text", ["", "{", "[1,", '{"name": "a"}}', "[" * 5000 + "]" * 5000])
def test_what_is_not_json(text, tmp_path):
    with pytest.raises(ValueError, match="here is not JSON .*; send JSON"):
        parse_checked(_Row, text, "here", "send JSON")
    (tmp_path / "row.json").write_text(text)
    with pytest.raises(ValueError, match="row.json is not a JSON file"):
        read_checked(_Row, tmp_path / "row.json", "")


@pytest.mark.parametrize("text", [r'"\ud800"', r'["\uDFFF"]', r'{"a": [{"\ud83d": 1}]}', r'{"a": "b\udc00\ud800"}'])
def test_half_a_character_is_refused_wherever_it_stands(text, tmp_path):
    with pytest.raises(ValueError, match=r"here is not JSON \(a text of it has \\ud\w{3}, half of a.*; send JSON"):
        parse_checked(Any, text, "here", "send JSON")
    (tmp_path / "row.json").write_text(text)
    with pytest.raises(ValueError, match="row.json is not a JSON file.*half of a character"):
        read_checked(Any, tmp_path / "row.json", "")


def test_whole_characters_are_read():
    assert parse_checked(list[str], r'["\ud83d\ude00", "é", ""]', "here", "") == ["\U0001f600", "é", ""]


@pytest.mark.parametrize("value", [["a", 1], [float("inf")], "ab"])
def test_plain_types_are_strict_too(value):
    with pytest.raises(ValueError, match="here: "):
        checked(list[float], value, "here", "mend it")
