"""Which tokens of a row an edit touches, counted over the row's own tokens.

Positions are absolute and per row: 0 is a row's first real token, wherever padding puts it, and
counting goes on through decoding with a KV cache. The *response* includes the last prompt token,
because that is what produces the first response token; the *prompt* includes it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from persona_probe.errors import InputError, MismatchError

NamedPositions = Literal["all", "prompt", "response", "last_prompt"]
Positions = NamedPositions | tuple[int, ...]


def checked_positions(positions: object) -> Positions:
    """`positions` when it is one of the four names or a non-empty set of indices from 0; else
    `InputError`.
    """
    if isinstance(positions, str) and positions in get_args(NamedPositions):
        return cast("NamedPositions", positions)
    if isinstance(positions, Sequence) and not isinstance(positions, str) and positions:
        indices = cast("Sequence[object]", positions)
        if all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in indices):
            return tuple(sorted({cast("int", i) for i in indices}))
    raise InputError(
        f"positions must be one of {', '.join(get_args(NamedPositions))}, or token indices from 0; "
        f"got {positions!r}"
    )


def may_overlap(one: Positions, other: Positions) -> bool:
    """Whether some token can be in both: only two sets of indices can be known to be apart."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return not set(one).isdisjoint(other)
    return True


@dataclass(frozen=True, eq=False)
class RowTokens:
    """Where the tokens of one forward pass stand in their rows."""

    position: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"] | None
    """False on padding; None when there is none."""
    prompt_length: Int[Tensor, " batch"]

    def select(self, positions: Positions) -> Bool[Tensor, "batch pos"] | None:
        """The tokens that `positions` names; None means every one of them."""
        if positions == "all":
            return self.real
        last = self.prompt_length[:, None] - 1
        if positions == "prompt":
            chosen = self.position <= last
        elif positions == "response":
            chosen = self.position >= last
        elif positions == "last_prompt":
            chosen = self.position == last
        else:
            wanted = torch.tensor(positions, device=self.position.device)
            chosen = torch.isin(self.position, wanted)
        return chosen if self.real is None else chosen & self.real


def row_tokens(
    batch: int,
    length: int,
    *,
    past: int = 0,
    attention_mask: Tensor | None = None,
    device: torch.device | None = None,
) -> RowTokens:
    """The `RowTokens` of `length` new tokens a row after `past` cached ones.

    `attention_mask` is `[batch, past + length]`, 1 on real tokens; without it there is no padding.
    Everything so far is taken to be prompt. Raises `MismatchError` for a mask of another shape.
    """
    total = past + length
    if attention_mask is None:
        position = torch.arange(past, total, device=device).expand(batch, length)
        return RowTokens(position, None, torch.full((batch,), total, device=device))
    if attention_mask.shape[0] != batch or attention_mask.shape[1] < total:
        raise MismatchError(
            f"the attention mask is {tuple(attention_mask.shape)}, expected ({batch}, {total}): "
            "cached tokens too",
            fix="pass the mask of the whole rows, as generate does",
        )
    mask = attention_mask[:, :total].bool()
    count = mask.cumsum(dim=-1)
    real = mask[:, past:]
    return RowTokens(
        position=count[:, past:] - 1,
        # one look at the mask saves masking every activation of an unpadded batch
        real=None if bool(real.all()) else real,
        prompt_length=count[:, -1],
    )


class ForwardReader:
    """Follows the forward passes of a decoder and knows, for each, which tokens it is given.

    `read` is a forward pre-hook (with kwargs). Prompt lengths are those given, else found: whatever
    a pass brings when nothing is cached, or several tokens at once, is prompt; a single token after
    cached ones is a response token. A pass without cache that repeats the one before it and adds
    one token (`generate(use_cache=False)`) is the same response going on.

    Not covered: prefill in chunks and speculative decoding, unless prompt lengths are given; static
    caches.
    """

    def __init__(self, *, rows: int, prompt_lengths: Sequence[int] | None, pad_id: int | None) -> None:
        self._rows = rows
        self._given = None if prompt_lengths is None else torch.tensor(list(prompt_lengths))
        self._pad_id = pad_id
        self._found: Tensor | None = None
        self._uncached: Tensor | None = None
        self._names: list[str] = []
        self.tokens: RowTokens | None = None

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
        if past == 0 and not continues:
            self._check_expansion(batch, ids)
        tokens = row_tokens(batch, length, past=past, attention_mask=mask, device=inputs.device)
        prompt_length = self._prompt_lengths(batch, inputs.device)
        if prompt_length is None:
            if (past == 0 or length > 1) and not continues:
                self._found = tokens.prompt_length
            elif self._found is None or len(self._found) != batch:
                # what was cached before steering began is prompt
                self._found = tokens.prompt_length - length
            prompt_length = self._found
        assert prompt_length is not None
        tokens = RowTokens(tokens.position, tokens.real, prompt_length)
        self._uncached = ids if past == 0 else None
        self.tokens = self._without_finished(tokens, ids)

    def _continues(self, past: int, cache: object, use_cache: object, ids: Tensor | None) -> bool:
        before = self._uncached
        if past or cache is not None or use_cache is True or ids is None or before is None:
            return False
        grown = (before.shape[0], before.shape[1] + 1)
        return ids.shape == grown and bool(torch.equal(ids[:, :-1], before))

    def _prompt_lengths(self, batch: int, device: torch.device) -> Tensor | None:
        lengths = self._given
        if lengths is None:
            return None
        if batch % len(lengths):
            raise MismatchError(
                f"{len(lengths)} prompt lengths were given for a batch of {batch} rows",
                fix="give one prompt length per row",
            )
        return lengths.to(device).repeat_interleave(batch // len(lengths))

    def _check_expansion(self, batch: int, ids: Tensor | None) -> None:
        if self._rows == 1 or batch == self._rows:
            return
        # generate repeats a prompt for its samples: only such a batch may be larger than the plan
        if batch % self._rows == 0 and ids is not None:
            samples = ids.view(self._rows, batch // self._rows, -1)
            if bool((samples == samples[:, :1]).all()):
                return
        raise MismatchError(
            f"the plan has {self._rows} rows and the batch {batch}",
            fix="give the plan one entry per row of the batch (or a single one for all rows)",
        )

    def _without_finished(self, tokens: RowTokens, ids: Tensor | None) -> RowTokens:
        """generate feeds padding, unmasked, to rows that have ended while others go on."""
        if self._pad_id is None or ids is None:
            return tokens
        padding = ids == self._pad_id
        if not bool(padding.any()):
            return tokens
        live = ~(padding & (tokens.position >= tokens.prompt_length[:, None]))
        real = live if tokens.real is None else tokens.real & live
        return RowTokens(tokens.position, real, tokens.prompt_length)
