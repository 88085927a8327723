"""The lowest versions that pyproject.toml declares are those that `make test-floors` installs."""

import re
import tomllib
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


ROOT = Path(__file__).parents[1]


def pinned():
    return dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())


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


def declared_packages():
    """What the product and its extras need, but for bitsandbytes, which the tests run without."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.match(r"[\w.-]+", needed)[0] for group in groups for needed in group}
    return names - {project["name"], "bitsandbytes"}


def test_every_package_is_kept_at_the_version_that_the_tests_run_with():
    """A newer one changes what the tests find: pytest 9.2 took xdist's groups away, in silence."""
    assert declared_packages() <= pinned().keys()


def test_no_floor_is_above_the_version_that_the_tests_run_with():
    found = dict(pin.split("==") for pin in floors())
    assert {"gymnasium", "diffusers", "transformers", "stable-baselines3"} <= found.keys()
    for name in found.keys() & pinned().keys():
        assert Version(found[name]) <= Version(pinned()[name]), name
    assert Version(found["gymnasium"]) <= Version(version("gymnasium"))
