"""What `make package-check` finds in a wheel and an sdist; building them is not tried here."""

import pytest

from tools import package as script

WHOLE = [
    "diffusion_gym/__init__.py",
    "diffusion_gym/agents/policy.py",
    *(f"diffusion_gym/{data}" + ("x" if data.endswith("/") else "") for data in script.DATA),
    "diffusion_denoise_gym-1.dist-info/METADATA",
]


def test_the_clone_has_the_linked_modules():
    assert {"diffusion_gym/agents/policy.py", "diffusion_gym/wrappers/__init__.py"} <= script.modules()


def test_a_whole_wheel_has_no_problem():
    assert script.wheel_problems(WHOLE, {"diffusion_gym/agents/policy.py"}) == []


@pytest.mark.parametrize("name", [name for name in WHOLE if "dist-info" not in name and "__init__" not in name])
def test_a_file_that_is_missing_is_named(name):
    left = [other for other in WHOLE if other != name]
    (problem,) = script.wheel_problems(left, {"diffusion_gym/agents/policy.py"})
    assert problem.startswith("the wheel lacks diffusion_gym/") and problem.split()[-1].rstrip("/") in name


def test_a_folder_of_ours_at_the_top_is_named():
    assert script.wheel_problems([*WHOLE, "tests/conftest.py"], set()) == ["the wheel would install tests"]


def test_what_an_index_shows_is_there():
    head = b"Version: 1\nSummary: s\nLicense-Expression: MIT\nRequires-Python: >=3.11\n"
    assert script.metadata_problems(head + b"Project-URL: a, b\nDescription-Content-Type: text/markdown\n") == []
    assert script.metadata_problems(head + b"Project-URL: a, b\n") == ["the metadata lacks Description-Content-Type"]
    assert script.sdist_problems([f"x-1/{name}" for name in script.SOURCES[1:]]) == ["the sdist lacks README.md"]
