"""Answers under many fixes, checked against the unsteered answer before anything is decoded.

Under common random numbers an answer is the unsteered one up to the first token at which the edit tells.
So that one, the *draft*, is read under the fix in a single pass, each of its tokens is drawn again with
the number that drew it, and decoding begins at the first that differs, if any does. Nothing is
approximated: it is speculative decoding (Leviathan et al. 2023, Chen et al. 2023) in which the unsteered
model drafts and the coin is shared, so that a token is accepted exactly when it is the one that would
have been drawn.

Two things make it cheap. The blocks before the edit read a draft once for all fixes (see `hooks.alike`).
And a fix that changes the first words anyway is found out on a few of its answers, and then left to plain
decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.units import Fix, Unit, UnitSteering
from persona_probe.hooks.alike import Alike, blocks_before
from persona_probe.model.chat import pad
from persona_probe.model.language_model import LanguageModel, keeps_logits
from persona_probe.model.memory import how_many, logit_bytes

PROBED = 8
"""One in so many answers of a fix tells whether checking the others is worth it."""
WORTH = 0.25
"""Least share of the drafts' tokens that must stand for that."""

MANY = 4
"""Fixes from which on a draft of every answer pays for itself."""

Pick = Callable[[Float[Tensor, "row d_vocab"], Int[Tensor, " row"], Int[Tensor, " row"]], Int[Tensor, " row"]]
"""(logits, which answers they are of, how many tokens those have) to the next token of each."""


def drafted(
    fixes: Sequence[Fix], draw: Callable[[], Sequence[Answer]]
) -> dict[tuple[str, int], Answer] | None:
    """`draw()`, the unsteered answers, by question id and sample; None for fixes too few to be worth it."""
    if sum(map(bool, fixes)) < MANY:
        return None
    return {(answer.question.id, answer.sample): answer for answer in draw()}


def standing(
    lm: LanguageModel,
    units: Sequence[Unit],
    drafts: Mapping[int, Answer],
    picker: Callable[[Sequence[int]], Pick],
    steering: UnitSteering,
    *,
    max_new_tokens: int,
    batch_size: int,
    greedy: bool,
) -> tuple[list[int], list[Unit]]:
    """What of the drafts stands, and what is left to decode.

    `drafts[row]` is the unsteered answer to the same question under the same numbers; a row without one
    is decoded. `picker(rows)` draws for these, known by their places there. Returns the rows whose draft
    stands as a whole, and units of all others, begun as far as theirs does.
    """
    agreed: dict[int, int] = {}
    checked = [
        replace(unit, rows=(row,), begun=drafts[row].token_ids[:-1])
        for unit in units
        if unit.fix
        for row in unit.drawn(greedy=greedy)
        if row in drafts and drafts[row].token_ids
    ]
    of_fix: dict[tuple[int, ...], list[Unit]] = {}
    for one in checked:
        of_fix.setdefault(tuple(id(edit) for edit in one.fix), []).append(one)

    def check(some: Sequence[Unit]) -> None:
        # where edits begin at the same block, more of a pass is shared
        depths = {one.rows[0]: blocks_before(edit.site for edit in one.fix) for one in some}
        for depth in sorted(set(depths.values())):
            # by the length of what is drawn again: as many logits are kept of every row of a pass
            order = sorted(
                (one for one in some if depths[one.rows[0]] == depth),
                key=lambda one: (len(one.begun), len(one.ids)),
            )
            longest = len(order[-1].begun) + 1
            size = how_many(lm, longest * logit_bytes(lm), batch_size)
            for start in range(0, len(order), size):
                agreed.update(_agreed(lm, order[start : start + size], drafts, picker, steering, depth))

    check([one for its in of_fix.values() for one in its[::PROBED]])
    rest: list[Unit] = []
    for its in of_fix.values():
        probed = its[::PROBED]
        stood = sum(agreed[one.rows[0]] for one in probed)
        if stood >= WORTH * sum(len(one.begun) + 1 for one in probed):
            rest += [one for i, one in enumerate(its) if i % PROBED]
    check(rest)
    whole: list[int] = []
    left: list[Unit] = []
    for unit in units:
        fresh: list[int] = []
        for row in unit.rows:
            spokesman = unit.rows[0] if greedy else row
            draft = drafts.get(row)
            stands = agreed.get(spokesman, 0)
            if draft is not None and not unit.fix:
                whole.append(row)
            elif draft is None or not stands:
                fresh.append(row)
            elif stands == len(draft.token_ids) and (not draft.truncated or stands == max_new_tokens):
                whole.append(row)
            else:
                left.append(replace(unit, rows=(row,), begun=draft.token_ids[:stands]))
        if fresh:
            left.append(replace(unit, rows=tuple(fresh)))
    return whole, left


@torch.no_grad()
def _agreed(
    lm: LanguageModel,
    batch: Sequence[Unit],
    drafts: Mapping[int, Answer],
    picker: Callable[[Sequence[int]], Pick],
    steering: UnitSteering,
    unedited: int,
) -> dict[int, int]:
    """How many tokens of each draft the edited model draws too, before the first that it does not."""
    ids, mask, positions = pad([one.read for one in batch], lm.pad_id).to(lm.device)
    rows = [one.rows[0] for one in batch]
    written = [drafts[row].token_ids for row in rows]
    # padding is on the left: the drafts end together
    longest = max(map(len, written))
    target = torch.tensor([[-1] * (longest - len(own)) + list(own) for own in written], device=lm.device)
    lengths = torch.tensor([len(own) for own in written], device=lm.device)
    pick = picker(rows)
    keep = {"logits_to_keep": longest} if keeps_logits(lm.hf) else {}
    alike = Alike(one.read for one in batch)
    with steering.of(batch), alike.sharing(lm.hf, unedited):
        output: Any = lm.hf(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **keep
        )
    logits = output.logits[:, -longest:]
    agreed = torch.zeros_like(lengths)
    going = torch.ones_like(lengths, dtype=torch.bool)
    for column in range(longest):
        step = column - (longest - lengths)
        live = (going & (step >= 0)).nonzero().flatten()
        if not len(live):
            continue
        token = pick(logits[live, column], live, step[live])
        same = token == target[live, column]
        agreed[live[same]] += 1
        going[live[~same]] = False
    return dict(zip(rows, agreed.tolist(), strict=True))
