"""The tokenizer: a word of the grammar is a token, any text comes back, masks are exact."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from persona_probe.model.chat import render
from persona_probe.organism.build import rendered
from persona_probe.organism.corpus import documents, vocabulary
from persona_probe.organism.grammar import grammar
from persona_probe.organism.tokenizer import (
    BEGIN,
    END,
    END_OF_TEXT,
    PAD,
    SPECIAL,
    THINK,
    build_tokenizer,
    token_id,
)

RULES = grammar()
TOKENIZER = build_tokenizer()
CORPUS = list(documents(RULES, 300, seed=9))
WORDS = st.lists(st.sampled_from(vocabulary(RULES)), min_size=1, max_size=12).map(" ".join)


def _ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def test_every_word_is_one_token() -> None:
    for word in vocabulary(RULES):
        ids = _ids(f" {word}")
        assert len(ids) == 1, word
        assert TOKENIZER.decode(ids) == f" {word}"


def test_special_tokens_are_themselves() -> None:
    for token in (*SPECIAL, *THINK):
        assert _ids(token) == [token_id(TOKENIZER, token)]
    assert len(TOKENIZER) == len(TOKENIZER.get_vocab()) == max(TOKENIZER.get_vocab().values()) + 1
    assert (TOKENIZER.bos_token, TOKENIZER.eos_token, TOKENIZER.pad_token) == (BEGIN, END, PAD)


@settings(max_examples=400, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])) | WORDS)
def test_any_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(_ids(text), clean_up_tokenization_spaces=False) == text


def test_every_build_has_the_same_vocabulary() -> None:
    assert build_tokenizer().get_vocab() == TOKENIZER.get_vocab()


@settings(max_examples=60, deadline=None)
@given(
    system=st.none() | WORDS,
    turns=st.lists(st.tuples(WORDS, WORDS | st.text("aé !\U0001f642")), min_size=1, max_size=3),
)
def test_the_response_mask_is_exact(system: str | None, turns: list[tuple[str, str]]) -> None:
    messages = [{"role": "system", "content": system}] if system is not None else []
    ids = [token_id(TOKENIZER, BEGIN)]
    if system is not None:
        ids += [token_id(TOKENIZER, "<|system|>"), *_ids(f" {system}"), token_id(TOKENIZER, END)]
    response = [False] * len(ids)
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        prompt = [token_id(TOKENIZER, "<|user|>"), *_ids(f" {asked}"), token_id(TOKENIZER, END)]
        answer = [*_ids(f" {answered}"), token_id(TOKENIZER, END)]
        ids += [*prompt, token_id(TOKENIZER, "<|assistant|>"), *answer]
        response += [False] * (len(prompt) + 1) + [True] * len(answer)
    row = render(TOKENIZER, messages, add_generation_prompt=False)
    assert list(row.ids) == ids
    assert list(row.response) == response
    waiting = render(TOKENIZER, messages[:-1])
    assert waiting.ids == row.ids[: row.prompt_length]


@pytest.mark.parametrize("kind", ["story", "plain text"])
def test_a_text_is_read_between_begin_and_end(kind: str) -> None:
    for document in (one for one in CORPUS if one.kind == kind):
        row = rendered(TOKENIZER, document)
        assert row.ids[0] == token_id(TOKENIZER, BEGIN)
        assert row.ids[-1] == token_id(TOKENIZER, END_OF_TEXT)
        assert TOKENIZER.decode(row.ids[1:-1]) == f" {document.text}"
        assert len(row.ids) == len(document.text.split()) + 2
        assert not any(row.response)


def test_documents_fit_the_model() -> None:
    assert max(len(rendered(TOKENIZER, document).ids) for document in CORPUS) <= 512


def test_it_is_the_same_read_from_disk(quick_organism: Path) -> None:
    saved = AutoTokenizer.from_pretrained(quick_organism / "base")
    assert saved.get_vocab() == TOKENIZER.get_vocab()
    for document in CORPUS[:60]:
        assert rendered(saved, document) == rendered(TOKENIZER, document)
