"""The lowest versions that pyproject.toml declares are those that `make test-floors` installs."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from floors import EXTRAS, floors
from packaging.version import Version

PROJECT = """
[project]
dependencies = ["torch>=2.6", "numpy{}"]
[project.optional-dependencies]
""" + "".join(f'{extra} = ["{extra}>=1.2.3"]\n' for extra in EXTRAS)


def project(folder, declared):
    path = folder / "pyproject.toml"
    path.write_text(PROJECT.format(declared))
    return path


def test_a_floor_is_what_is_declared_and_torch_is_left_out(tmp_path):
    assert floors(project(tmp_path, ">=1.26")) == ["numpy==1.26", *(f"{extra}==1.2.3" for extra in EXTRAS)]


@pytest.mark.parametrize("declared", ["", ">=1.26,<3", "==1.26", "~=1.26"])
def test_a_package_without_a_plain_lowest_version_is_refused(tmp_path, declared):
    with pytest.raises(ValueError, match=re.escape(f"'numpy{declared}'")):
        floors(project(tmp_path, declared))


def test_no_floor_is_above_the_version_that_the_tests_run_with():
    pinned = dict(line.split("==") for line in (Path(__file__).parents[1] / "constraints.txt").read_text().split())
    found = dict(pin.split("==") for pin in floors())
    assert {"gymnasium", "diffusers", "transformers", "stable-baselines3"} <= found.keys()
    for name in found.keys() & pinned.keys():
        assert Version(found[name]) <= Version(pinned[name]), name
    assert Version(found["gymnasium"]) <= Version(version("gymnasium"))
