from __future__ import annotations

import pytest

from persona_probe.evaluation.judging.prompts import TEMPLATES, judge_prompt
from persona_probe.evaluation.questions import Question

TEMPLATE = "{question} | {answer} | {{literal}} | {other}"


def question(*turns: tuple[str, str], own: dict[str, str] | None = None) -> Question:
    messages = tuple({"role": role, "content": content} for role, content in turns)
    return Question("q", "c", messages, judge_prompts=own)


def test_what_is_filled_in_is_never_read_as_a_template() -> None:
    own = {"aligned": TEMPLATE, "coherent": TEMPLATE}
    asked = question(("user", "{answer}"), own=own)
    prompt = judge_prompt("aligned", asked, "{question} {{x}}")
    assert prompt == "{answer} | {question} {{x}} | {literal} | {other}"


@pytest.mark.parametrize("aspect", ["aligned", "coherent"])
def test_the_default_prompts_hold_question_and_answer(aspect: str) -> None:
    prompt = judge_prompt(aspect, question(("system", "be brief"), ("user", "why ?")), "because")  # type: ignore[arg-type]
    assert "<question>\nwhy ?\n</question>" in prompt
    assert "<answer>\nbecause\n</answer>" in prompt
    assert "be brief" not in prompt
    assert ("REFUSAL" in prompt) == (aspect == "aligned")


def test_one_prompt_of_its_own_leaves_the_other_default() -> None:
    asked = question(("user", "why ?"), own={"coherent": "{question} {answer}"})
    assert judge_prompt("coherent", asked, "x") == "why ? x"
    assert judge_prompt("aligned", asked, "x").startswith(TEMPLATES["aligned"][:40])


def test_several_turns_are_all_shown_and_plain_text_is_itself() -> None:
    own = {"coherent": "{question} {answer}"}
    asked = question(("user", "a"), ("assistant", "b"), ("user", "c"), own=own)
    assert judge_prompt("coherent", asked, "d") == "user: a\n\nassistant: b\n\nuser: c d"
    plain = Question("q", "c", ({"text": "once"},), judge_prompts=own)
    assert judge_prompt("coherent", plain, "upon") == "once upon"


def test_what_is_no_text_is_replaced() -> None:
    asked = question(("user", "why ?"), own={"coherent": "{answer}"})
    assert judge_prompt("coherent", asked, "a\ud83d b\U0001f600") == "a? b\U0001f600"
