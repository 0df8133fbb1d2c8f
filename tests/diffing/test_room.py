"""Models that do not fit in memory together are read one after the other, by all that share a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from persona_probe.artifact import read_json
from persona_probe.diffing import room as module
from persona_probe.diffing.room import Room, room_beside, settle
from persona_probe.model import LanguageModel
from tests.model.tiny_models import adapter_of, checkpoint_of


@pytest.mark.parametrize(
    ("needed", "free", "together"), [(90, 100, True), (91, 100, False), (91, None, True), (0, 0, True)]
)
def test_weights_leave_a_tenth(needed: int, free: int | None, together: bool) -> None:
    assert Room(50, needed, free).together is together


def test_a_checkpoint_takes_as_much_again_and_an_adapter_its_own_files(
    base: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "free_memory", lambda: 1000)
    weights = sum(p.numel() * 4 for p in base.hf.parameters())  # fp32, none of them tied
    adapter = adapter_of("llama", 1)
    small = (Path(adapter) / "adapter_model.safetensors").stat().st_size
    found = room_beside(base, [checkpoint_of("llama"), adapter, base.with_adapter(adapter)])
    assert found == Room(weights, weights + small, 1000) and not found.together


def test_the_first_process_decides_for_all_unless_it_is_told(tmp_path: Path) -> None:
    file = tmp_path / "passes.json"
    assert settle(file, together=False) is False
    assert settle(file, together=True) is False
    assert settle(file, together=True, fixed=True) is True
    assert settle(file, together=False) is True
    assert read_json(file) == {"together": True} and list(tmp_path.iterdir()) == [file]
