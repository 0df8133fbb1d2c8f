"""How wide the intervals will be, said before anything is asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from persona_probe.artifact import write_jsonl
from persona_probe.errors import InputError
from persona_probe.evaluation.plan import check_wanted_width, width_warning
from persona_probe.evaluation.power import expected_width
from persona_probe.evaluation.questions import Question, save_questions
from persona_probe.evaluation.request import EvaluationRequest


def test_answers_from_files_count_as_many_as_they_are(tmp_path: Path) -> None:
    """12 questions of 2 wordings; the file with the fewest answers decides."""
    questions = [
        Question(f"q{i}-{j}", "c", ({"role": "user", "content": f"{i} {j}"},), question=f"q{i}")
        for i in range(12)
        for j in range(2)
    ]
    save_questions(questions, tmp_path / "q.jsonl")
    for name, count in (("many", 8), ("few", 2)):
        rows = [{"id": question.id, "answer": "so"} for question in questions for _ in range(count)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    between = (expected_width(12, 16) + expected_width(12, 4)) / 2
    many = EvaluationRequest(
        str(tmp_path / "q.jsonl"), "exact", samples=(tmp_path / "many.jsonl",), width=between
    )
    check_wanted_width(many, many.asked())
    assert width_warning(many, many.asked()) is None
    few = replace(many, samples=(*many.samples, tmp_path / "few.jsonl"))
    with pytest.raises(InputError, match="12 questions with 4 samples each") as caught:
        check_wanted_width(few, few.asked())
    assert "samples each, or " in str(caught.value)
    accepted = replace(few, accept_wider=True)
    check_wanted_width(accepted, accepted.asked())
    assert "12 questions with 4 samples each" in (width_warning(accepted, accepted.asked()) or "")
