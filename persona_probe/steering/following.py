"""Follow a model's forward passes and know, of each, which tokens of which rows it is given."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from persona_probe.errors import InputError, MismatchError
from persona_probe.steering.positions import RowTokens, follow_thought, holds, row_tokens


class ForwardReader:
    """`read` is a decoder's forward pre-hook (with kwargs).

    Prompt lengths are those given, else those announced by `generate` (see `generating`), else
    found: whatever a pass brings when nothing is cached, or several tokens at once, is prompt; a
    single token after cached ones is a response token. A pass without cache that repeats the one
    before it and adds one token (`generate(use_cache=False)`) is the same response going on.

    So a loop of one's own that prefills in chunks, or decodes several tokens at once, must say the
    prompts' lengths. Not covered: static caches; beam search where `think` and `answer` are asked
    for, or a condition is decided on the prompt.
    """

    def __init__(
        self,
        *,
        rows: int,
        prompt_lengths: Sequence[int] | None,
        pad_id: int | None,
        marks: tuple[int, int] | None = None,
        thoughts: Sequence[int] | None = None,
        remembers: bool = False,
    ) -> None:
        self._rows = rows
        self._given = None if prompt_lengths is None else torch.tensor(list(prompt_lengths))
        self._pad_id = pad_id
        self._marks = marks
        self._by_row = remembers or marks is not None
        """Whether what an edit does depends on what its row went through before."""
        self._announced: Tensor | None = None
        self._found: Tensor | None = None
        self._uncached: Tensor | None = None
        self._thoughts: Int[Tensor, "batch past"] | None = None
        self._before = None if thoughts is None else torch.tensor(list(thoughts))
        self._ended: int | None = None
        """By how many cached tokens every prompt had ended; None where that is not known."""
        self.tokens: RowTokens | None = None
        self.batch: int | None = None
        """Rows, as they are since the last pass or `select`."""

    @contextmanager
    def generating(self, prompt_lengths: Int[Tensor, " row"] | None) -> Generator[None, None, None]:
        """Within the block the prompts are so long, however they are cut into passes."""
        before, self._announced = self._announced, prompt_lengths
        self._ended = None
        try:
            yield
        finally:
            self._announced = before
            self._ended = None

    @property
    def thoughts(self) -> Int[Tensor, " batch"] | None:
        """How each row stands after the last pass; None where nobody asks."""
        return None if self._thoughts is None else self._thoughts[:, -1]

    def select(self, rows: Int[Tensor, " row"], plan_rows: int) -> None:
        """From now on row i is what was row `rows[i]` of the last pass."""
        batch = self.batch
        assert batch is not None
        if self._given is not None:
            self._given = _of_batch(self._given, batch)[rows.to(self._given.device)]
        for name in ("_announced", "_found", "_uncached", "_thoughts"):
            kept = cast("Tensor | None", getattr(self, name))
            if kept is not None:
                setattr(self, name, _of_batch(kept, batch)[rows.to(kept.device)])
        self._rows, self.batch = plan_rows, len(rows)

    def read(self, parameters: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read one pass, called with `args` and `kwargs` on a forward whose parameters have these
        names.
        """
        given = dict(zip(parameters, args, strict=False)) | kwargs
        ids = cast("Tensor | None", given.get("input_ids"))
        inputs = cast("Tensor", ids if ids is not None else given.get("inputs_embeds"))
        mask = given.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            raise InputError(
                "steering needs the plain attention mask, [batch, pos] of 0 and 1, to know which "
                "tokens are padding",
                fix="use the default (dynamic) cache and a 2D attention mask",
            )
        cache = given.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        batch, length = inputs.shape[:2]
        continues = self._continues(past, cache, given.get("use_cache"), ids)
        begins = past == 0 and not continues
        if begins:
            self._check_expansion(inputs)
            self._ended = None
        else:
            self._check_same_rows(batch)
        tokens = row_tokens(batch, length, past=past, attention_mask=mask, device=inputs.device)
        prompt_lengths = self._prompt_lengths(inputs, begins=begins)
        if prompt_lengths is None:
            if begins or (past and length > 1):
                self._found, self._ended = tokens.so_far, None
            elif self._found is None or len(self._found) != batch:
                # what was cached before steering began is prompt
                self._found, self._ended = tokens.so_far - length, None
            prompt_lengths = self._found
        written = self._ended is not None and past >= self._ended
        tokens = replace(tokens, prompt=prompt_lengths, begins=begins, written=written)
        if self._ended is None and bool((tokens.so_far >= tokens.prompt_length).all()):
            self._ended = past + length
        if self._marks is not None:
            tokens = self._with_thoughts(tokens, ids, past)
        self._uncached = ids if past == 0 else None
        self.tokens, self.batch = self._without_finished(tokens, ids), batch

    def _continues(self, past: int, cache: object, use_cache: object, ids: Tensor | None) -> bool:
        before = self._uncached
        if past or cache is not None or use_cache is True or ids is None or before is None:
            return False
        grown = (before.shape[0], before.shape[1] + 1)
        return ids.shape == grown and bool(torch.equal(ids[:, :-1], before))

    def _prompt_lengths(self, inputs: Tensor, *, begins: bool) -> Tensor | None:
        lengths = self._given if self._given is not None else self._announced
        if lengths is None:
            return None
        batch = len(inputs)
        if batch % len(lengths) or (begins and not _repeats(inputs, len(lengths))):
            raise MismatchError(
                f"{len(lengths)} prompt lengths were given for a batch of {batch} rows",
                fix="give one prompt length per row",
            )
        return _of_batch(lengths.to(inputs.device), batch)

    def _check_expansion(self, inputs: Tensor) -> None:
        if self._rows > 1 and not _repeats(inputs, self._rows):
            raise MismatchError(
                f"the plan has {self._rows} rows and the batch {len(inputs)}",
                fix="give the plan one entry per row of the batch (or a single one for all rows)",
            )

    def _check_same_rows(self, batch: int) -> None:
        if self._by_row and self.batch not in (None, batch):
            raise MismatchError(
                f"the batch went from {self.batch} rows to {batch}, and nothing said which they are: edits "
                "of a thought or an answer, or decided on the prompt, must know",
                fix="pass fix= to sample, or call Steering.select",
            )

    def _with_thoughts(self, tokens: RowTokens, ids: Tensor | None, past: int) -> RowTokens:
        if ids is None:
            raise InputError(
                "thought and answer are told apart by token ids, and the model was given embeddings",
                fix="give it input_ids",
            )
        assert self._marks is not None
        kept = self._thoughts
        if kept is None and self._before is not None and past:
            kept = self._before.to(ids.device)[:, None].expand(-1, past)
        # cut to what is cached: tokens that were only tried (assisted decoding) leave no trace
        kept = kept[:, :past] if kept is not None and past and kept.shape[1] >= past else None
        kept = kept if kept is not None and len(kept) == ids.shape[0] else None
        here = follow_thought(ids, None if kept is None else kept[:, -1], tokens, self._marks)
        whole = here if kept is None else torch.cat((kept, here), dim=1)
        # columns cached before steering began are unknown
        missing = past + ids.shape[1] - whole.shape[1]
        self._thoughts = torch.nn.functional.pad(whole, (missing, 0))
        return replace(tokens, thought=here)

    def _without_finished(self, tokens: RowTokens, ids: Tensor | None) -> RowTokens:
        """generate feeds padding, unmasked, to rows that have ended while others go on."""
        if self._pad_id is None or ids is None:
            return tokens
        if not holds(ids, self._pad_id):
            return tokens
        padding = ids == self._pad_id
        live = ~(padding & (tokens.position >= tokens.prompt_length[:, None]))
        return replace(tokens, real=live if tokens.real is None else tokens.real & live)


def prompt_lengths_of(
    inputs: Tensor | None, kwargs: dict[str, Any], pad_id: int | None
) -> Int[Tensor, " row"] | None:
    """How many real tokens each row given to `generate` has; None where it cannot be said."""
    given = inputs if inputs is not None else kwargs.get("input_ids")
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.long().sum(dim=-1)
    if mask is not None or not isinstance(given, Tensor) or bool((given == pad_id).any()):
        return None
    return torch.full(given.shape[:1], given.shape[1], device=given.device)


def _repeats(inputs: Tensor, n: int) -> bool:
    """Whether a batch is n prompts, each repeated in place (as generate repeats one for its samples)."""
    if len(inputs) == n:
        return True
    if len(inputs) % n:
        return False
    samples = inputs.unflatten(0, (n, -1))
    return bool((samples == samples[:, :1]).all())


def _of_batch(rows: Tensor, batch: int) -> Tensor:
    """`rows` repeated in place for a batch in which every prompt has several rows."""
    return rows if len(rows) == batch else rows.repeat_interleave(batch // len(rows), dim=0)
