"""A chat as its template writes it, and which characters of that text the assistant said.

A template without a system role (Gemma 2's raises, others leave the message out) is given the system
message *folded*: its text and a blank line at the head of the first user message. Which templates
these are is found by trying, not by reading: see `takes_system`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from persona_probe.errors import InputError

Message = Mapping[str, str]
"""`{"role": "system" | "user" | "assistant", "content": text}`; `{"text": ...}` is plain text."""

Span = tuple[int, int]
"""Start and end, in characters, of a piece of the written chat."""

_Fill = Callable[[Sequence[Message]], tuple[str, list[Span]]]

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STAND_IN = re.compile("(\ue000\\d+\ue001)")  # private-use characters, in no template
_SYSTEM = "\ue000system\ue001"


class WrittenChat(NamedTuple):
    """A chat as text."""

    text: str
    assistant: list[Span]
    """One span per assistant turn, in order; empty where the turn is."""
    marked: bool
    """Whether the spans are the template's own, which include the end-of-turn token."""
    folded: bool
    """Whether a system message had to go into the first user message."""


def write_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
) -> WrittenChat:
    """Apply the tokenizer's chat template and find what the assistant said.

    Raises `InputError` for malformed messages, without a template, and where the template refuses
    the chat or changes the assistant's texts beyond recognition.
    """
    _check(messages)
    fill, marked = _filler(tokenizer, add_generation_prompt, variables)
    folded = messages[0]["role"] == "system" and not _keeps_system(fill)
    if folded:
        messages = _folded(messages)
    try:
        text, spans = fill(messages)
    except jinja2.TemplateError as error:
        raise InputError(f"the chat template refuses the conversation: {error}") from error
    assistant = spans if marked else _find_assistant(fill, messages, text)
    return WrittenChat(text, assistant, marked, folded)


def takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template has a place for a system message: it writes a stand-in for one.

    Where it has none, system messages are folded. Raises `InputError` without a template.
    """
    return _keeps_system(_filler(tokenizer, add_generation_prompt=True, variables={})[0])


def _filler(
    tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool, variables: Mapping[str, Any]
) -> tuple[_Fill, bool]:
    """What writes a chat, and whether the template marks the assistant's texts."""
    if tokenizer.chat_template is None:
        raise InputError(
            "the tokenizer has no chat template, and the prompts are chats",
            fix="set tokenizer.chat_template (a base model can borrow its chat version's; audit takes "
            '--template tuned), or give plain-text prompts as {"text": ...}',
        )
    template = cast(str, cast(Any, tokenizer).get_chat_template())
    marked = _MARKS.search(template) is not None
    return partial(_fill, tokenizer, template, marked, add_generation_prompt, variables), marked


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise InputError("a conversation without messages", fix="give it at least one user message")
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise InputError(f'a message must have "role" and "content", both text; got {dict(message)!r}')


def _fill(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    marked: bool,
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
    messages: Sequence[Message],
) -> tuple[str, list[Span]]:
    """The text, and the spans between the template's generation marks where it has them."""
    texts, spans = cast(
        tuple[list[str], list[list[Span]]],
        render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            chat_template=template,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=add_generation_prompt,
            **{**cast(dict[str, Any], tokenizer.special_tokens_map), **variables},
        ),
    )
    return texts[0], spans[0] if marked else []


def _keeps_system(fill: _Fill) -> bool:
    try:
        text, _ = fill([{"role": "system", "content": _SYSTEM}, {"role": "user", "content": "?"}])
    except jinja2.TemplateError:
        return False
    return _SYSTEM in text


def _folded(messages: Sequence[Message]) -> list[Message]:
    system, *rest = messages
    if not rest or rest[0]["role"] != "user":
        return [{"role": "user", "content": system["content"]}, *rest]
    texts = (system["content"], rest[0]["content"])
    return [{"role": "user", "content": "\n\n".join(filter(None, texts))}, *rest[1:]]


def _find_assistant(fill: _Fill, messages: Sequence[Message], text: str) -> list[Span]:
    """Where the assistant's texts lie, for a template without generation marks.

    The fixed parts of the template are found by writing stand-ins for the texts; with the texts
    between them they must give the written chat back. Where they do not (a template that looks into
    its messages, as those that drop earlier thoughts), the texts are searched for in order.
    """
    if not any(message["role"] == "assistant" for message in messages):
        return []
    stand_ins = [f"\ue000{number}\ue001" for number in range(len(messages))]
    try:
        frame, _ = fill([{**m, "content": s} for m, s in zip(messages, stand_ins, strict=True)])
    except jinja2.TemplateError:
        frame = ""
    contents = [message["content"] for message in messages]
    spans = (
        _in_frame(frame, dict(zip(stand_ins, contents, strict=True)), text)
        or _in_frame(frame, dict(zip(stand_ins, map(str.strip, contents), strict=True)), text)
        or _in_order(contents, text)
    )
    pairs = zip(spans, messages, strict=True)
    return [span for span, message in pairs if message["role"] == "assistant"]


def _in_frame(frame: str, contents: Mapping[str, str], text: str) -> list[Span] | None:
    rebuilt, spans = "", dict[str, Span]()
    for part in _STAND_IN.split(frame):
        piece = contents.get(part, part)
        if part in contents:
            spans[part] = (len(rebuilt), len(rebuilt) + len(piece))
        rebuilt += piece
    if rebuilt != text or len(spans) != len(contents):
        return None
    return [spans[name] for name in contents]


def _in_order(contents: Sequence[str], text: str) -> list[Span]:
    spans = _after(contents, text, 0)
    if spans is None:
        raise InputError(
            "the chat template changes what was said, so the assistant's tokens cannot be told apart",
            fix="put {% generation %} ... {% endgeneration %} around the assistant's text in the template",
        )
    return spans


def _after(contents: Sequence[str], text: str, cursor: int) -> list[Span] | None:
    """Each text behind the one before it, as it is, trimmed, or without its thought."""
    if not contents:
        return []
    content = contents[0]
    forms = (content, content.strip(), content.rpartition("</think>")[2].strip())
    for said in dict.fromkeys(forms):
        start = text.find(said, cursor)
        if start >= 0:
            rest = _after(contents[1:], text, start + len(said))
            if rest is not None:
                return [(start, start + len(said)), *rest]
    return None
