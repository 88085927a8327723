"""The page of the findings: every script says versions, behaviour and what is done about it."""

import re

import pytest

from diffusion_gym.agents.report.marked import filled
from tools.pages import findings

SCRIPTS = sorted(findings.FOLDER.glob("*.sh"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_says_all_that_the_page_tells(path):
    found = findings.read(path)
    assert all(found) or not found.where
    assert re.search(r"\d+\.\d+", found.versions) and found.here.endswith(".")
    pinned = path.read_text(encoding="utf-8")
    for library, version in re.findall(r"([\w-]+) (\d[\d.]+\d)", found.versions):
        assert f"{library}=={version}" in pinned, "the script installs another version than its head names"


def test_the_page_is_that_of_the_scripts():
    page = (findings.ROOT / "findings" / "README.md").read_text(encoding="utf-8")
    assert page == filled(page, findings.parts())
    assert re.findall(r"\]\((\w+)\.sh\)", page) == [path.stem for path in SCRIPTS]


HEAD = """#!/usr/bin/env bash
# some-library 1.2.3 with other 4.5: it does
# this.
# Seen (on one thread): 1
#       2
# Here: we do that,
# too.
set -e
"""


def test_a_head_is_read_as_it_is_written(tmp_path):
    path = tmp_path / "some_finding.sh"
    path.write_text(HEAD)
    found = findings.read(path)
    assert found[1:] == (
        "some-library 1.2.3 with other 4.5",
        "it does this.",
        "(on one thread)",
        "1\n2",
        "we do that, too.",
    )


@pytest.mark.parametrize(
    "lacking", ["# Seen (on one thread): 1\n", "# Here: we do that,\n", "some-library 1.2.3 with other 4.5: "]
)
def test_a_head_that_lacks_something_is_refused(tmp_path, lacking):
    path = tmp_path / "some_finding.sh"
    path.write_text(HEAD.replace(lacking, ""))
    with pytest.raises(ValueError, match=r"some_finding.sh: its head must be a comment"):
        findings.read(path)
