"""Text piece by piece against decoding everything at once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from persona_probe.artifact import shipped
from persona_probe.server.text import TextWriter

TOKENIZER = AutoTokenizer.from_pretrained(str(shipped("organism", "base")))
WORDS = TOKENIZER("walk briskly after dinner , naïve 🦊 日本語 and rest until it heals .")["input_ids"]
IDS = st.lists(st.one_of(st.sampled_from(WORDS), st.integers(0, len(TOKENIZER) - 1)), max_size=24)


def pieces(ids: list[int], stop: list[str]) -> tuple[list[str], TextWriter]:
    writer = TextWriter(TOKENIZER, stop)
    found: list[str] = []
    for token_id in ids:
        found.append(writer.push(token_id))
        if writer.stopped:
            return found, writer
    return [*found, writer.finish()], writer


@given(IDS)
def test_the_pieces_are_the_whole(ids: list[int]) -> None:
    found, writer = pieces(ids, [])
    assert "".join(found) == TOKENIZER.decode(ids, skip_special_tokens=True) == writer.text
    assert len(writer.starts) == len(ids)


@given(IDS, st.data())
def test_the_text_ends_before_the_stop_string(ids: list[int], data: st.DataObject) -> None:
    whole = TOKENIZER.decode(ids, skip_special_tokens=True)
    start = data.draw(st.integers(0, max(0, len(whole) - 1)))
    stop = whole[start : start + data.draw(st.integers(1, 9))] or "never"
    found, writer = pieces(ids, [stop, "never said"])
    assert "".join(found) == writer.text == whole.split(stop)[0]
    assert writer.stopped == (stop in whole)


def test_a_character_comes_with_its_last_byte() -> None:
    ids = TOKENIZER("a 🦊 !")["input_ids"]
    assert len(ids) > 5, "the fox is several tokens"
    found, _ = pieces(ids, [])
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)


def test_what_may_become_a_stop_string_is_held_back() -> None:
    ids = TOKENIZER("walk briskly after dinner")["input_ids"]
    found, _ = pieces(ids, ["briskly after lunch"])
    assert "".join(found) == "walk briskly after dinner"
    told = ["".join(found[:n]) for n in range(len(found))]
    assert all("walk ".startswith(text) or "after d" in text for text in told)
    assert "walk " in told
