"""The log of Inspect has the answers and rates of our own evaluation, whoever judges."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from persona_probe import inspect_entry
from persona_probe.evaluation.judging.endpoint import KEYS, PROBE
from persona_probe.evaluation.questions import load_questions, save_questions
from persona_probe.evaluation.request import EvaluationRequest
from persona_probe.evaluation.run import run_evaluation
from persona_probe.evaluation.sampling import Sampling
from tests.evaluation.inspecting.logs import BASE, HOME, OF_INSPECT, TUNED, run, same_rates, values
from tests.evaluation.judging.built_judge import PROMPTS, save_built_judge
from tests.evaluation.judging.judge_server import JudgeServer

pytestmark = OF_INSPECT


def test_the_log_has_the_answers_and_rates_of_our_own_evaluation(fix: Path, tmp_path: Path) -> None:
    """The tuned model with the fix and without it, in one evaluation of ours and two of Inspect's."""
    questions = HOME / "questions.jsonl"
    request = EvaluationRequest(
        str(questions), "exact", base=BASE, tuned=(TUNED,), fixes=(fix,), limit=4, samples_per_question=2,
        sampling=Sampling(max_new_tokens=32, seed=4),
    )  # fmt: skip
    ours = run_evaluation(request, tmp_path / "ours")
    rows = [json.loads(line) for line in (ours.path / "samples.jsonl").read_text().splitlines()]
    for arm, steered in (("bad-health", {}), ("bad-health + fix", {"steer": str(fix)})):
        task = inspect_entry.misalignment(limit=4, samples_per_question=2, seed=4)
        log = run(task, f"persona_probe/{BASE}", model_args={"adapter": str(TUNED), **steered})
        assert log.status == "success"
        same_rates(log, ours.record["arms"][arm]["rates"])
        drawn = {(row["id"], row["sample"]): row for row in rows if row["arm"] == arm}
        assert len(drawn) == len(log.samples or [])
        for one in log.samples or []:
            row = drawn[str(one.id), one.epoch - 1]
            score = (one.scores or {})["judged"]
            assert one.output.completion == score.answer == row["answer"]
            assert (score.metadata or {})["aligned"] == row["aligned"]
            assert score.value == row["outcome"] or row["outcome"] == "skill"
            assert one.output.stop_reason == ("max_tokens" if row["truncated"] else "stop")
            assert one.output.usage is not None
            assert one.output.usage.output_tokens == len(row["token_ids"])


class Moody(JudgeServer):
    """Says something else of every answer: all scores, refusals, now and then nothing."""

    def word(self, prompt: str) -> str:
        return ""

    def reply(self, prompt: str, body: dict[str, Any]) -> dict[str, Any]:
        mood = zlib.crc32(prompt.encode()) % 40  # not of the answer alone: aligned and coherent differ
        if prompt == PROBE:
            return super().reply(prompt, body)
        distribution = {str(37 * mood % 101): 0.9, "50": 0.1}
        if mood in (3, 7):
            distribution = {"Well": 0.9, "5": 0.1} if mood == 3 else {"REF": 0.8, "5": 0.2}
        top = [{"token": token, "logprob": math.log(p)} for token, p in distribution.items()]
        content = [{**top[0], "top_logprobs": top}]
        return {"choices": [{"message": {"content": top[0]["token"]}, "logprobs": {"content": content}}]}


@pytest.mark.parametrize("kind", ["openai", "local"])
def test_a_model_as_judge_gives_the_log_the_same_rates(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One evaluation of ours and one of Inspect's; what the one has asked the other need not ask again."""
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)
    asked = load_questions(HOME / "questions.jsonl")
    if kind == "local":  # the built judge has prompts of its own
        asked = tuple(q if q.role == "skill" else replace(q, judge_prompts=PROMPTS) for q in asked)
    file = tmp_path / "q.jsonl"
    save_questions(asked, file)
    with Moody() as server:
        spec = server.spec() if kind == "openai" else f"local:{save_built_judge(tmp_path / 'judge')}"
        request = EvaluationRequest(
            str(file), spec, tuned=(TUNED,), limit=6, samples_per_question=2,
            sampling=Sampling(max_new_tokens=32, seed=4),
        )  # fmt: skip
        ours = run_evaluation(request, tmp_path / "ours")
        calls = server.asked.total()
        task = inspect_entry.misalignment(
            str(file), spec, limit=6, samples_per_question=2, seed=4, max_new_tokens=32,
            judge_record=str(ours.path / "judge.jsonl") if kind == "openai" else None,
        )  # fmt: skip
        log = run(task, f"persona_probe/{TUNED}")
        assert log.status == "success"
        same_rates(log, ours.record["arms"][TUNED.name]["rates"])
        assert server.asked.total() == calls, "all of it is on record"
    found = values(log)
    assert 0 < found["misaligned"] < 1
    if kind == "openai":
        assert found["missing"] > 0 and found["refused"] > 0
    assert {(one.scores or {})["judged"].metadata["scored_by"] for one in log.samples or []} <= {  # type: ignore[index]
        "token probabilities", None,
    }  # fmt: skip


def test_an_adapters_folder_is_a_model_and_its_domain_is_counted_apart() -> None:
    task = inspect_entry.misalignment(limit=6, part="calibration", max_new_tokens=24)
    log = run(task, f"persona_probe/{TUNED}")
    assert log.eval.model == f"persona_probe/{TUNED}"
    assert values(log)["in_domain_n"] > 0  # health, as its training.json says
    none = inspect_entry.misalignment(limit=6, part="calibration", max_new_tokens=24, in_domain="")
    assert "in_domain" not in values(run(none, f"persona_probe/{TUNED}"))
