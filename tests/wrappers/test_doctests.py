"""The examples of the wrappers' docstrings and of their page, run on the embedded model."""

import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

from diffusion_gym import wrappers

MODULES = [module.name for module in pkgutil.iter_modules(wrappers.__path__)]
PAGE = Path(__file__).parents[2] / "docs" / "wrappers.md"


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_the_docstrings(name):
    assert doctest.testmod(importlib.import_module(f"diffusion_gym.wrappers.{name}")).failed == 0


@pytest.mark.parametrize("name", wrappers.__all__)
def test_each_wrapper_has_an_example(name):
    """In its docstring, or on the page: the one-step view, and those of single environments."""
    text = inspect.getdoc(getattr(wrappers, name)) + PAGE.read_text(encoding="utf-8")
    assert any(f"= {name}(" in example.source for example in doctest.DocTestParser().get_examples(text))


def test_the_examples_of_the_page(tmp_path):
    results = doctest.testfile(str(PAGE), module_relative=False, globs={"folder": tmp_path}, encoding="utf-8")
    assert results.attempted > 20 and results.failed == 0


def test_the_page_lists_every_wrapper():
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in wrappers.__all__ if f"`{name}`" not in text] == []
