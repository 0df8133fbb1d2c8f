"""What goes back: OpenAI's response bodies and stream chunks, with what steering did beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from persona_probe.server.answering import News, Row


@dataclass(frozen=True)
class Reply:
    """How to write the reply to one request."""

    chat: bool
    id: str
    created: int
    model: str
    """As the request named it."""
    fingerprint: str
    tokenizer: PreTrainedTokenizerBase
    intervention: str
    gain: float | None
    seed: int

    def whole(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The reply of a request without a stream."""
        kind = "chat.completion" if self.chat else "text_completion"
        return self._frame(kind) | {
            "choices": [self._choice(row) for row in rows],
            "usage": usage(rows),
            "persona_probe": self._about,
        }

    def first(self, row: Row) -> dict[str, Any]:
        """The chunk that opens a chat answer."""
        delta = {"role": "assistant", "content": ""}
        return self._chunk({"index": row.choice, "delta": delta, "logprobs": None, "finish_reason": None})

    def piece(self, news: News, told: int) -> dict[str, Any]:
        """The chunk of one piece of text, and of what belongs to the whole answer where it is the
        last. `told` tokens had their log-probabilities in earlier chunks.
        """
        row = news.row
        text = {"delta": {"content": news.piece}} if self.chat else {"text": news.piece}
        choice: dict[str, Any] = {
            "index": row.choice,
            **text,
            "logprobs": self._logprobs(row, told, news.n_shown),
            "finish_reason": row.finish_reason if news.ended else None,
        }
        chunk = self._chunk(choice | (self._own(row) if news.ended else {}))
        return chunk | ({"persona_probe": self._about} if news.ended else {})

    def usage_chunk(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The chunk that `stream_options.include_usage` asks for."""
        return self._chunk(None) | {"usage": usage(rows)}

    @property
    def _about(self) -> dict[str, Any]:
        return {"intervention": self.intervention, "gain": self.gain, "seed": self.seed}

    def _frame(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _chunk(self, choice: dict[str, Any] | None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._frame(kind) | {"choices": [] if choice is None else [choice]}

    def _choice(self, row: Row) -> dict[str, Any]:
        message = {"role": "assistant", "content": row.text, "refusal": None}
        return {
            "index": row.choice,
            **({"message": message} if self.chat else {"text": row.text}),
            "logprobs": self._logprobs(row, 0, row.n_shown),
            "finish_reason": row.finish_reason,
            **self._own(row),
        }

    def _own(self, row: Row) -> dict[str, Any]:
        """What OpenAI has no fields for."""
        own: dict[str, Any] = {}
        if row.wish.fix:
            tally = row.tally
            own["steering"] = {
                "tokens_edited": tally.edited,
                "tokens_changed": tally.changed,
                "mean_norm": tally.mean_norm,
            }
        if row.wish.probes:
            readings = [
                {
                    "name": probe.name,
                    "site": probe.site,
                    "read": probe.read,
                    "latents": probe.target.indices,
                    "amounts": [amounts[place] for amounts in row.amounts],
                }
                for place, probe in enumerate(row.wish.probes)
            ]
            tokens = [self._text(token_id) for token_id in row.token_ids]
            own["latent_scores"] = {"tokens": tokens, "readings": readings}
        return own

    def _logprobs(self, row: Row, start: int, end: int) -> dict[str, Any] | None:
        if row.wish.top_logprobs is None:
            return None
        places = range(start, max(start, end))
        if self.chat:
            return {
                "content": [
                    self._entry(row.token_ids[i], row.scores[i].logprob)
                    | {"top_logprobs": [self._entry(*one) for one in row.scores[i].top]}
                    for i in places
                ],
                "refusal": None,
            }
        return {
            "tokens": [self._text(row.token_ids[i]) for i in places],
            "token_logprobs": [row.scores[i].logprob for i in places],
            "top_logprobs": [{self._text(one): value for one, value in row.scores[i].top} for i in places],
            "text_offset": [row.starts[i] for i in places],
        }

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._text(token_id)
        # a token may hold part of a character only, whose bytes the text does not show
        whole = "\N{REPLACEMENT CHARACTER}" not in text
        return {
            "token": text,
            "logprob": logprob,
            "bytes": list(text.encode()) if whole else None,
        }

    def _text(self, token_id: int) -> str:
        return str(self.tokenizer.decode([token_id]))


def usage(rows: Sequence[Row]) -> dict[str, int]:
    """Tokens read and written; a prompt with several answers counts once."""
    prompts = {id(row.wish): len(row.wish.prompt) for row in rows}
    read, written = sum(prompts.values()), sum(len(row.token_ids) for row in rows)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
