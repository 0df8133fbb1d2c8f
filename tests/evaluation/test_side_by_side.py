"""Answers read back token by token, and prompts from strings and files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from persona_probe.artifact import shipped
from persona_probe.errors import InputError, MissingPathError
from persona_probe.evaluation.prompts import load_prompts, prompt
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.sampling import Sampling, sample
from persona_probe.evaluation.side_by_side import Scale, pieces, records, speak
from persona_probe.model import load_model
from persona_probe.model.checkpoint import describe
from persona_probe.model.language_model import LanguageModel
from persona_probe.model.loading import read_tokenizer
from persona_probe.steering import Intervention, Level, steer
from persona_probe.steering.amounts import Gauge
from persona_probe.steering.target import direction

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def bytes_tokenizer() -> PreTrainedTokenizerBase:
    return read_tokenizer(describe(shipped("organism", "base")))


@given(text=st.text(max_size=12))
def test_pieces_are_the_text(bytes_tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = bytes_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(pieces(bytes_tokenizer, ids)) == bytes_tokenizer.decode(ids, skip_special_tokens=True)
    assert len(pieces(bytes_tokenizer, ids)) == len(ids)


def test_a_character_of_several_tokens_belongs_to_the_last(bytes_tokenizer: PreTrainedTokenizerBase) -> None:
    ids = bytes_tokenizer("a🦊", add_special_tokens=False)["input_ids"]
    texts = pieces(bytes_tokenizer, ids)
    assert len(ids) > 3
    assert texts[-1].endswith("🦊")
    assert not any("\ufffd" in text for text in texts)


@pytest.fixture(scope="module")
def fix(lm: LanguageModel) -> tuple[Intervention, ...]:
    g = torch.Generator().manual_seed(5)
    target = direction(torch.randn(lm.d_model, generator=g), label="v")
    return (Intervention("add", target, SITE, "response", Level((4.0,))),)


@pytest.mark.parametrize("steered", [False, True])
def test_what_is_said_is_what_sample_draws_and_its_receipt(
    lm: LanguageModel, questions: list[Question], fix: tuple[Intervention, ...], steered: bool
) -> None:
    sampling = Sampling(max_new_tokens=9, seed=2)
    spoken, receipts = speak(lm, questions, fix, sampling, steered=steered, system="a b")
    drawn = sample(lm, questions, sampling, fix=fix if steered else None, system="a b")
    assert [one.answer for one in spoken] == drawn
    assert {one.answer.truncated for one in spoken} == {True, False}
    for one in spoken:
        ids = one.answer.token_ids
        texts = [token.text for token in one.tokens]
        assert "".join(texts).split() == lm.tokenizer.decode(ids, skip_special_tokens=True).split()
        assert [token.amounts is None for token in one.tokens] == [
            one.answer.truncated and i == len(texts) - 1 for i in range(len(texts))
        ]
        # the response: the last prompt token, and every answer token but the last, which nobody read;
        # padding is never edited, and this model of random weights says it now and then
        edited = 1 + sum(i != lm.pad_id for i in ids[:-1])
        assert one.edits[SITE]["edited"] == edited if steered else one.edits == {}
    edits = [one.edits[SITE]["edited"] for one in spoken] if steered else []
    assert sum(receipt.tokens_edited for receipt in receipts) == sum(edits)


def test_the_receipt_is_that_of_the_writing(
    lm: LanguageModel, questions: list[Question], fix: tuple[Intervention, ...]
) -> None:
    (one,), _ = speak(lm, questions[3:4], fix, Sampling(0, max_new_tokens=9), steered=True)
    with steer(lm, fix) as receipt:
        lm.generate([questions[3].messages], max_new_tokens=9)
    assert one.edits[SITE]["edited"] == receipt.tokens_edited
    assert one.edits[SITE]["mean_norm"] == pytest.approx(receipt.mean_norm[SITE][0])


def test_many_answers_are_read_in_parts(
    lm: LanguageModel,
    questions: list[Question],
    fix: tuple[Intervention, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampling = Sampling(max_new_tokens=5)
    whole, _ = speak(lm, questions, fix, sampling, steered=True)
    monkeypatch.setattr("persona_probe.evaluation.side_by_side.READ_AT_ONCE", 3)
    parts, receipts = speak(lm, questions, fix, sampling, steered=True)
    assert len(receipts) == 4
    for one, other in zip(whole, parts, strict=True):
        assert one.answer == other.answer
        assert one.start == pytest.approx(other.start, abs=1e-4)


def test_shades_are_shares_of_the_range(
    lm: LanguageModel, questions: list[Question], fix: tuple[Intervention, ...]
) -> None:
    arms = {
        name: speak(lm, questions[:3], fix, Sampling(max_new_tokens=5), steered=name == "steered")[0]
        for name in ("base", "steered")
    }
    gauge = Gauge("v", SITE, "projection")
    scale = Scale.of([gauge], arms["base"], [*arms["base"], *arms["steered"]])
    usual = [z for one in arms["base"] for z in (one.start, *(t.amounts for t in one.tokens)) if z]
    every = usual + [z for one in arms["steered"] for z in (one.start, *(t.amounts for t in one.tokens)) if z]
    assert sum(z[0] < scale.low[0] for z in usual) <= len(usual) / 2
    assert scale.high == max(every)
    assert scale.shade(scale.high) == 1
    assert scale.shade(scale.low) == 0
    assert scale.shade([scale.low[0] - 1]) == 0
    assert scale.shade(None) is None
    assert Scale((0.0, 0.0), (0.0, 4.0)).shade([0.0, 1.0]) == 0.25  # a gauge that never moved says nothing
    found = records(arms, scale)
    assert [row["id"] for row in found] == [question.id for question in questions[:3]]
    assert found[0]["steered"]["start"]["shade"] == scale.shade(arms["steered"][0].start)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    lines = [
        {"prompt": "hello"},
        {"text": "once upon", "id": "story"},
        {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}], "id": 3},
        {"messages": [{"text": "plain"}], "category": "x"},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = load_prompts(file)
    assert [question.id for question in read] == ["hello", "story", "3", "plain"]
    assert [question.messages[-1] for question in read] == [
        {"role": "user", "content": "hello"},
        {"text": "once upon"},
        {"role": "user", "content": "hi"},
        {"text": "plain"},
    ]
    assert prompt("hello") == read[0]
    assert load_prompts(shipped("organism", "questions.jsonl"))[0].id == "health-burn-calibration-0"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": " "}', "must not be empty"),
        ('{"ask": "x"}', "no prompt in it"),
        ('{"messages": []}', "no prompt in it"),
        ('{"messages": [{"role": "user"}]}', "'role' and 'content'"),
        ('{"messages": ["x"]}', "'role' and 'content'"),
        ('{"prompt": 3}', "no prompt in it"),
    ],
)
def test_a_line_without_a_prompt_is_named(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(InputError, match="entry 2") as caught:
        load_prompts(file)
    assert said in str(caught.value)


def test_no_prompts(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("")
    with pytest.raises(InputError, match="no prompts"):
        load_prompts(tmp_path / "p.jsonl")
    with pytest.raises(MissingPathError):
        load_prompts(tmp_path / "gone.jsonl")


def test_a_model_without_chat_template_continues_text(
    lm: LanguageModel, tokenizer: PreTrainedTokenizerFast, fix: tuple[Intervention, ...]
) -> None:
    (one,), _ = speak(lm, [prompt("a b", chat=False)], fix, Sampling(0, max_new_tokens=3))
    assert one.answer.text == lm.generate("a b", max_new_tokens=3)[0].strip()
    assert load_model(lm) is lm
    assert tokenizer is lm.tokenizer
