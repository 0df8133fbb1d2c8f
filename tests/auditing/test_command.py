"""The command in the report asks for exactly what was asked for."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import persona_probe.auditing
from persona_probe.auditing import AuditRequest, AuditSettings
from persona_probe.auditing.command import command_lines
from persona_probe.cli.app import app
from persona_probe.screening.screen import ScreenSettings

PLAIN = AuditRequest(Path("b"), Path("t"), "q.jsonl", "exact")
FULL = AuditRequest(
    Path("with space/base"),
    Path("it's/tuned"),
    "q.jsonl",
    "python:judges.mine:judge",
    ("sae/1", "release/sae 2"),
    (Path("good"), Path("terse")),
    AuditSettings(
        trait="sarcastic",
        in_domain=("health", "two words"),
        seed=7,
        max_new_tokens=5,
        temperature=0.5,
        samples=3,
        calibration_samples=4,
        limit=9,
        controls=2,
        system_prompt='be "good"; $HOME',
        sites=("blocks.1.hook_resid_post", "blocks.2.hook_mlp_out"),
        triggers=("json", "say {question}!"),
        template="tuned",
    ),
)


def asked_by(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[AuditRequest, dict[str, Any]]:
    """What the shell's command asks of the engine."""
    asked: list[tuple[AuditRequest, dict[str, Any]]] = []

    def audit(request: AuditRequest, out: Path, **options: Any) -> None:
        asked.append((request, options))
        raise KeyboardInterrupt

    monkeypatch.setattr(persona_probe.auditing, "audit", audit)
    assert CliRunner().invoke(app, words).exit_code == 130
    return asked[0]


@pytest.mark.parametrize("request_", [PLAIN, FULL], ids=["defaults", "every flag"])
@pytest.mark.parametrize("where", [{}, {"device": "cpu", "dtype": "bfloat16"}])
def test_the_shell_reads_it_back(
    request_: AuditRequest, where: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (line,) = command_lines(request_, **where)
    program, *words = shlex.split(line)
    assert program == "persona-probe"
    asked, options = asked_by(words, monkeypatch)
    assert asked == request_
    assert {name: options[name] for name in ("device", "dtype")} == {"device": None, "dtype": None, **where}


def test_every_setting_is_a_flag_or_is_said() -> None:
    for name in AuditSettings.__dataclass_fields__:
        assert getattr(FULL.settings, name) != getattr(AuditSettings(), name) or name == "screen"
    wide = AuditRequest(
        *[Path("x")] * 3, "exact", settings=AuditSettings(screen=ScreenSettings(set_size=3), in_domain=())
    )
    line, *notes = command_lines(wide)
    assert "screen" not in line
    assert any("set_size=3" in note for note in notes)
    assert any("in_domain=()" in note for note in notes)
    assert all(note.startswith("# ") for note in notes)
