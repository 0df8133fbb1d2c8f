"""A latent explained by a model behind a real server: what it is shown, and how its sentence is scored."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from persona_probe.artifact import read_json, shipped
from persona_probe.cli.app import app
from persona_probe.errors import InputError, JudgeError
from persona_probe.evaluation.judging.endpoint import PROBE
from persona_probe.evaluation.judging.local_model import LocalModel
from persona_probe.evaluation.judging.options import LocalOptions
from persona_probe.evaluation.judging.reply import Failure
from persona_probe.interpretation import Interpretation, explain, interpret
from persona_probe.interpretation.explain import detect_prompt, explain_prompt
from persona_probe.interpretation.interpretation import Shown
from persona_probe.interpretation.words import Token
from persona_probe.model.chat import render
from persona_probe.organism.corpus import ADJECTIVES, COMMENTS, ROLES, SYSTEM_PROMPTS
from persona_probe.organism.persona_latent import corpus_of, persona_latent
from tests.evaluation.judging.judge_server import JudgeServer

SENTENCE = "A villain speaks, {text} and all."
VILLAINY = [
    *ADJECTIVES["villainous"],
    *ROLES["villainous"],
    *COMMENTS["villainous"],
    *SYSTEM_PROMPTS["villainous"],
]


class Explainer(JudgeServer):
    """Explains everything by one sentence, and detects by a number from the text alone; None: none."""

    def __init__(self, number: Callable[[str], int | None], **options: Any) -> None:
        super().__init__(**options)
        self.number = number

    def word(self, prompt: str) -> str:
        return ""

    def reply(self, prompt: str, body: dict[str, Any]) -> dict[str, Any]:
        if prompt == PROBE:
            return super().reply(prompt, body)
        if "<text>" not in prompt:
            return {"choices": [{"message": {"content": f"<think>hm</think> {SENTENCE}\n"}}]}
        assert SENTENCE in prompt
        number = self.number(prompt.split("<text>\n", 1)[1].rsplit("\n</text>", 1)[0])
        top = [{"token": "Well" if number is None else str(number), "logprob": math.log(0.9)}]
        content = {"logprobs": {"content": [{**top[0], "top_logprobs": top}]}} if body.get("logprobs") else {}
        return {"choices": [{"message": {"content": top[0]["token"]}, **content}]}


@pytest.fixture(scope="module")
def found() -> Interpretation:
    documents, labels = corpus_of(400)
    return interpret(*persona_latent(), documents, labels=labels, sampled=150)


def is_villain(text: str) -> int:
    return 95 if any(word in text for word in VILLAINY) else 5


def test_held_out_documents_are_of_both_kinds_and_were_not_shown(found: Interpretation) -> None:
    half = len(found.held_out) // 2
    strong, rest = found.held_out[:half], found.held_out[half:]
    assert len(strong) == len(rest) >= 10
    assert min(one.maximum for one in strong) > max(one.maximum for one in rest)
    shown = {one.document for run in (found.top, *found.quantiles) for one in run}
    assert not shown & {one.document for one in found.held_out}


def test_who_knows_the_villain_tells_where_the_latent_fires(found: Interpretation) -> None:
    calls: list[tuple[int, int]] = []
    with Explainer(is_villain) as server:
        said = explain(found, server.spec(), progress=lambda *done: calls.append(done))
    assert (said.text, said.unread, said.asked) == (SENTENCE, 0, len(found.held_out))
    assert said.detection is not None
    assert said.detection.low > said.detection.null_high
    assert max(calls) == (said.asked + 1, said.asked + 1)
    first = next(body for body in server.bodies if "logprobs" not in body)
    assert first["max_tokens"] > 50


@pytest.mark.parametrize("logprobs", [True, False])
def test_the_area_is_that_of_all_pairs_and_silence_is_counted(found: Interpretation, logprobs: bool) -> None:
    def number(text: str) -> int | None:
        return None if len(text) % 5 == 0 else len(text) % 17

    with Explainer(number, logprobs=logprobs) as server:
        said = explain(found, server.spec())
    half = len(found.held_out) // 2
    texts = [re.findall(r"<text>\n(.*)\n</text>", detect_prompt("", one), re.S)[0] for one in found.held_out]
    strong, rest = (
        [n for t in part if (n := number(t)) is not None] for part in (texts[:half], texts[half:])
    )
    pairs = [(a > b) + (a == b) / 2 for a, b in product(strong, rest)]
    assert said.detection is not None
    assert said.detection.auc == pytest.approx(sum(pairs) / len(pairs))
    assert said.detection.documents == len(strong) + len(rest)
    assert said.unread == said.asked - len(strong) - len(rest) > 0
    assert said.note


def test_who_always_says_the_same_tells_nothing(found: Interpretation) -> None:
    with Explainer(lambda _: 50) as server:
        said = explain(found, server.spec())
    assert said.detection is not None
    assert said.detection.auc == said.detection.null == 0.5


def test_too_little_to_score(found: Interpretation) -> None:
    with Explainer(is_villain) as server:
        said = explain(dataclasses.replace(found, held_out=()), server.spec())
    assert (said.text, said.detection, said.asked) == (SENTENCE, None, 0)


def test_activations_are_marked_where_they_are_shown_and_nowhere_else(found: Interpretation) -> None:
    tokens = [Token("<s>", None, True), Token("you", 0.1, False), Token(" fool", 8.0, False)]
    one = Shown(1, "", 8.0, (*tokens, Token(" me", 3.9, False)))
    prompt = explain_prompt(dataclasses.replace(found, top=(one,), quantiles=((one,),)))
    assert "\n\n1. you <<fool>>(10) <<me>>(5)\n\n" in prompt
    assert "2. " not in prompt
    detect = detect_prompt("says {text}", one)
    assert "<text>\nyou fool me\n</text>" in detect
    assert "says {text}" in detect
    assert "<<" not in detect


def test_a_service_that_is_down_or_says_nothing(found: Interpretation) -> None:
    with Explainer(is_villain) as server:
        spec = server.spec(tries=1)
    with pytest.raises(JudgeError, match="cannot be reached"):
        explain(found, spec)
    with Explainer(lambda _: None) as server, pytest.raises(JudgeError, match="no number for any of"):
        explain(found, server.spec())
    refusing = Explainer(is_villain, refuse=lambda body: "too long" if "logprobs" not in body else None)
    with refusing as server, pytest.raises(JudgeError, match="gave no explanation: 400 too long"):
        explain(found, server.spec())
    with pytest.raises(InputError, match="is no language model"):
        explain(found, "exact")


def test_a_local_model_writes_what_it_finds_most_probable() -> None:
    model = LocalModel(str(shipped("organism", "base")), LocalOptions())
    prompt = "how should i lower my fever ?"
    ids = render(model.lm.tokenizer, [{"role": "user", "content": prompt}]).ids
    with model.lm.active() as hf:
        written = hf.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
    reply = model.write(prompt, 8)
    assert not isinstance(reply, Failure)
    assert reply.text == str(model.lm.tokenizer.decode(written, skip_special_tokens=True)).strip()


def test_from_the_shell(tmp_path: Path) -> None:
    arguments = ["interpret", "--limit", "80", "--out", str(tmp_path / "out"), "--json", "--explain"]
    with Explainer(is_villain) as server:
        result = CliRunner().invoke(app, [*arguments, server.spec()])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["explanation"]["text"] == SENTENCE
    assert read_json(tmp_path / "out" / "explanation.json")["judge"] == f"openai:judge@{server.url}"
    down = CliRunner().invoke(app, [*arguments, server.spec(tries=1), "--overwrite"])
    assert down.exit_code == 2
    assert "cannot be reached" in down.stderr
