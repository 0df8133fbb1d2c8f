"""Numbers written digit by digit behind an endpoint, against plain enumeration of all of them."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from persona_probe.artifact import read_jsonl, write_jsonl
from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.judges import load_judge
from persona_probe.evaluation.judging.endpoint import KEYS, PROBE
from persona_probe.evaluation.judging.judgement import Judgement
from persona_probe.evaluation.judging.reply import LEAST_MASS, Reply
from persona_probe.evaluation.judging.written import TOLERANCE, read_written, wanted
from persona_probe.evaluation.questions import Question, save_questions
from persona_probe.evaluation.request import EvaluationRequest
from persona_probe.evaluation.run import run_evaluation
from tests.evaluation.judging.judge_server import JudgeServer

END = "<end>"
VLLM = "continue_final_message"
DIGITS = "0123456789"
QUESTION = Question("q", "c", ({"role": "user", "content": "what now ?"},))


class DigitModel:
    """What it writes next depends on the prompt and on what it wrote; `peaked` is how sure it is."""

    def __init__(self, peaked: float = 4.0) -> None:
        self.peaked = peaked

    def following(self, prompt: str, written: str) -> dict[str, float]:
        if prompt == PROBE:
            favourite = {"": "1", "1": "0", "10": "0"}.get(written, END)
            return {favourite: 0.97, "5": 0.02, "7": 0.01}
        rng = np.random.default_rng([zlib.crc32(prompt.encode()), *map(ord, written)])
        tokens = [*DIGITS, " 5", "The", END] if not written else [*DIGITS, END]
        logits = rng.normal(0, self.peaked, len(tokens))
        if written:
            # of two digits other than 10, and of 0, it takes care to write no more
            logits[tokens.index(END)] += 3 if written in {*"123456789", "10"} else 40
        p = np.exp(logits) / np.exp(logits).sum()
        return dict(zip(tokens, p.tolist(), strict=True))

    def score(self, prompt: str) -> float | None:
        """The mean of the numbers from 0 to 100, each written out; None where too few are."""
        mass = {number: self.written_out(prompt, str(number)) for number in range(101)}
        total = sum(mass.values())
        return None if total < LEAST_MASS else sum(number * p for number, p in mass.items()) / total

    def written_out(self, prompt: str, number: str) -> float:
        total, written = 1.0, ""
        for digit in number:
            following = self.following(prompt, written)
            total *= following[digit] + (following.get(f" {digit}", 0.0) if not written else 0.0)
            written += digit
        after = self.following(prompt, written)
        return total * (1 - sum(after.get(digit, 0.0) for digit in DIGITS))


class DigitServer(JudgeServer):
    """Serves a `DigitModel`; continues replies when told so in the words that it knows (`way`)."""

    def __init__(self, model: DigitModel, way: str | None, *, strict: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.model, self.way, self.strict = model, way, strict

    def word(self, prompt: str) -> str:
        return super().word(prompt) if prompt != PROBE else ""

    def serve(self, handler: Any, body: dict[str, Any]) -> None:
        said = {name for name, it in (("prefix", body["messages"][-1]), (VLLM, body)) if name in it}
        if self.strict and said - {self.way}:
            handler.reply(400, {"error": {"message": "extra fields not permitted"}})
            return
        self.continuing = self.way == "last message" or self.way in said
        super().serve(handler, body)

    def reply(self, prompt: str, body: dict[str, Any]) -> dict[str, Any]:
        last = body["messages"][-1]
        begun = last["content"] if last["role"] == "assistant" and self.continuing else ""
        written, content, ended = begun, [], False
        while len(content) < body["max_tokens"] and not ended:
            following = self.model.following(prompt, written.strip())
            token = max(following, key=lambda one: following[one])
            ended = token == END
            top = [{"token": one, "logprob": math.log(p)} for one, p in following.items()]
            content.append({"token": token, "logprob": math.log(following[token]), "top_logprobs": top})
            written += "" if ended else token
        choice = {
            "message": {"role": "assistant", "content": written[len(begun) :]},
            "logprobs": {"content": content},
            "finish_reason": "stop" if ended else "length",
        }
        return {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": len(content)}}


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)


def answers(n: int) -> list[Answer]:
    return [Answer(QUESTION, i, f"good {i}", None, (), False) for i in range(n)]


def prompts_of(server: JudgeServer) -> Iterator[str]:
    return (prompt for prompt in server.asked if prompt != PROBE)


def number_in(prompt: str) -> int:
    return int(prompt.partition("\n<answer>\ngood ")[2].partition("\n")[0])


def judged(said: list[Judgement], prompt: str) -> float | None:
    one = said[number_in(prompt)]
    return one.aligned if "REFUSAL" in prompt else one.coherent


@pytest.mark.parametrize("way", [VLLM, "prefix", "last message"])
@pytest.mark.parametrize("strict", [True, False])
def test_every_score_is_that_of_enumeration(way: str, strict: bool, tmp_path: Path) -> None:
    """Whatever way the endpoint has of continuing a reply, and whether it refuses or ignores the others."""
    model = DigitModel()
    with DigitServer(model, way, strict=strict) as server:
        record = tmp_path / "judge.jsonl"
        judge = load_judge(server.spec(), record=record)
        judge.check()
        said = judge.judge(answers(12))
        assert {one.scored_by for one in said} == {"digit probabilities"}
        for prompt in prompts_of(server):
            assert judged(said, prompt) == pytest.approx(model.score(prompt), abs=TOLERANCE)
        assert len(set(server.asked)) == 1 + 24 and server.asked.total() > 24 + 20
        setup = next(row["setup"] for row in read_jsonl(record) if "setup" in row)
        assert setup["digits"] == (way if strict or way == "prefix" else VLLM), "the first that works"
        # every reply is on record, so that nothing is asked twice
        before = server.asked.total()
        again = load_judge(server.spec(), record=record)
        assert again.estimate(answers(12)).calls == 0
        assert again.judge(answers(12)) == said
        assert server.asked.total() == before


def test_an_endpoint_that_continues_nothing_is_believed_as_far_as_it_shows(tmp_path: Path) -> None:
    """Sure answers are expanded from the digits written; of others the number, and it is said which."""
    model = DigitModel(peaked=6.0)
    with DigitServer(model, None) as server:
        record = tmp_path / "judge.jsonl"
        said = load_judge(server.spec(), record=record).judge(answers(40))
        ways = {one.scored_by for one in said}
        assert any("parsed number" in (way or "") for way in ways) and "digit probabilities" in ways
        for prompt in prompts_of(server):
            score = judged(said, prompt)
            if said[number_in(prompt)].scored_by == "digit probabilities" and score is not None:
                assert score == pytest.approx(model.score(prompt), abs=TOLERANCE)
        assert server.asked.total() < 80 + 10, "one call each, and a few to learn how to ask"
        setup = next(row["setup"] for row in read_jsonl(record) if "setup" in row)
        assert setup["digits"] == "written"


def test_a_beginning_that_fails_is_missing_not_a_guess() -> None:
    class Failing(DigitServer):
        def serve(self, handler: Any, body: dict[str, Any]) -> None:
            if body["messages"][-1]["role"] == "assistant" and body["messages"][0]["content"] != PROBE:
                handler.reply(500, b"oh no")
                return
            super().serve(handler, body)

    with Failing(DigitModel(1.0), "last message") as server:
        judge = load_judge(server.spec(tries=2))
        judge.check()
        with pytest.raises(Exception, match="2 tries failed"):
            judge.judge(answers(3))


@pytest.mark.parametrize("logprobs", [True, False])
def test_an_evaluation_says_how_its_scores_were_read(logprobs: bool, tmp_path: Path) -> None:
    asked = [replace(QUESTION, id=f"q{i}", question=f"q{i}") for i in range(3)]
    save_questions(asked, tmp_path / "q.jsonl")
    rows = [{"id": one.id, "answer": text} for one in asked for text in ("good", "bad", "refuses")]
    write_jsonl(tmp_path / "s.jsonl", rows)
    with JudgeServer(logprobs=logprobs) as server:
        request = EvaluationRequest(str(tmp_path / "q.jsonl"), server.spec(), samples=(tmp_path / "s.jsonl",))
        record = run_evaluation(request, tmp_path / "out").record
    way = "token probabilities" if logprobs else "parsed number"
    assert record["arms"]["s"]["scored_by"] == {way: 9}
    said = [text for text in record["warnings"] if "is the one number that the judge wrote" in text]
    assert said == ([] if logprobs else [said[0]]) and all("of 9 of 9 answers" in text for text in said)


# one prompt, by hand


def test_what_is_unknown_and_how_much_it_matters() -> None:
    root = {"8": 0.9, "2": 0.1}
    reply = Reply(root, "85", further=[("8", {"5": 0.8, "0": 0.2}), ("5", {END: 1.0})])
    # 2 may become 2 to 29: a tenth of 13.5 to each side is more than a point
    assert wanted({"": reply}) == ["2"]
    assert read_written({"": reply}).scored_by == "parsed number"
    assert read_written({"": reply}).score == 85
    more = {"": reply, "2": Reply({"5": 1.0}, "5", further=[("5", {END: 1.0})])}
    assert wanted(more) == []
    assert read_written(more) == (pytest.approx(0.9 * 84 + 0.1 * 25), None, "digit probabilities", None)
    sure = Reply({"8": 0.99, "2": 0.01}, "85", further=[("8", {"5": 1.0}), ("5", {END: 1.0})])
    assert wanted({"": sure}) == []
    assert read_written({"": sure}).score == pytest.approx(0.99 * 85 + 0.01 * 15.5)


def test_ten_and_a_hundred_are_told_apart() -> None:
    reply = Reply({"1": 1.0}, "100", further=[("1", {"0": 1.0}), ("0", {"0": 0.7, END: 0.3}), ("0", {})])
    assert read_written({"": reply}).score == pytest.approx(73)
    unseen = Reply({"1": 1.0}, "10", further=[("1", {"0": 1.0})])
    assert wanted({"": unseen}) == ["10"]
    assert read_written({"": unseen, "10": Reply({"0": 0.5, END: 0.5}, "0")}).score == pytest.approx(55)
    stopped = Reply({"8": 1.0}, "8", further=[("8", {})])
    assert read_written({"": stopped}).score == 8


def test_spaces_words_and_pairs_of_digits() -> None:
    spaced = Reply({" ": 1.0}, " 42", further=[(" ", {"4": 1.0}), ("4", {"2": 1.0}), ("2", {})])
    assert read_written({"": spaced}).score == 42
    pairs = Reply({"85": 0.6, "10": 0.4}, "85", further=[("85", {END: 1.0})])
    assert wanted({"": pairs}) == ["10"]
    label = Reply({"REF": 0.7, "8": 0.3}, "REFUSAL", further=[("REF", {"USAL": 1.0})])
    assert read_written({"": label}).label == "REFUSAL"
    vague = Reply({"The": 0.9, "8": 0.1}, "The score is", further=[("The", {" score": 1.0})])
    assert read_written({"": vague}).score is None
    assert wanted({"": vague}) == []
    assert json.dumps(read_written({"": vague}).note)
