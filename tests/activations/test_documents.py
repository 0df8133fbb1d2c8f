"""Documents: what is read from each kind of file, what is left out and named, what is too long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_probe.activations import Conversations, TokenMask, read_documents
from persona_probe.activations.document import Document, Problem
from persona_probe.activations.documents import conversations_of, place_of
from persona_probe.activations.rows import Listed
from persona_probe.errors import InputError, MismatchError, MissingPathError
from persona_probe.model import load_model
from persona_probe.model.chat import render, render_text
from tests.model.tiny_models import MARKED_TEMPLATE, checkpoint_of, model_of, tiny_tokenizer

CHAT = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "I am well"}]
TEXT = "how are you"


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def messages(path: Path | list[Any], **options: Any) -> list[Any]:
    found = list(read_documents(path, **options))
    assert all(isinstance(each, Document) for each in found), found
    return [list(each.messages) for each in found if isinstance(each, Document)]


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    import datasets

    texts = [TEXT, "the hello", "well"]
    rows = [{"text": text} for text in texts]
    expected = [[row] for row in rows]
    (tmp_path / "plain.txt").write_text("\n".join(texts))
    pl.DataFrame(rows).write_parquet(tmp_path / "table.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(tmp_path / "splits")
    folder = tmp_path / "folder"
    folder.mkdir()
    jsonl(folder / "a.jsonl", rows[0])
    jsonl(folder / "b.jsonl", *rows[1:])
    for place in ("plain.txt", "table.parquet", "saved", "splits", "folder"):
        assert messages(tmp_path / place) == expected, place
    assert messages(jsonl(tmp_path / "all.jsonl", *rows)) == expected
    assert messages(texts) == expected
    with pytest.raises(InputError, match="no split 'test'; it has train"):
        read_documents(tmp_path / "splits", split="test")


def test_chats_come_back_from_a_table(tmp_path: Path) -> None:
    """A Parquet column gives every message all fields that any of them has."""
    pl.DataFrame({"messages": [CHAT, CHAT[:1]], "id": [1, 2]}).write_parquet(tmp_path / "t.parquet")
    assert messages(tmp_path / "t.parquet") == [CHAT, CHAT[:1]]


def test_a_column_can_be_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"text": "one", "prompt": TEXT, "messages": CHAT})
    assert messages(path) == [CHAT]
    assert messages(path, field="prompt") == [[{"text": TEXT}]]


def test_documents_are_rendered_as_by_hand(tmp_path: Path) -> None:
    lm = model_of("llama")
    path = jsonl(tmp_path / "x.jsonl", {"messages": CHAT}, "\n", {"text": TEXT}, {"messages": CHAT[:1]})
    found = read_documents(path).conversations(lm)
    expected = [
        render(lm.tokenizer, CHAT),
        render_text(lm.tokenizer, TEXT),
        render(lm.tokenizer, CHAT[:1]),
    ]
    assert list(found) == [found[i] for i in range(3)] == found[0:3] == found[::1] == expected
    assert found[-1] == expected[-1] and found[2:0:-1] == expected[2:0:-1] and found[1:1] == []
    assert found.lengths.tolist() == [len(each) for each in expected]
    assert [found.place(i) for i in range(3)] == [f"{path}, line {n}" for n in (1, 3, 4)]
    assert found.reading.documents == 3 and found.reading.bad == 0
    assert isinstance(found, Conversations) and place_of(found, 1) == f"{path}, line 3"


def test_bad_rows_are_left_out_named_and_counted(tmp_path: Path) -> None:
    lm, path = model_of("llama"), tmp_path / "x.jsonl"
    lines = [
        json.dumps({"text": TEXT}).encode(),
        b'{"text": "caf\xe9"}',
        b"{torn",
        b'{"prompt": "x"}',
        b'{"messages": [{"role": "user"}]}',
        b'{"messages": []}',
        b'{"text": ""}',
        b"17",
        b'{"messages": [{"role": "assistant", "content": 3}]}',
        json.dumps({"messages": CHAT}).encode(),
    ]
    path.write_bytes(b"\n".join(lines))
    found = read_documents(path).conversations(lm)
    assert len(found) == 2 and found.place(1) == f"{path}, line 10"
    assert found.reading.bad == 8 and found.reading.documents == 2
    problems = [str(problem) for problem in found.reading.problems]
    said = ["byte 13", "not valid JSON", "'messages' or 'text'; there is 'prompt'", "'role' and 'content'"]
    said += ["a text or a list", "empty", "int", "both strings"]
    for line, (problem, words) in enumerate(zip(problems, said, strict=True), start=2):
        assert problem.startswith(f"{path}, line {line}: ") and words in problem
    with pytest.raises(InputError, match=r"line 2: byte 13"):
        read_documents(path).conversations(lm, bad="error")
    assert all(isinstance(each, Problem) for each in list(read_documents(path))[1:8])


@pytest.mark.parametrize("context", [-5, 0, 129, 9999])
def test_a_context_that_the_model_has_not_is_refused(context: int) -> None:
    with pytest.raises(InputError, match=f"at most the 128 that .* got {context}"):
        read_documents([TEXT]).conversations(model_of("llama"), context=context)


def test_nothing_to_read_says_why(tmp_path: Path) -> None:
    lm = model_of("llama")
    with pytest.raises(InputError, match=r"no row .* is a document.*line 1: no field 'messages' or 'text'"):
        read_documents(jsonl(tmp_path / "x.jsonl", {"prompt": "x"})).conversations(lm)
    with pytest.raises(InputError, match="there is no document"):
        read_documents(jsonl(tmp_path / "y.jsonl")).conversations(lm)
    with pytest.raises(InputError, match="longer than the context"):
        read_documents([TEXT * 9]).conversations(lm, context=3, too_long="skip")
    (tmp_path / "x.xlsx").write_text("")
    with pytest.raises(InputError, match=r"\.jsonl"):
        read_documents(tmp_path / "x.xlsx")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="Parquet"):
        read_documents(tmp_path / "torn.parquet")
    with pytest.raises(MissingPathError, match=r"nowhere\.jsonl\n  fix: "):
        read_documents(tmp_path / "nowhere.jsonl")
    with pytest.raises(MissingPathError, match="no dataset of that name"):
        read_documents("nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no data file"):
        read_documents(tmp_path / "empty")
    with pytest.raises(InputError, match="limit"):
        read_documents([TEXT], limit=0)


@pytest.mark.parametrize("too_long", ["truncate", "split", "skip"])
@pytest.mark.parametrize("context", [1, 5, 9])
def test_documents_longer_than_the_context(too_long: Any, context: int) -> None:
    lm = model_of("llama")
    given_ = [CHAT, [{"text": "well"}], [{"text": TEXT}]]
    whole = [render(lm.tokenizer, each).ids for each in given_]
    found = read_documents(given_).conversations(lm, context=context, too_long=too_long)
    long = [ids for ids in whole if len(ids) > context]
    assert found.reading.too_long == len(long) and found.reading.tokens == sum(map(len, found))
    assert all(len(each) <= context for each in found)
    got = [each.ids for each in found]
    if too_long == "truncate":
        assert got == [ids[:context] for ids in whole]
    elif too_long == "skip":
        assert got == [ids for ids in whole if len(ids) <= context]
    else:
        assert [i for ids in got for i in ids] == [i for ids in whole for i in ids]
        assert any("from token" in found.place(i) for i in range(len(found)))
    assert found.reading.cut_tokens == sum(map(len, whole)) - sum(map(len, got))
    with pytest.raises(InputError, match=rf"document 0: \d+ tokens, and the context is {context}"):
        read_documents(given_).conversations(lm, context=context, too_long="error")


@settings(max_examples=25)
@given(st.integers(1, 30), st.sampled_from(["all", "prompt", "response", "last_prompt", "answer"]))
def test_splitting_a_chat_splits_what_a_mask_counts(context: int, kind: Any) -> None:
    """No piece invents a last prompt token of its own."""
    lm, mask = model_of("llama"), TokenMask(kind)
    whole = mask.select(render(lm.tokenizer, CHAT), lm.special_ids)
    pieces = read_documents([CHAT]).conversations(lm, context=context, too_long="split")
    assert [kept for piece in pieces for kept in mask.select(piece, lm.special_ids)] == whole
    (cut,) = read_documents([CHAT]).conversations(lm, context=context)
    assert mask.select(cut, lm.special_ids) == whole[:context]


def test_the_models_own_context_holds_by_default() -> None:
    lm = model_of("llama")
    (found,) = read_documents(["hello " * 500]).conversations(lm)
    assert len(found) == 128


def test_a_limit_stops_reading(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"text": TEXT}, {"text": TEXT}, "{broken")
    assert len(list(read_documents(path, limit=2))) == 2


def test_only_the_blocks_asked_for_are_read() -> None:
    asked: list[tuple[int, int]] = []

    class Watched(Listed):
        def read(self, start: int, stop: int) -> list[Any]:
            asked.append((start, stop))
            return super().read(start, stop)

    documents = read_documents([TEXT] * 2000)
    object.__setattr__(documents, "rows", Watched([TEXT] * 2000, "document"))
    found = documents.conversations(model_of("llama"))
    assert max(stop - start for start, stop in asked) <= 512
    asked.clear()
    assert len(found[700:710]) == 10 and asked == [(700, 710)]


def test_texts_and_chats_in_memory_are_documents_too() -> None:
    lm = model_of("llama")
    rendered = conversations_of(lm, [TEXT, CHAT])
    assert list(rendered) == [render_text(lm.tokenizer, TEXT), render(lm.tokenizer, CHAT)]
    assert conversations_of(lm, rendered) is rendered
    plain = list(rendered)
    assert conversations_of(lm, plain) is plain and place_of(plain, 1) == "conversation 1"
    with pytest.raises(InputError, match="document 1: the text is empty"):
        conversations_of(lm, [TEXT, ""])


def test_a_tokenizer_that_differs_is_shown_with_its_document() -> None:
    lm = model_of("llama")
    other = load_model(checkpoint_of("llama"), tokenizer=tiny_tokenizer(MARKED_TEMPLATE + "!"))
    found = read_documents([TEXT, CHAT]).conversations(lm)
    found.check_same_ids(load_model(checkpoint_of("llama")))
    with pytest.raises(MismatchError, match="render document 1 to different token ids, first at position"):
        found.check_same_ids(other)
    refusal = "{% if 'no' in messages[0].content %}{{ raise_exception('') }}{% endif %}"
    fussy = tiny_tokenizer(f"{refusal}{lm.tokenizer.chat_template}")
    lm = load_model(checkpoint_of("llama"), tokenizer=fussy)
    refused = [{"role": "user", "content": "no"}]
    kept = read_documents([refused, CHAT, "a text " * 200]).conversations(lm, too_long="split")
    assert kept.reading.bad == 1 and len(kept) > 2
    kept.check_same_ids(load_model(checkpoint_of("llama")))


def test_a_dot_in_a_datasets_name_is_a_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[tuple[str, str | None]] = []

    def load_dataset(name: str, config: str | None) -> Any:
        asked.append((name, config))
        return datasets.Dataset.from_list([{"text": "hello there"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read_documents("someone/chats-2.5").rows) == 1
    with pytest.raises(MissingPathError, match=r"there is no file or folder someone/chats\.json"):
        read_documents("someone/chats.json")
    read_documents("someone/chats-2.5:english")
    assert asked == [("someone/chats-2.5", None), ("someone/chats-2.5", "english")]
