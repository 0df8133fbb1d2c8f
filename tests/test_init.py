"""The names at the root: few, lazy, and each the one that its own module defines."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import persona_probe


def test_there_are_at_most_twenty_names() -> None:
    assert len(persona_probe.__all__) == len(set(persona_probe.__all__)) <= 20
    assert set(persona_probe.__all__) <= set(dir(persona_probe))


@pytest.mark.parametrize("name", persona_probe.__all__)
def test_every_name_is_what_its_module_defines(name: str) -> None:
    value = getattr(persona_probe, name)
    assert value.__name__ == name
    assert value.__module__.startswith("persona_probe.")
    assert inspect.isclass(value) or callable(value)
    assert value.__doc__


def test_type_checkers_are_told_the_same_homes() -> None:
    tree = ast.parse(Path(persona_probe.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {
        alias.name: str(node.module).removeprefix("persona_probe.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told == persona_probe._HOME_OF
    assert set(told) == set(persona_probe.__all__)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lode_model'"):
        _ = persona_probe.lode_model
    assert persona_probe.__version__[0].isdigit()
