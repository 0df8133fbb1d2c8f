"""Numbers as a tokenizer writes them: one token each, or digit by digit.

A judge whose tokenizer splits numbers (Qwen, Gemma, Llama 2) answers "85" by "8" and then "5"; its
first token read alone would be 8 of 100. For such a model the probability of a number is that of
its digits *and* of no digit after them,

    p(85) = p("8") p("5" | "8") (1 - p(digit | "85"))

summed over all ways to write it. Sources: none published; checked against plain enumeration.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

FOLLOW_ABOVE = 1e-3
"""Digits less likely than this are taken to end there, which can move no score by more than their
probability times 100.
"""

NUMBERS = frozenset(map(str, range(101)))


@dataclass(frozen=True)
class NumberTokens:
    """Which token ids write digits."""

    first: dict[int, str]
    """Token id to its digits, for those that may begin a number: a space before them is left out."""
    later: dict[int, str]
    """The same for those that continue one: without a space."""
    spaces: tuple[int, ...]
    """Token ids that are only a space, which may stand before the first digit."""
    whole: bool
    """Every number from 0 to 100 is written as one token."""


def number_tokens(tokenizer: PreTrainedTokenizerBase) -> NumberTokens:
    """Look a tokenizer's numbers up."""
    first: dict[int, str] = {}
    later: dict[int, str] = {}
    spaces: list[int] = []
    for token, token_id in tokenizer.get_vocab().items():
        written = token.lstrip("Ġ▁ ")
        if written.isascii() and written.isdigit():
            first[token_id] = written
            if written == token:
                later[token_id] = written
        elif not written and token:
            spaces.append(token_id)

    def is_one_token(number: str) -> bool:
        ids: list[int] = tokenizer(number, add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
        return [first[i] for i in ids if i in first] == [number]

    return NumberTokens(first, later, tuple(sorted(spaces)), all(map(is_one_token, NUMBERS)))


@dataclass(frozen=True)
class _Begun:
    """Digits written so far behind a prompt."""

    row: int
    path: tuple[int, ...]
    written: str
    p: float


@torch.no_grad()
def number_probabilities(
    hf: Any,
    logits: Float[Tensor, "batch d_vocab"],
    cache: Any,
    mask: Tensor,
    tokens: NumberTokens,
    *,
    follow_above: float = FOLLOW_ABOVE,
    chunk: int = 64,
) -> list[dict[str, float]]:
    """Per prompt, the probability of each number from 0 to 100.

    Args:
        logits: of the token behind each prompt.
        cache: keys and values of the prompts, padded on the left. Not changed.
        mask: the prompts' attention mask.
        chunk: rows run at once.
    """
    found: list[dict[str, float]] = [{} for _ in range(len(logits))]
    begun = [_Begun(row, (), "", 1.0) for row in range(len(logits))]
    following: Iterator[Tensor] = iter(logits.float().softmax(-1))
    while begun:
        longer: list[_Begun] = []
        for state, p_next in zip(begun, following, strict=True):
            longer += _extend(state, p_next, tokens, found[state.row], follow_above)
        # equally long paths run together; all of one round are equally long
        begun = longer
        following = _next_probabilities(hf, cache, mask, begun, chunk)
    return found


def _extend(
    state: _Begun, p_next: Tensor, tokens: NumberTokens, found: dict[str, float], follow_above: float
) -> list[_Begun]:
    """Count `state` as far as it ends here; return what it may go on to."""
    digits = tokens.later if state.path else tokens.first
    ids = list(digits)
    p_digit = dict(zip(ids, p_next[ids].tolist(), strict=True))
    if state.written:
        _count(found, state.written, state.p * max(0.0, 1.0 - sum(p_digit.values())))
    longer: list[_Begun] = []
    for token_id, p in p_digit.items():
        written = state.written + digits[token_id]
        if written not in NUMBERS:
            continue
        if state.p * p > follow_above:
            longer.append(_Begun(state.row, (*state.path, token_id), written, state.p * p))
        else:
            _count(found, written, state.p * p)
    if not state.path:
        spaces = zip(tokens.spaces, p_next[list(tokens.spaces)].tolist(), strict=True)
        longer += [_Begun(state.row, (i,), "", state.p * p) for i, p in spaces if state.p * p > follow_above]
    return longer


def _count(found: dict[str, float], written: str, p: float) -> None:
    found[written] = found.get(written, 0.0) + p


def _next_probabilities(
    hf: Any, cache: Any, mask: Tensor, begun: Sequence[_Begun], chunk: int
) -> Iterator[Tensor]:
    """The distribution of the token behind each of `begun`, in order."""
    for start in range(0, len(begun), chunk):
        part = begun[start : start + chunk]
        rows = torch.tensor([state.row for state in part], device=mask.device)
        ids = torch.tensor([state.path for state in part], device=mask.device)
        grown = copy.deepcopy(cache)
        grown.batch_select_indices(rows)
        lengths = mask[rows].sum(-1, keepdim=True)
        output = hf(
            input_ids=ids,
            attention_mask=torch.cat((mask[rows], torch.ones_like(ids)), dim=-1),
            position_ids=lengths + torch.arange(ids.shape[1], device=ids.device),
            past_key_values=grown,
            use_cache=True,
        )
        yield from output.logits[:, -1].float().softmax(-1)
