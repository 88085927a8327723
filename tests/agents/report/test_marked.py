"""Pages of which scripts write a part."""

import pytest

from diffusion_gym.agents.report.marked import filled, write_marked

PAGE = "above\n<!-- one -->\nold\n<!-- /one -->\nbetween\n<!-- two --><!-- /two -->\nbelow\n"


def test_the_parts_are_written_anew_and_the_rest_stays():
    text = filled(PAGE, {"two": r"a \1 b", "one": "x\ny"})
    assert text == "above\n<!-- one -->\nx\ny\n<!-- /one -->\nbetween\n<!-- two -->\na \\1 b\n<!-- /two -->\nbelow\n"
    assert filled(text, {"one": "x\ny"}) == text


def test_a_part_without_markers_is_refused_and_nothing_written(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    with pytest.raises(ValueError, match=r"page.md: the page has no place for 'three'; put <!-- three --> and"):
        write_marked(page, {"one": "new", "three": "x"})
    assert page.read_text() == PAGE
    write_marked(page, {"one": "new"})
    assert page.read_text() == PAGE.replace("old", "new")
