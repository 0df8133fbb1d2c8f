"""Which tokens of a row an edit touches, counted over the row's own tokens.

Positions are absolute and per row: 0 is a row's first real token, wherever padding puts it, and
counting goes on through decoding with a KV cache. Negative indices count back from the end of the
prompt: -1 is the last prompt token, the only end that is known while an answer is being written.

An activation decides the token that follows it. So the *response* begins at the last prompt token,
which produces the first response token (the *prompt* ends with it too); `think` begins at the token
that opens the thought, and `answer` at the one that closes it. A row that has not opened a thought
by its first response token has none, and is answering from there on: an edit of `answer` never
comes before a thought.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast, get_args

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from persona_probe.errors import InputError, MismatchError

NamedPositions = Literal["all", "prompt", "response", "last_prompt", "think", "answer"]
Positions = NamedPositions | tuple[int, ...]

BY_THOUGHT = ("think", "answer")
"""Positions that are found from the tokens written, by the marks `<think>` and `</think>`."""
UNKNOWN, THINKING, ANSWERING = range(3)
_FEW = 1024


def checked_positions(positions: object) -> Positions:
    """`positions` when it is one of the names or a non-empty set of indices; else `InputError`."""
    if isinstance(positions, str) and positions in get_args(NamedPositions):
        return cast("NamedPositions", positions)
    if isinstance(positions, Sequence) and not isinstance(positions, str) and positions:
        indices = cast("Sequence[object]", positions)
        if all(isinstance(i, int) and not isinstance(i, bool) for i in indices):
            return tuple(sorted({cast("int", i) for i in indices}))
    raise InputError(
        f"positions must be one of {', '.join(get_args(NamedPositions))}, or token indices (from 0, "
        f"or negative from the end of the prompt); got {positions!r}"
    )


def may_overlap(one: Positions, other: Positions) -> bool:
    """Whether some token can be in both: only indices from one end, and a thought and its answer,
    are known to be apart.
    """
    if isinstance(one, tuple) and isinstance(other, tuple):
        one_end = len({index < 0 for index in (*one, *other)}) == 1
        return not (one_end and set(one).isdisjoint(other))
    return {one, other} != set(BY_THOUGHT)


@dataclass(frozen=True, eq=False)
class RowTokens:
    """Where the tokens of one forward pass stand in their rows. Made by `row_tokens`.

    What it takes tensor operations to know is found when it is asked for: most decoding steps ask
    for nothing, and there they would cost as much as the edit.
    """

    shape: tuple[int, int]
    """Rows, and tokens of each in this pass."""
    past: int
    """Cached tokens before them, padding included."""
    mask: Shaped[Tensor, "batch total"] | None
    """Of all tokens so far, 0 on padding; None when there is none."""
    real: Bool[Tensor, "batch pos"] | None
    """Of these tokens, False on padding; None when there is none among them."""
    device: torch.device | None = None
    prompt: Int[Tensor, " batch"] | None = None
    """Real tokens of each prompt; None: everything so far is prompt."""
    thought: Int[Tensor, "batch pos"] | None = None
    """`THINKING`, `ANSWERING` or neither yet; None where nobody follows it."""
    begins: bool = True
    """Whether the rows are new, and nothing that was seen before is about them."""
    written: bool = False
    """Whether the prompts are known to have ended before these tokens."""

    @cached_property
    def position(self) -> Int[Tensor, "batch pos"]:
        """Of each token in its row."""
        if self.mask is None:
            row = torch.arange(self.past, self.past + self.shape[1], device=self.device)
            return row.expand(self.shape)
        return self.mask.bool().cumsum(dim=-1)[:, self.past :] - 1

    @cached_property
    def so_far(self) -> Int[Tensor, " batch"]:
        """Real tokens of each row, these included."""
        if self.mask is None:
            return torch.full(self.shape[:1], self.past + self.shape[1], device=self.device)
        return self.mask.bool().sum(dim=-1)

    @property
    def prompt_length(self) -> Int[Tensor, " batch"]:
        """Real tokens of each prompt."""
        return self.so_far if self.prompt is None else self.prompt

    def select(self, positions: Positions) -> Bool[Tensor, "batch pos"] | None:
        """The tokens that `positions` names; None means every one of them.

        Raises `InputError` for a thought that nobody follows.
        """
        if positions == "all" or (self.written and positions == "response"):
            return self.real
        last = self.prompt_length[:, None] - 1
        if positions == "prompt":
            chosen = self.position <= last
        elif positions == "response":
            chosen = self.position >= last
        elif positions == "last_prompt":
            chosen = self.position == last
        elif isinstance(positions, str):
            if self.thought is None:
                raise InputError(
                    f"which tokens are {positions!r} is read off the token ids, which are not seen here",
                    fix="use steer(), and give the model token ids",
                )
            wanted = THINKING if positions == "think" else ANSWERING
            chosen = (self.thought == wanted) & (self.position >= last)
        else:
            indices = torch.tensor(positions, device=self.position.device)
            chosen = torch.isin(self.position, indices[indices >= 0])
            if positions[0] < 0:
                chosen |= torch.isin(self.position - last - 1, indices[indices < 0])
        return chosen if self.real is None else chosen & self.real

    @property
    def in_prompt(self) -> Bool[Tensor, "batch pos"]:
        """The real tokens of the prompt."""
        chosen = self.position < self.prompt_length[:, None]
        return chosen if self.real is None else chosen & self.real


def row_tokens(
    batch: int,
    length: int,
    *,
    past: int = 0,
    attention_mask: Tensor | None = None,
    device: torch.device | None = None,
    prompt_lengths: Int[Tensor, " batch"] | None = None,
) -> RowTokens:
    """The `RowTokens` of `length` new tokens a row after `past` cached ones.

    `attention_mask` is `[batch, past + length]`, 1 on real tokens; without it there is no padding.
    Without `prompt_lengths` everything so far is prompt. Raises `MismatchError` for a mask of another
    shape.
    """
    total = past + length
    if attention_mask is None:
        return RowTokens((batch, length), past, None, None, device, prompt_lengths)
    if attention_mask.shape[0] != batch or attention_mask.shape[1] < total:
        raise MismatchError(
            f"the attention mask is {tuple(attention_mask.shape)}, expected ({batch}, {total}): "
            "cached tokens too",
            fix="pass the mask of the whole rows, as generate does",
        )
    mask = attention_mask if attention_mask.shape[1] == total else attention_mask[:, :total]
    # one look at the mask saves masking every activation of an unpadded batch
    real = mask[:, past:].bool() if holds(mask[:, past:], 0) else None
    return RowTokens((batch, length), past, mask, real, device, prompt_lengths)


def holds(values: Shaped[Tensor, "batch pos"], value: int) -> bool:
    """Whether any is `value`. The few of a decoding step are looked at without a tensor operation."""
    if values.numel() <= _FEW:
        return any(value in row for row in values.tolist())
    return bool((values == value).any())


def follow_thought(
    ids: Int[Tensor, "batch pos"],
    before: Int[Tensor, " batch"] | None,
    tokens: RowTokens,
    marks: tuple[int, int],
) -> Int[Tensor, "batch pos"]:
    """Of each token, whether a thought is open (`THINKING`) or not (`ANSWERING`) once it is read.

    `before` is what held before these tokens, `marks` the ids that open and close a thought. The
    last mark of a prompt decides how its response begins; without one, a response token that opens
    no thought answers.
    """
    opens, closes = marks
    event = torch.where(ids == opens, THINKING, torch.where(ids == closes, ANSWERING, UNKNOWN))
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    last = torch.where(event > 0, place, -1).cummax(dim=-1).values
    carried = torch.full_like(ids[:, 0], UNKNOWN) if before is None else before
    state = torch.where(last >= 0, event.gather(-1, last.clamp(min=0)), carried[:, None])
    written = tokens.position >= tokens.prompt_length[:, None]
    return torch.where((state == UNKNOWN) & written, ANSWERING, state)
