"""What base, tuned and steered model say to the same prompts, and how strongly a fix's targets are
there in each token.

Answers are drawn under common random numbers (see `sampling`). Each is then read back once under
the same fix, exactly the tokens that the model was fed while it wrote, so that the receipt is that
of the writing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple, cast

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.sampling import Sampling, sample, transcripts
from persona_probe.model.chat import Rendered
from persona_probe.model.language_model import LanguageModel
from persona_probe.steering.amounts import Gauge, check_fits, read_amounts
from persona_probe.steering.intervention import Intervention
from persona_probe.steering.receipt import Receipt

READ_AT_ONCE = 64
"""Answers per forward pass when they are read back."""


class Token(NamedTuple):
    """A piece of an answer."""

    text: str
    amounts: tuple[float, ...] | None
    """Of the fix's targets, at this token; None for a last one that the model never read."""


@dataclass(frozen=True, eq=False)
class Spoken:
    """One answer, in pieces."""

    answer: Answer
    start: tuple[float, ...]
    """The amounts at the last prompt token, which decides the first token of the answer."""
    tokens: tuple[Token, ...]
    edits: dict[str, dict[str, float | None]]
    """Per site: tokens edited and changed, mean and largest distance moved; empty without a fix."""


def speak(
    lm: LanguageModel,
    questions: Sequence[Question],
    watched: Sequence[Intervention],
    sampling: Sampling | None = None,
    *,
    steered: bool = False,
    **options: Any,
) -> tuple[list[Spoken], list[Receipt]]:
    """Answers to `questions`, steered by `watched` if asked for, and the amounts of the targets of
    `watched` at every token.

    There is a receipt per `READ_AT_ONCE` answers. `options` go to `sample`. Raises what `sample`
    and `read_amounts` raise.
    """
    check_fits(lm, watched)  # before anything is sampled
    answers = sample(lm, questions, sampling, fix=tuple(watched) if steered else None, **options)
    system = cast("str | None", options.get("system"))
    spoken: list[Spoken] = []
    receipts: list[Receipt] = []
    for start in range(0, len(answers), READ_AT_ONCE):
        part = answers[start : start + READ_AT_ONCE]
        fed = [_fed(written) for written in transcripts(lm, part, system=system, sampling=sampling)]
        read = read_amounts(lm, watched, fed, steered=steered)
        receipts.append(read.receipt)
        for row, (answer, conversation) in enumerate(zip(part, fed, strict=True)):
            own = read.amounts[row][conversation.prompt_length - 1 :]
            spoken.append(_spoken(lm.tokenizer, answer, own, _edits(read.receipt, row)))
    return spoken, receipts


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token, so that together they are the text of all.

    A character of several tokens belongs to the last of them; special tokens have no text.
    """
    texts: list[str] = []
    shown = ""
    for n in range(1, len(ids) + 1):
        whole = cast("str", tokenizer.decode(list(ids[:n]), skip_special_tokens=True))
        if whole.endswith("\ufffd") and n < len(ids):  # half a character
            texts.append("")
        else:
            texts.append(whole[len(shown) :])
            shown = whole
    return texts


@dataclass(frozen=True)
class Scale:
    """What counts as none and as most of each gauge, so that arms can be compared by eye."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def of(cls, gauges: Sequence[Gauge], usual: Sequence[Spoken], every: Sequence[Spoken]) -> Scale:
        """From 0 (an activation) or the median over `usual` (a projection, which has no zero of its
        own) to the largest amount in `every`.
        """
        columns = zip(gauges, _columns(usual), strict=True)
        low = tuple(0.0 if gauge.read == "encoder" else median(column) for gauge, column in columns)
        return cls(low, tuple(max(column) for column in _columns(every)))

    def shade(self, amounts: Sequence[float] | None) -> float | None:
        """0 to 1: how far up its range the gauge is that is furthest up; None where nothing was
        read.
        """
        if amounts is None:
            return None
        ranges = zip(amounts, self.low, self.high, strict=True)
        shares = [(z - low) / (high - low) for z, low, high in ranges if high > low]
        return min(1.0, max([0.0, *shares]))


def records(arms: Mapping[str, Sequence[Spoken]], scale: Scale) -> list[dict[str, Any]]:
    """One record per prompt, the arms side by side, as plain data. `messages` are the first arm's."""
    found: list[dict[str, Any]] = []
    for place, one in enumerate(next(iter(arms.values()))):
        question = one.answer.question
        sides = {name: _side(spoken[place], scale) for name, spoken in arms.items()}
        found.append({"id": question.id, "messages": list(question.messages), **sides})
    return found


def _fed(written: Rendered) -> Rendered:
    """What the model read: everything but its last token."""
    return Rendered(written.ids[:-1], written.response[:-1], written.prompt_length)


def _spoken(
    tokenizer: PreTrainedTokenizerBase,
    answer: Answer,
    amounts: Float[Tensor, "pos latent"],
    edits: dict[str, dict[str, float | None]],
) -> Spoken:
    start, *read = [tuple(row) for row in amounts.tolist()]
    texts = pieces(tokenizer, answer.token_ids if answer.truncated else answer.token_ids[:-1])
    rows = [*read, None] if answer.truncated else read
    return Spoken(answer, start, tuple(Token(*pair) for pair in zip(texts, rows, strict=True)), edits)


def _edits(receipt: Receipt, row: int) -> dict[str, dict[str, float | None]]:
    return {
        site: {
            "edited": receipt.edits[site][row],
            "changed": receipt.changed[site][row],
            "mean_norm": receipt.mean_norm[site][row],
            "max_norm": receipt.max_norm[site][row],
        }
        for site in receipt.sites
    }


def _columns(spoken: Sequence[Spoken]) -> list[tuple[float, ...]]:
    rows = [one.start for one in spoken]
    rows += [token.amounts for one in spoken for token in one.tokens if token.amounts is not None]
    return list(zip(*rows, strict=True))


def _side(spoken: Spoken, scale: Scale) -> dict[str, Any]:
    answer = spoken.answer
    return {
        "text": answer.text,
        "thought": answer.thought,
        "truncated": answer.truncated,
        "start": {"amounts": spoken.start, "shade": scale.shade(spoken.start)},
        "tokens": [{**token._asdict(), "shade": scale.shade(token.amounts)} for token in spoken.tokens],
        "edits": spoken.edits,
    }
