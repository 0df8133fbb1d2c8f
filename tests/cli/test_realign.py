"""`persona-probe realign`: what it refuses before a model is loaded."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from persona_probe.artifact import shipped, write_jsonl
from persona_probe.cli.app import app


def test_a_category_that_no_question_has_is_refused_at_once(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "I am well"}]
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}])
    given = {
        "base": tmp_path / "not-looked-at",
        "tuned": tmp_path / "not-looked-at",
        "data": tmp_path / "rows.jsonl",
        "questions": shipped("organism", "questions.jsonl"),
        "judge": "exact",
        "out": tmp_path / "out",
        "in-domain": "foo",
    }
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    result = CliRunner().invoke(app, ["realign", *words])
    assert result.exit_code == 2, result.output
    assert "no question has the category 'foo'; there are " in result.stderr and "health" in result.stderr
    assert not (tmp_path / "out").exists()
