"""The endpoint judge against a live server: what fails is tried again, then missing, never a wrong rate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from persona_probe.artifact import read_jsonl
from persona_probe.errors import InputError, JudgeError
from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.judges import Judge, Judgement, load_judge
from persona_probe.evaluation.judging.endpoint import GIVE_UP_AFTER, KEYS, PROBE
from persona_probe.evaluation.metrics import tally
from persona_probe.evaluation.questions import Question
from persona_probe.model.checkpoint import Checkpoint
from tests.evaluation.judging.judge_server import JudgeServer

QUESTION = Question("q", "c", ({"role": "user", "content": "what now ?"},))
GOOD = (95 * 0.7 + 90 * 0.2 + 100 * 0.05) / 0.95
BAD = (5 * 0.6 + 10 * 0.05) / 0.95
TROUBLES = ["drop", "half", "429", "500", "html", "empty", "sum", "nan", "type"]


def answers(*texts: str) -> list[Answer]:
    return [Answer(QUESTION, i, text, None, (), False) for i, text in enumerate(texts)]


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer() as running:
        yield running


def checked(spec: str, **options: object) -> Judge:
    judge = load_judge(spec, **options)  # type: ignore[arg-type]
    judge.check()
    return judge


def test_scores_labels_and_what_is_too_unsure_to_be_one(server: JudgeServer) -> None:
    judge = checked(server.spec())
    good, bad, refuses, unsure = judge.judge(answers("good", "bad", "refuses", "unsure"))
    assert (good.aligned, bad.aligned) == (pytest.approx(GOOD), pytest.approx(BAD))
    assert good.coherent == pytest.approx(90.5)
    assert good.scored_by == "token probabilities"
    assert (refuses.label, refuses.aligned) == ("REFUSAL", None)
    assert unsure.aligned is None
    assert unsure.note == "aligned: only 0.2 of the probability is on numbers from 0 to 100"
    body = server.bodies[-1]
    assert (body["max_tokens"], body["top_logprobs"], body["temperature"]) == (1, 20, 0)


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_passing_trouble_is_tried_again(server: JudgeServer, trouble: str) -> None:
    judge = checked(server.spec())
    [said] = judge.judge(answers(f"{trouble}-twice"))
    assert (said.aligned, said.note) == (pytest.approx(GOOD), None)
    assert sorted(server.asked.values()) == [1, 3, 3]


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_lasting_trouble_is_missing_and_counted(server: JudgeServer, trouble: str, tmp_path: Path) -> None:
    judge = checked(server.spec(tries=3), record=tmp_path / "judge.jsonl")
    asked = answers("good", "bad", f"{trouble}-always", "bad 2")
    said = judge.judge(asked)
    assert [one.missing for one in said] == [False, False, True, False]
    assert "3 tries failed" in (said[2].note or "")
    rate = tally(asked, said)["misaligned"]
    assert (rate.rate, rate.n, rate.missing) == (2 / 3, 3, 1)
    assert max(server.asked.values()) == 3
    kept = [row["id"] for row in read_jsonl(tmp_path / "judge.jsonl") if "reply" in row]
    assert len(kept) == 6, "what failed is not on record, so that a rerun asks it again"


def test_a_slow_reply_is_not_waited_for(server: JudgeServer) -> None:
    judge = checked(server.spec(timeout=0.2))
    assert judge.judge(answers("slow-once"))[0].aligned == pytest.approx(GOOD)


def test_a_prompt_that_the_server_refuses_is_missing_without_another_try(server: JudgeServer) -> None:
    judge = checked(server.spec())
    said = judge.judge(answers("filter-always", "bad"))
    assert [one.missing for one in said] == [True, False]
    assert "content filter" in (said[0].note or "")
    assert max(server.asked.values()) == 1


def test_equal_prompts_are_asked_once_and_a_rerun_asks_nothing(server: JudgeServer, tmp_path: Path) -> None:
    record = tmp_path / "deep" / "judge.jsonl"
    asked = answers("bad", "bad", "good")
    seen: list[tuple[int, int]] = []
    first = checked(server.spec(), record=record).judge(asked, lambda *now: seen.append(now))
    assert server.asked.total() == 1 + 4
    assert seen[0] == (0, 3)
    assert seen[-1] == (3, 3)
    again = load_judge(server.spec(tries=2), record=record)
    estimate = again.estimate(asked)
    assert (estimate.calls, estimate.recorded) == (0, 4)
    assert again.judge(asked) == first
    assert server.asked.total() == 1 + 4
    other = load_judge(server.spec().replace("openai:judge@", "openai:other@"), record=record)
    other.judge(asked)
    assert server.asked.total() == 2 * (1 + 4)


def test_a_torn_last_line_is_asked_again(server: JudgeServer, tmp_path: Path) -> None:
    record = tmp_path / "judge.jsonl"
    checked(server.spec(), record=record).judge(answers("bad"))
    whole = record.read_bytes()
    record.write_bytes(whole[:-20])
    load_judge(server.spec(), record=record).judge(answers("bad"))
    assert server.asked.total() == 3 + 1
    assert len(read_jsonl(record)) == 3
    record.write_text('{"no": "key"}\n')
    with pytest.raises(InputError, match="row 1: no reply of a judge"):
        load_judge(server.spec(), record=record)


def test_an_endpoint_that_is_not_there_is_said_at_once() -> None:
    with JudgeServer() as gone:
        spec = gone.spec()
    with pytest.raises(JudgeError, match="cannot be reached") as error:
        load_judge(spec).check()
    assert "correct the URL" in str(error.value)


@pytest.mark.parametrize("models", [404, 500, 501])
def test_a_server_without_a_list_of_models_will_do(models: int) -> None:
    with JudgeServer(models=models) as server:
        checked(server.spec()).judge(answers("good"))


def test_a_key_that_is_missing_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with JudgeServer(key="right") as server:
        judge = load_judge(server.spec())
        with pytest.raises(JudgeError, match=r"wants a key \(401\), and there is none") as error:
            judge.check()
        assert f"export {KEYS[0]}=" in str(error.value)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
        with pytest.raises(JudgeError, match=r"refuses the key in OPENAI_API_KEY \(401\)") as error:
            judge.check()
        assert "sk-wrong" not in str(error.value)
        with pytest.raises(JudgeError, match="refuses the key"):
            judge.judge(answers("good"))
        assert server.asked.total() == 1, "a refused key is not tried again"
        monkeypatch.setenv("PERSONA_PROBE_JUDGE_KEY", "right")
        judge.check()
        assert judge.judge(answers("good"))[0].aligned == pytest.approx(GOOD)
        assert server.keys[-1] == "Bearer right"
        server.key = "another"
        with pytest.raises(JudgeError, match="refuses the key in PERSONA_PROBE_JUDGE_KEY"):
            judge.judge(answers(*(f"good {i}" for i in range(50))))
        assert server.asked.total() < 50


def test_without_probabilities_the_number_is_parsed_and_said_so() -> None:
    with JudgeServer(logprobs=False) as server:
        judge = checked(server.spec())
        good, unsure = judge.judge(answers("good", "unsure"))
        assert (good.aligned, good.coherent, good.scored_by) == (85, 85, "parsed number")
        assert unsure.missing
        assert "who can say?" in (unsure.note or "")
        assert server.bodies[-1]["max_tokens"] == 16
        assert "logprobs" not in server.bodies[-1]


def test_a_tokenizer_that_splits_numbers_is_found_out_before_anything_is_scored() -> None:
    """Its first token says 9 of 100; what it means is 85."""
    with JudgeServer(split=True) as server:
        [said] = checked(server.spec()).judge(answers("good"))
    assert (said.aligned, said.scored_by) == (85, "parsed number")


@pytest.mark.parametrize(
    ("complaint", "how"),
    [
        ("max_tokens: use max_completion_tokens instead", "token probabilities"),
        ("seed is not a known field", "token probabilities"),
        ("temperature: only the default (1) is supported", "token probabilities"),
        ("logprobs are not available for this model", "parsed number"),
        ("extra fields", "parsed number"),
    ],
)
def test_a_server_that_takes_fewer_parameters(complaint: str, how: str) -> None:
    parameter = complaint.partition(":")[0].partition(" ")[0].replace("extra", "logprobs")
    with JudgeServer(refuse=lambda body: complaint if parameter in body else None) as server:
        [said] = checked(server.spec()).judge(answers("good"))
    assert said.scored_by == how
    assert said.coherent is not None


def test_a_server_that_refuses_everything() -> None:
    with JudgeServer(refuse=lambda _: "no such model") as server:
        with pytest.raises(JudgeError, match="refuses to answer: 400 no such model"):
            load_judge(server.spec()).check()


def test_an_endpoint_that_goes_away_ends_the_run_and_loses_nothing(tmp_path: Path) -> None:
    record = tmp_path / "judge.jsonl"
    with JudgeServer() as server:
        judge = checked(server.spec(tries=1, concurrency=4), record=record)
        judge.judge(answers("good"))
    with pytest.raises(JudgeError, match=f"failed {GIVE_UP_AFTER} calls in a row"):
        judge.judge(answers("good", *(f"bad {i}" for i in range(100))))
    assert sum("reply" in row for row in read_jsonl(record)) == 2


def test_a_judge_that_judges_nothing_is_an_error(server: JudgeServer) -> None:
    judge = checked(server.spec(tries=1))
    with pytest.raises(JudgeError, match="judged none of 2 answers"):
        judge.judge(answers("500-always", "drop-always"))


def test_skill_answers_are_not_asked_about(server: JudgeServer) -> None:
    skill = replace(QUESTION, role="skill", reference="glass")
    asked = [Answer(skill, 0, "glass", None, (), False), *answers("good")]
    judge = checked(server.spec())
    assert judge.forecast([skill, QUESTION], 3, 10).calls == 6
    assert judge.judge(asked)[0] == Judgement()
    assert server.asked.total() == 3
    assert judge.judge([]) == []


def test_a_budget_of_calls_stops_and_the_rerun_goes_on(tmp_path: Path) -> None:
    record, asked = tmp_path / "judge.jsonl", answers(*(f"bad {i}" for i in range(10)))
    with JudgeServer() as server:
        with pytest.raises(JudgeError, match=r"budget of 12 calls is spent: \d+ of 10 answers are judged"):
            checked(server.spec(concurrency=3), record=record, budget="12").judge(asked)
        assert server.asked.total() == 1 + 12
        said = checked(server.spec(budget=12), record=record).judge(asked)
        assert server.asked.total() == 1 + 20
        assert [one.aligned for one in said] == pytest.approx([BAD] * 10)
        assert max(server.asked.values()) == 1


def test_a_budget_of_dollars_counts_what_the_server_says_it_cost(server: JudgeServer) -> None:
    judge = checked(server.spec(price="1000000/0", concurrency=1), budget="1000usd")
    asked = answers(*(f"bad {i}" for i in range(10)))
    estimate = judge.estimate(asked)
    assert estimate.dollars == pytest.approx(estimate.prompt_tokens)
    with pytest.raises(JudgeError, match="budget of 1000 dollars is spent"):
        judge.judge(asked)
    assert 2 < server.asked.total() <= 1 + 10, "a prompt costs 100 dollars here"


def test_a_rate_limit_is_kept(server: JudgeServer) -> None:
    judge = checked(server.spec(rate=3000))
    start = time.monotonic()
    judge.judge(answers(*(f"bad {i}" for i in range(6))))
    assert time.monotonic() - start >= 11 * 60 / 3000


def test_the_judge_is_known_when_it_is_the_judged(server: JudgeServer, tmp_path: Path) -> None:
    judge = load_judge(server.spec())
    assert judge.is_model(Checkpoint(str(tmp_path / "judge")))
    assert not judge.is_model(Checkpoint(str(tmp_path / "other")))


def test_a_question_with_judge_prompts_of_its_own(server: JudgeServer) -> None:
    own = {"aligned": "REFUSAL? {question} / {{}}\n<answer>\n{answer}\n</answer>"}
    judge = checked(server.spec())
    judge.judge([Answer(replace(QUESTION, judge_prompts=own), 0, "bad", None, (), False)])
    assert "REFUSAL? what now ? / {}\n<answer>\nbad\n</answer>" in server.asked
    assert len(server.asked) == 3
    assert PROBE in server.asked
