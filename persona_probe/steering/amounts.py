"""How strongly the targets of a fix are there, token by token, in texts that were written before.

    read = read_amounts(lm, fix, conversations, steered=True)
    read.amounts[0]             # [pos, latent] of the first conversation
    read.receipt.edits          # what the fix did there

A latent is read by its encoder, whatever the operation reads it by: that is its activation, 0 where
it is silent. A plain direction is read by projection. Under the fix the *edited* stream is read, so
that what a cap pressed down is seen pressed down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from persona_probe.errors import InputError, MismatchError
from persona_probe.hooks import capture_at, check_site
from persona_probe.model.chat import Rendered, pad
from persona_probe.model.language_model import LanguageModel
from persona_probe.steering.intervention import Intervention
from persona_probe.steering.plan import SteeringPlan, steer
from persona_probe.steering.receipt import Receipt
from persona_probe.steering.target import Read


@dataclass(frozen=True)
class Gauge:
    """One number that is read at every token."""

    label: str
    site: str
    read: Read
    """`encoder`: an activation, from 0. `projection`: of either sign, with no zero of its own."""


@dataclass(frozen=True, eq=False)
class Amounts:
    """What `read_amounts` found."""

    gauges: tuple[Gauge, ...]
    amounts: tuple[Float[Tensor, "_ latent"], ...]
    """Per conversation `[pos, latent]`, on the CPU in fp32; the columns are those of `gauges`."""
    receipt: Receipt
    """One row per conversation; without an edit when nothing was steered."""


def gauges_of(fix: Sequence[Intervention]) -> tuple[Gauge, ...]:
    """What is read for a fix: every latent or direction of its targets, in its order."""
    return tuple(
        Gauge(_label(edit, column), edit.site, _read(edit))
        for edit in fix
        for column in range(edit.target.n_latents)
    )


@torch.no_grad()
def read_amounts(
    lm: LanguageModel,
    fix: Sequence[Intervention],
    conversations: Sequence[Rendered],
    *,
    steered: bool = False,
) -> Amounts:
    """Read the targets of `fix` at every token of `conversations` (one batch), with `fix` applied if
    `steered`.

    The forward pass ends behind the deepest site. Raises `InputError` when there is nothing to
    read, and what `steer` raises.
    """
    if not fix or not conversations:
        raise InputError("nothing to read: give at least one intervention and one conversation")
    check_fits(lm, fix)
    batch = pad(conversations, lm.pad_id, side="right")
    plan = SteeringPlan(tuple(tuple(fix) if steered else () for _ in conversations))
    ids, mask, positions = batch.to(lm.device)
    prompt_lengths = [conversation.prompt_length for conversation in conversations]
    with (
        lm.active() as hf,
        steer(lm, plan, prompt_lengths=prompt_lengths) as receipt,
        capture_at(hf, list(dict.fromkeys(edit.site for edit in fix))) as captured,
    ):
        captured.run(lambda: hf(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False))
        read = [edit.target.amounts(captured[edit.site].float(), _read(edit)) for edit in fix]
    every = torch.cat([amounts.cpu() for amounts in read], dim=-1)
    return Amounts(
        gauges_of(fix),
        tuple(every[row, : len(conversation)] for row, conversation in enumerate(conversations)),
        receipt,
    )


def check_fits(lm: LanguageModel, fix: Sequence[Intervention]) -> None:
    """Raise `UnknownSiteError` or `MismatchError` where a fix was made for another model."""
    for edit in fix:
        check_site(lm.hf, edit.site)
        if edit.target.d_model != lm.d_model:
            raise MismatchError(
                f"{edit} acts on width {edit.target.d_model}, {lm.name} has width {lm.d_model}",
                fix="use a fix made for this model",
            )


def _read(edit: Intervention) -> Read:
    return "projection" if edit.target.encoder is None else "encoder"


def _label(edit: Intervention, column: int) -> str:
    target = edit.target
    if target.n_latents == 1:
        return str(target)
    which = f"latent {target.indices[column]}" if target.indices is not None else f"direction {column + 1}"
    return f"{target.label}: {which}" if target.label else which
