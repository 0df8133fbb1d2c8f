"""Documents to read with a model: chats and plain texts, from files of any size.

    documents = read_documents("chats.jsonl")
    conversations = documents.conversations(lm, too_long="split")
    conversations.place(17)                       # "chats.jsonl, line 21"

A row is a document when it is a string (plain text) or has `messages` (a chat: `role` and `content`)
or `text`; another column can be named. A row that is none, bytes that are no UTF-8, a chat that the
template refuses: left out, counted, and named with its line; or an error at once, as told.

`Conversations` are longer than memory: each is rendered when it is read. A first pass counts how long
each is; what is kept of it is 24 bytes a conversation, and a digest of all token ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args, overload

import numpy as np
from transformers import PreTrainedTokenizerBase

from persona_probe.activations.document import Document, Problem, messages_of
from persona_probe.activations.rows import Listed, Rows, blocks, open_rows
from persona_probe.artifact import StrPath
from persona_probe.errors import InputError
from persona_probe.model.chat import Rendered, check_same_ids, render
from persona_probe.model.chat_template import Message
from persona_probe.model.language_model import LanguageModel

Bad = Literal["skip", "error"]
TooLong = Literal["truncate", "split", "skip", "error"]

SHOWN = 20
"""So many bad rows are kept by name; the others are counted."""
_BLOCK = 256


@dataclass(frozen=True, eq=False)
class Documents:
    """Chats and texts that are read when they are needed. Made by `read_documents`."""

    name: str
    """What they were read from."""
    rows: Rows
    field: str | None = None
    """The column that holds them; None looks for `messages`, then `text`."""
    limit: int | None = None
    """Read only so many rows."""

    def __iter__(self) -> Iterator[Document | Problem]:
        """Every row that is not blank, in order: a document, or what is wrong with it."""
        for row, value in blocks(self.rows):
            if self.limit is not None and row >= self.limit:
                return
            if value is not None:
                yield self._read(row, value)

    def conversations(
        self,
        lm: LanguageModel,
        *,
        context: int | None = None,
        too_long: TooLong = "truncate",
        bad: Bad = "skip",
    ) -> Conversations:
        """These documents as token ids of `lm`, a sequence that is rendered when it is read.

        Args:
            context: the longest conversation, in tokens; by default what the model was made for.
            too_long: what becomes of a longer one: its beginning (`truncate`), pieces (`split`),
                nothing (`skip`), or an `error`.
            bad: what becomes of a row that cannot be read.

        Raises `InputError` when no document is left, or for the first that is bad or too long.
        """
        return Conversations(self, lm, context=context, too_long=too_long, bad=bad)

    def _read(self, row: int, value: Any) -> Document | Problem:
        try:
            return Document(row, messages_of(value, self.field))
        except InputError as error:
            return Problem(row, self.rows.place(row), error.message)


def read_documents(
    source: StrPath | Sequence[str | Sequence[Message]],
    *,
    field: str | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> Documents:
    """The documents at a path (see `rows.open_rows` for the kinds), or of a list in memory. `split` is of a
    dataset that has several ("train" by default).

    Nothing is read yet but an index of the lines. Raises `MissingPathError`, or `InputError` for a
    kind of file that cannot be read.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")
    if isinstance(source, Sequence) and not isinstance(source, str):
        return Documents("memory", Listed(source, "document"), field, limit)
    return Documents(str(source), open_rows(source, split), field, limit)


@dataclass(frozen=True)
class Reading:
    """What the first pass over the documents found."""

    documents: int
    """Rows that were read, bad ones aside."""
    conversations: int
    """What they became: fewer where some were skipped, more where some were split."""
    tokens: int
    """Of all conversations."""
    too_long: int
    """Documents longer than the context; `too_long=` said what became of them."""
    cut_tokens: int
    """Tokens that were truncated or skipped."""
    bad: int
    """Rows that could not be read."""
    problems: tuple[Problem, ...]
    """The first of them, with their places."""
    digest: str
    """`"sha256:..."` of the token ids of every conversation, in order."""


class Conversations(Sequence[Rendered]):
    """Rendered documents, in their order; made by `Documents.conversations`."""

    def __init__(
        self,
        documents: Documents,
        lm: LanguageModel,
        *,
        context: int | None = None,
        too_long: TooLong = "truncate",
        bad: Bad = "skip",
    ) -> None:
        if too_long not in get_args(TooLong):
            raise InputError(f"too_long must be one of {get_args(TooLong)}, not {too_long!r}")
        self.documents = documents
        most = context_of(lm)
        if context is not None and not 1 <= context <= (most or context):
            raise InputError(
                f"context must be at least 1, and at most the {most or 'positions'} that {lm.name} was made "
                f"for; got {context}",
                fix="leave it out: documents are then as long as the model can read",
            )
        self.context = context or most
        self._too_long = too_long
        self._tokenizer = lm.tokenizer
        self._take_index(bad)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Rendered: ...
    @overload
    def __getitem__(self, index: slice) -> list[Rendered]: ...
    def __getitem__(self, index: int | slice) -> Rendered | list[Rendered]:
        if isinstance(index, slice):
            chosen = range(len(self))[index]
            if chosen.step != 1:
                return [self[i] for i in chosen]
            return list(self._between(chosen.start, chosen.stop))
        i = range(len(self))[index]
        return next(self._between(i, i + 1))

    def __iter__(self) -> Iterator[Rendered]:
        for start in range(0, len(self), _BLOCK):
            yield from self._between(start, min(start + _BLOCK, len(self)))

    def _between(self, start: int, stop: int) -> Iterator[Rendered]:
        rows = self._rows[start:stop].tolist()
        if not rows:
            return
        values = self.documents.rows.read(rows[0], rows[-1] + 1)
        whole, of = None, -1
        for row, begin, length in zip(
            rows, self._starts[start:stop].tolist(), self.lengths[start:stop].tolist(), strict=True
        ):
            if whole is None or of != row:  # the pieces of a split document are rendered once
                messages = messages_of(values[row - rows[0]], self.documents.field)
                whole, of = render(self._tokenizer, messages), row
            yield _cut(whole, begin, begin + length)

    def place(self, index: int) -> str:
        """Where a conversation comes from: `chats.jsonl, line 21`, and from which token on."""
        start = int(self._starts[index])
        return self.documents.rows.place(int(self._rows[index])) + (f", from token {start}" if start else "")

    def record(self, index: int) -> Any:
        """The whole row that a conversation comes from, for what else stands in it."""
        return self.records(index, index + 1)[0]

    def records(self, start: int, stop: int) -> list[Any]:
        """The same of the conversations from `start` up to `stop`."""
        rows = self._rows[start:stop].tolist()
        values = self.documents.rows.read(rows[0], rows[-1] + 1) if rows else []
        return [values[row - rows[0]] for row in rows]

    def check_same_ids(self, lm: LanguageModel) -> None:
        """Check that `lm`'s tokenizer and template give these documents the same token ids.

        Raises `MismatchError` naming the first document that differs, and where.
        """
        self.check_tokenizer(lm.tokenizer)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """The same of a tokenizer alone. Reads the documents again, unless it is the one they were
        rendered with; rows that were left out are no matter.
        """
        if tokenizer is self._tokenizer:
            return
        for start in range(0, len(self), _BLOCK):
            for i, row in enumerate(self.records(start, min(start + _BLOCK, len(self))), start):
                if not self._starts[i]:  # one piece stands for the whole of a split document
                    messages = messages_of(row, self.documents.field)
                    check_same_ids(self._tokenizer, tokenizer, messages, self.place(i))

    def _take_index(self, bad: Bad) -> None:
        rows: list[int] = []
        starts: list[int] = []
        lengths: list[int] = []
        problems: list[Problem] = []
        documents = long = cut = wrong = 0
        digest = hashlib.sha256()
        for found in self.documents:
            rendered = self._render(found) if isinstance(found, Document) else found
            if isinstance(rendered, Problem):
                if bad == "error":
                    raise InputError(str(rendered), fix="mend the row, or leave such rows out (bad='skip')")
                wrong += 1
                problems += [rendered] if len(problems) < SHOWN else []
                continue
            documents += 1
            pieces = self._pieces(len(rendered), found.row)
            if pieces != [(0, len(rendered))]:
                long += 1
                cut += len(rendered) - sum(end - start for start, end in pieces)
            for start, end in pieces:
                rows.append(found.row)
                starts.append(start)
                lengths.append(end - start)
                digest.update(np.asarray([end - start, *rendered.ids[start:end]], dtype="<i4").tobytes())
        if not rows:
            raise _nothing(self.documents.name, problems, long)
        self._rows = np.asarray(rows, dtype=np.int64)
        self._starts = np.asarray(starts, dtype=np.int64)
        self.lengths = np.asarray(lengths, dtype=np.int64)
        """Tokens of each conversation."""
        self.reading = Reading(
            documents=documents,
            conversations=len(rows),
            tokens=int(self.lengths.sum()),
            too_long=long,
            cut_tokens=cut,
            bad=wrong,
            problems=tuple(problems),
            digest=f"sha256:{digest.hexdigest()}",
        )

    def _render(self, document: Document) -> Rendered | Problem:
        try:
            return render(self._tokenizer, document.messages)
        except InputError as error:
            return Problem(document.row, self.documents.rows.place(document.row), error.message)

    def _pieces(self, length: int, row: int) -> list[tuple[int, int]]:
        context = self.context
        if context is None or length <= context:
            return [(0, length)]
        match self._too_long:
            case "truncate":
                return [(0, context)]
            case "split":
                return [(start, min(start + context, length)) for start in range(0, length, context)]
            case "skip":
                return []
            case _:
                raise InputError(
                    f"{self.documents.rows.place(row)}: {length} tokens, and the context is {context}",
                    fix="cut, split or leave out such documents: --too-long truncate, split or skip (in "
                    "Python, too_long=)",
                )


def conversations_of(
    lm: LanguageModel,
    data: Documents | Sequence[Rendered] | Sequence[str | Sequence[Any]],
    *,
    context: int | None = None,
    too_long: TooLong = "truncate",
) -> Sequence[Rendered]:
    """Documents, texts or chats as conversations of `lm`; what is already rendered as it is."""
    if isinstance(data, Documents):
        return data.conversations(lm, context=context, too_long=too_long)
    if isinstance(data, Conversations) or not data or isinstance(data[0], Rendered):
        return cast("Sequence[Rendered]", data)
    documents = read_documents(cast("Sequence[str]", data))
    return documents.conversations(lm, context=context, too_long=too_long, bad="error")


def place_of(conversations: Sequence[Any], index: int) -> str:
    """How to name a conversation to a user: by its file and line where it has one."""
    return conversations.place(index) if isinstance(conversations, Conversations) else f"conversation {index}"


def context_of(lm: LanguageModel) -> int | None:
    """The most positions that the model was made for, None where its configuration does not say."""
    config: Any = lm.hf.config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def _cut(rendered: Rendered, start: int, end: int) -> Rendered:
    if (start, end) == (0, len(rendered)):
        return rendered
    # where the prompt goes on behind the cut, no token here is its last: one past the end says so
    prompt = min(max(rendered.prompt_length - start, 0), end - start)
    prompt += rendered.prompt_length > end
    return replace(
        rendered, ids=rendered.ids[start:end], response=rendered.response[start:end], prompt_length=prompt
    )


def _nothing(name: str, problems: Sequence[Problem], long: int) -> InputError:
    if problems:
        return InputError(f"no row of {name} is a document; the first problem: {problems[0]}")
    if long:
        return InputError(
            f"every document of {name} is longer than the context",
            fix="cut or split them: --too-long truncate or split (in Python, too_long=)",
        )
    return InputError(
        f"there is no document in {name}",
        fix="a document is a row with messages or text (or the column that --field names), or a line of .txt",
    )
