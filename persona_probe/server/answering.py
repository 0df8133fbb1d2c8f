"""One answer while it is written: what was asked of it, and what has come so far."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from persona_probe.server.text import TextWriter
from persona_probe.steering.intervention import Intervention
from persona_probe.steering.plan import RowMemory
from persona_probe.steering.target import Read, Target


@dataclass(frozen=True, eq=False)
class Probe:
    """Amounts to be read while an answer is written: of these latents or directions, at this site."""

    name: str
    site: str
    target: Target
    read: Read


class TokenScore(NamedTuple):
    """A token's log-probability under the steered model, at temperature 1, and the most probable ones."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass
class Tally:
    """What steering did to one answer, prompt included, over the forward passes it took part in."""

    edited: int = 0
    changed: int = 0
    distance: dict[str, float] = field(default_factory=dict[str, float])
    """Summed over edited tokens, per site, in units of the activation."""
    edited_at: dict[str, int] = field(default_factory=dict[str, int])

    def add(self, site: str, edited: int, changed: int, mean_norm: float | None) -> None:
        """Add what one receipt says of this answer at one site."""
        self.edited += edited
        self.changed += changed
        self.edited_at[site] = self.edited_at.get(site, 0) + edited
        self.distance[site] = self.distance.get(site, 0.0) + (mean_norm or 0.0) * edited

    @property
    def mean_norm(self) -> dict[str, float | None]:
        """Mean distance moved per edited token, per site; None for no token."""
        return {site: self.distance[site] / n if n else None for site, n in self.edited_at.items()}


@dataclass(frozen=True)
class Wish:
    """What one request asks of each of its answers."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    fix: tuple[Intervention, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    """None: no log-probabilities at all."""
    probes: tuple[Probe, ...] = ()
    streamed: bool = False


class Row:
    """One answer: tokens, text and whatever else was asked for, as they come."""

    def __init__(self, wish: Wish, choice: int = 0) -> None:
        self.wish = wish
        self.choice = choice
        self.token_ids: list[int] = []
        self.scores: list[TokenScore] = []
        self.amounts: list[list[list[float]]] = []
        """Per token of the answer, per probe: the amounts where that token was decided."""
        self.tally = Tally()
        self.memory = RowMemory()
        """What its fix must know of the passes before the next one."""
        self.text = ""
        self.starts: list[int] = []
        """Where each token's text begins; only where log-probabilities were asked for."""
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.cancelled = False
        self._writer: TextWriter | None = None
        key = hashlib.blake2b(f"{wish.seed}\0{choice}".encode(), digest_size=16).digest()
        self._chance = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))

    @property
    def length(self) -> int:
        """Prompt and answer so far, in tokens."""
        return len(self.wish.prompt) + len(self.token_ids)

    @property
    def n_shown(self) -> int:
        """How many of the tokens the text given so far shows: neither the one that ends the answer,
        nor a stop string's, nor what is held back.
        """
        writer = self._writer
        if writer is not None and (writer.stopped or self.finish_reason is None):
            return bisect_left(writer.starts, writer.given)
        return len(self.token_ids) - (self.finish_reason == "stop")

    def uniform(self) -> float:
        """The next of the numbers in [0, 1) that draw this answer: fixed by seed and choice alone."""
        return min(self._chance.random(), 1 - 2.0**-32)

    def write(self, token_id: int, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> str | None:
        """Take the next token; the text that it settles, or None where there is nothing to tell yet.

        `finish_reason` is set when it is the last. Without a stream, a stop string or offsets to be
        told, text is made once at the end: decoding token by token costs as much as the model's step
        where that is small.
        """
        self.token_ids.append(token_id)
        wish = self.wish
        if token_id in eos_ids:
            self.finish_reason = "stop"
        elif len(self.token_ids) == wish.max_new_tokens:
            self.finish_reason = "length"
        if not (wish.streamed or wish.stop or wish.top_logprobs is not None):
            if self.finish_reason is None:
                return None
            self.text = str(tokenizer.decode(self.token_ids, skip_special_tokens=True))
            return self.text
        writer = self._writer = self._writer or TextWriter(tokenizer, wish.stop)
        piece = writer.push(token_id)
        if self.finish_reason is not None:
            piece += writer.finish()
        if writer.stopped:
            self.finish_reason = "stop"
        self.text, self.starts = writer.text, writer.starts
        return piece if wish.streamed or self.finish_reason is not None else None


class News(NamedTuple):
    """What one pass did to one answer."""

    row: Row
    piece: str
    """Text that came; the whole answer where it was not streamed."""
    n_shown: int
    """Tokens that the text so far shows."""
    ended: bool
