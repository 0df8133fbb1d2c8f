"""Errors say what to do next, and are what a caller already catches."""

from __future__ import annotations

import errno
import inspect
import pickle

import pytest

from persona_probe import errors
from persona_probe.errors import DiskFullError, MissingExtraError, PersonaProbeError

REFINES = {
    "InputError": ValueError,
    "MissingPathError": FileNotFoundError,
    "UnknownSiteError": KeyError,
    "MismatchError": ValueError,
    "NonFiniteError": ValueError,
    "NotFiredError": RuntimeError,
    "NothingSelectedError": RuntimeError,
    "BusyError": RuntimeError,
    "DiskFullError": OSError,
    "JudgeError": RuntimeError,
    "MissingExtraError": ImportError,
}
INPUTS = {"InputError", "MissingPathError", "UnknownSiteError", "MismatchError", "NonFiniteError"}
INPUTS |= {"NothingSelectedError"}


def test_the_table_above_names_every_error() -> None:
    public = {
        name
        for name, member in inspect.getmembers(errors, inspect.isclass)
        if issubclass(member, Exception)
    }
    assert public == {*REFINES, "PersonaProbeError"}


@pytest.mark.parametrize("name", REFINES)
def test_every_error_is_ours_and_the_builtin_it_refines(name: str) -> None:
    error = getattr(errors, name)("a 'quoted' name")
    assert isinstance(error, PersonaProbeError)
    assert isinstance(error, REFINES[name])
    assert isinstance(error, errors.InputError) == (name in INPUTS)
    assert str(error) == "a 'quoted' name"  # KeyError alone would show its repr


@pytest.mark.parametrize("name", ["PersonaProbeError", *REFINES])
def test_fix_and_next_command_follow_the_message(name: str) -> None:
    error = getattr(errors, name)("no SAE", fix="train one", command="persona-probe train-sae")
    assert str(error) == "no SAE\n  fix: train one\n  next: persona-probe train-sae"
    assert (error.message, error.fix) == ("no SAE", "train one")


@pytest.mark.parametrize("name", ["PersonaProbeError", *REFINES])
def test_an_error_comes_back_whole_from_another_process(name: str) -> None:
    error = getattr(errors, name)("message", fix="fix", command="command")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)


def test_a_full_disk_carries_the_systems_number() -> None:
    assert DiskFullError("full").errno == errno.ENOSPC


def test_a_missing_extra_names_the_install() -> None:
    error = MissingExtraError.of("trl", extra="train")
    assert str(error) == "trl is not installed\n  next: pip install 'persona-probe[train]'"
