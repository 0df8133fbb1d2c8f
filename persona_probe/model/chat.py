"""From messages to token ids, once, for every model that is to read them.

The chat template is rendered to text, the text is tokenised once without adding anything (a BOS is
there exactly when the template writes one), and which tokens are the assistant's is found through
character offsets: from the template's own `{% generation %}` marks where it has them, else from
where the assistant's texts lie in the rendered text. A prompt is never tokenised by itself to find
its length: merges across the boundary would shift it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_probe.errors import InputError, MismatchError
from persona_probe.model.chat_template import Message, write_chat

SHOWN_TEXT = 80
"""Most characters of a conversation that an error repeats."""


@dataclass(frozen=True)
class Rendered:
    """One conversation as token ids."""

    ids: tuple[int, ...]
    """Token ids, without padding."""
    response: tuple[bool, ...]
    """Per token: written by the assistant, in any turn, the end-of-turn token included."""
    prompt_length: int
    """Tokens before the final assistant turn; all of them where the conversation waits for an answer."""
    system_folded: bool = field(default=False, compare=False)
    """The template has no system role: the system message stands in the first user message. (The
    tokens are what they are, so two renderings are equal whether or not one was folded.)
    """

    def __len__(self) -> int:
        return len(self.ids)

    def answered(self, ids: Sequence[int]) -> Rendered:
        """This prompt with a sampled answer's token ids behind it, exactly as they were sampled."""
        return replace(
            self,
            ids=(*self.ids, *ids),
            response=(*self.response, *([True] * len(ids))),
            prompt_length=len(self.ids),
        )


class Padded(NamedTuple):
    """A batch of conversations of one length."""

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    position_ids: Int[Tensor, "batch pos"]

    def to(self, device: torch.device | str) -> Padded:
        """The same on another device."""
        return Padded(*(tensor.to(device) for tensor in self))


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool | None = None,
    variables: Mapping[str, Any] | None = None,
) -> Rendered:
    """The token ids of one conversation and which of them the assistant wrote.

    `add_generation_prompt=None` opens an assistant turn unless the last message is the assistant's.
    `variables` go to the template (`enable_thinking`).
    A system message that the template has no place for goes to the head of the first user message,
    a blank line behind it, and `system_folded` says so. A single `{"text": ...}` is plain text (see
    `render_text`).

    Raises `InputError` without a chat template, for an empty or malformed conversation, for one
    that the template refuses, and where the template writes a second BOS.
    """
    if len(messages) == 1 and "text" in messages[0]:
        return render_text(tokenizer, messages[0]["text"])
    if add_generation_prompt is None:
        add_generation_prompt = bool(messages) and messages[-1].get("role") != "assistant"
    chat = write_chat(tokenizer, messages, add_generation_prompt, variables or {})
    ids, offsets = _tokenise(tokenizer, chat.text, add_special_tokens=False)
    closing = () if chat.marked else tokenizer.all_special_ids
    runs = [_tokens_within(offsets, span, ids, closing) for span in chat.assistant]
    response = [False] * len(ids)
    for start, end in runs:
        response[start:end] = [True] * (end - start)
    answers = messages[-1]["role"] == "assistant" and not add_generation_prompt
    prompt_length = runs[-1][0] if answers and runs else len(ids)
    bos = tokenizer.bos_token_id
    if bos is not None and tuple(ids[:2]) == (bos, bos) and bos != tokenizer.eos_token_id:
        raise InputError(
            "the chat template writes the beginning-of-sequence token twice",
            fix="remove one bos_token from tokenizer.chat_template",
        )
    return Rendered(tuple(ids), tuple(response), prompt_length, chat.folded)


def render_all(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    add_generation_prompt: bool | None = None,
) -> list[Rendered]:
    """`render` for each conversation; an error says which one (counted from 0)."""
    rendered: list[Rendered] = []
    for number, messages in enumerate(conversations):
        try:
            rendered.append(render(tokenizer, messages, add_generation_prompt=add_generation_prompt))
        except InputError as error:
            raise InputError(
                f"conversation {number}: {error.message}", fix=error.fix, command=error.command
            ) from error
    return rendered


def render_text(tokenizer: PreTrainedTokenizerBase, text: str, answer: str = "") -> Rendered:
    """Plain text, for models without a chat format: the prompt `text` and, directly behind it, `answer`.

    Special tokens are those the tokenizer adds by itself at the beginning; one that it adds at the
    end is dropped. A token that straddles the boundary is the answer's. An empty prompt becomes the
    BOS (else EOS) token.
    """
    ids, offsets = _tokenise(tokenizer, text + answer, add_special_tokens=True)
    while len(ids) > 1 and offsets[-1][0] == offsets[-1][1] and ids[-1] in tokenizer.all_special_ids:
        ids, offsets = ids[:-1], offsets[:-1]
    if not ids:
        start = tokenizer.bos_token_id
        start = tokenizer.eos_token_id if start is None else start
        if not isinstance(start, int):
            raise InputError(
                "an empty prompt, and the tokenizer has no BOS or EOS token to begin with",
                fix="give the prompt some text",
            )
        return Rendered((start,), (False,), 1)
    response = tuple(end > len(text) for _, end in offsets)
    prompt_length = response.index(True) if any(response) else len(ids)
    return Rendered(tuple(ids), response, prompt_length)


def check_same_rendering(
    base: PreTrainedTokenizerBase,
    tuned: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
) -> None:
    """Check that two tokenizers (with their templates) turn every conversation into the same token ids.

    Raises `MismatchError` that shows the first difference.
    """
    for number, messages in enumerate(conversations):
        check_same_ids(
            base,
            tuned,
            messages,
            f"conversation {number}",
            fix="say which chat template both are to read (--template of audit, template= of load_pair): "
            "base, tuned, or a file",
        )


def check_same_ids(
    base: PreTrainedTokenizerBase,
    tuned: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    name: str,
    *,
    fix: str = "copy the base's tokenizer files, its chat template among them, into the tuned folder (in "
    "Python: load_pair(..., template=))",
) -> None:
    """Check that two tokenizers turn the conversation called `name` into the same token ids.

    Raises `MismatchError` with that name, the text, and the tokens at which they part.
    """
    if base is tuned:
        return
    ours, theirs = render(base, messages).ids, render(tuned, messages).ids
    if ours == theirs:
        return
    pairs = enumerate(zip(ours, theirs, strict=False))
    position = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    shown = " and ".join(
        f"{_around(tokenizer, ids, position)} ({whose})"
        for tokenizer, ids, whose in ((base, ours, "base"), (tuned, theirs, "tuned"))
    )
    raise MismatchError(
        f"base and tuned render {name} to different token ids, first at position {position}: {shown}; "
        f"its text: {_beginning(messages)!r}",
        fix=fix,
    )


def pad(
    rendered: Sequence[Rendered | Sequence[int]],
    pad_id: int,
    side: Literal["left", "right"] = "left",
) -> Padded:
    """Bring conversations to one length.

    Position ids count real tokens from 0, whatever the side, so that a model sees the same
    positions as without padding. Raises `InputError` for an empty batch or an empty conversation.
    """
    rows = [row.ids if isinstance(row, Rendered) else tuple(row) for row in rendered]
    if not rows or not all(rows):
        raise InputError("cannot pad an empty batch, or a conversation without tokens")
    width = max(map(len, rows))
    ids: list[list[int]] = []
    mask: list[list[int]] = []
    positions: list[list[int]] = []
    for row in rows:
        gap, real = width - len(row), list(range(len(row)))
        if side == "left":
            ids.append([pad_id] * gap + list(row))
            mask.append([0] * gap + [1] * len(row))
            positions.append([0] * gap + real)
        else:
            ids.append(list(row) + [pad_id] * gap)
            mask.append([1] * len(row) + [0] * gap)
            positions.append(real + [0] * gap)
    return Padded(torch.tensor(ids), torch.tensor(mask), torch.tensor(positions))


def _tokenise(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    if not tokenizer.is_fast:
        raise InputError(
            "the tokenizer cannot say which characters a token covers",
            fix="load its fast version (tokenizer.json) with AutoTokenizer",
        )
    try:
        encoded = cast(
            Mapping[str, Any],
            tokenizer(
                text,
                add_special_tokens=add_special_tokens,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            ),
        )
    except TypeError as error:  # a lone surrogate
        raise InputError(f"not valid Unicode: {text[:80]!r}") from error
    return list(encoded["input_ids"]), [(start, end) for start, end in encoded["offset_mapping"]]


def _tokens_within(
    offsets: Sequence[tuple[int, int]],
    span: tuple[int, int],
    ids: Sequence[int],
    closing: Sequence[int],
) -> tuple[int, int]:
    """The run of tokens that cover any character of `span`, and a special token right behind it."""
    start, end = span
    covering = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
    if covering:
        first, last = covering[0], covering[-1] + 1
    else:  # an empty answer
        first = last = next((i for i, (a, _) in enumerate(offsets) if a >= end), len(ids))
    if last < len(ids) and ids[last] in closing and offsets[last][0] == end:
        last += 1
    return first, last


def _beginning(messages: Sequence[Message]) -> str:
    text = " / ".join(message.get("content") or message.get("text") or "" for message in messages)
    return text if len(text) <= SHOWN_TEXT else f"{text[:SHOWN_TEXT]}…"


def _around(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], position: int) -> str:
    if position >= len(ids):
        return "the end"
    return f"{tokenizer.convert_ids_to_tokens([ids[position]])[0]!r} (id {ids[position]})"
