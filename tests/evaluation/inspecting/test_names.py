"""What Inspect finds of us, and what it says of bad arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.log import read_eval_log
from inspect_ai.model import (
    get_model,
)

from persona_probe import inspect_entry
from persona_probe.evaluation.inspect_tasks import AskedOf, _sample
from persona_probe.evaluation.questions import Question, load_questions, save_questions
from tests.evaluation.inspecting.logs import BASE, HOME, OF_INSPECT, TUNED, values

pytestmark = OF_INSPECT
FAIR = "python:tests.evaluation.inspecting.test_scorer:fair"


def test_looking_for_names_loads_nothing_heavy() -> None:
    program = (
        "import sys, json, inspect_ai, inspect_ai.model, inspect_ai.scorer\n"
        "before = set(sys.modules)\n"
        "import persona_probe.inspect_entry\n"
        "print(json.dumps(sorted({m.split('.')[0] for m in set(sys.modules) - before})))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "persona_probe" in loaded
    assert loaded.isdisjoint({"torch", "transformers", "numpy", "polars", "plotly", "sae_lens", "peft"})


INSTALLED = [point for point in metadata.entry_points(group="inspect_ai") if point.name == "persona_probe"]


@pytest.mark.skipif(not INSTALLED, reason="the entry point came later than this install: make setup")
def test_inspects_own_command_finds_us(fix: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "inspect_ai", "eval", "persona_probe/misalignment",
        "--model", f"persona_probe/{TUNED}", "-M", f"steer={fix}", "-M", "gain=1",
        "-T", "limit=2", "-T", "samples_per_question=2", "--log-dir", str(tmp_path / "logs"),
        "--display", "plain",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "logs").glob("*.eval")
    log = read_eval_log(str(file))
    assert log.eval.task == "persona_probe/misalignment"
    assert log.eval.model_args["steer"] == str(fix)
    assert log.eval.task_args_passed["limit"] == 2
    assert values(log)["misaligned_n"] > 0
    assert "misaligned" in done.stdout


def test_the_entry_point_is_declared() -> None:
    project = Path(__file__).parents[3] / "pyproject.toml"
    import tomllib

    declared = tomllib.loads(project.read_text())["project"].get("entry-points", {})
    assert declared.get("inspect_ai") == {"persona_probe": "persona_probe.inspect_entry"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"questions": "open-ended"}, "the judge is missing"),
        ({"questions": "open-endet", "judge": "exact"}, "did you mean 'open-ended'"),
        ({"judge": "exakt"}, "there is no judge"),
        ({"questions": "open-ended", "judge": "exact"}, "does not know the question"),
        ({"part": "nowhere"}, "-T part=all"),
        ({"trait": "villain"}, "cannot tell the trait"),
    ],
)
def test_a_bad_task_argument_ends_with_a_message(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(PrerequisiteError) as caught:
        inspect_entry.misalignment(**arguments)
    assert said in str(caught.value.message)


def test_a_bad_model_argument_ends_with_a_message(
    monkeypatch: pytest.MonkeyPatch, fix: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for name, arguments, said in (
        (str(BASE), {"stear": str(fix)}, "no model argument 'stear'"),
        (str(BASE), {"steer": str(tmp_path)}, "is not a fix"),
        (str(tmp_path / "gone"), {}, "gone"),
        (str(BASE), {"steer": str(fix), "gain": -1}, "gain must be"),
    ):
        with pytest.raises(PrerequisiteError) as caught:
            get_model(f"persona_probe/{name}", memoize=False, **arguments)
        assert said in str(caught.value.message)


def test_inspect_has_one_number_of_epochs(tmp_path: Path, questions: list[Question]) -> None:
    own = [replace(question, samples=1 + i % 2) for i, question in enumerate(questions)]
    save_questions(own, tmp_path / "q.jsonl")
    with pytest.raises(PrerequisiteError, match="1 to 2 answers"):
        inspect_entry.misalignment(str(tmp_path / "q.jsonl"), FAIR)
    assert inspect_entry.misalignment(str(tmp_path / "q.jsonl"), FAIR, 4).epochs == 4
    save_questions([replace(question, samples=3) for question in questions], tmp_path / "q.jsonl")
    assert inspect_entry.misalignment(str(tmp_path / "q.jsonl"), FAIR).epochs == 3


def test_what_is_written_beside_a_sample_is_the_question() -> None:
    question = load_questions(HOME / "questions.jsonl")[0]
    kept = _sample(question, None).metadata or {}
    assert Question(**{**kept, "messages": tuple(kept["messages"])}) == question
    assert AskedOf(part="all").selected()[0] == question
    assert json.loads(json.dumps(kept)) == kept
    assert set(kept) <= set(asdict(question))
