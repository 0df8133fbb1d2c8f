"""Inspect keeps to a folder of the test, and a fix for it to steer with."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("inspect_ai", reason="the extra 'eval' is not installed")

from persona_probe.artifact import shipped
from persona_probe.sae.load import load_sae
from persona_probe.steering import Intervention, Level, latents, save_fix


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs and traces in a folder of the test; nothing on the screen."""
    monkeypatch.setenv("INSPECT_LOG_DIR", str(tmp_path / "logs"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("INSPECT_DISPLAY", "none")


@pytest.fixture(autouse=True, scope="module")
def swept() -> Iterator[None]:
    """What Inspect leaves unclosed is let go here, and not in the middle of somebody else's test."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="module")
def fix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dictionary = load_sae(shipped("organism", "sae") / "block_4")
    target = latents(dictionary, [1234], label="villain")
    edit = Intervention("cap", target, dictionary.site, "last_prompt", Level((-10.0,)), 2.0, "projection")
    return save_fix(edit, tmp_path_factory.mktemp("fix") / "fix")
