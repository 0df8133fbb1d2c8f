"""Run a model with interventions, a different set on every row of the batch if wanted.

    with steer(model, fix) as receipt:
        model.generate(prompts)
    receipt.tokens_edited, receipt.mean_norm

Nothing but the activations at the named sites is touched, and the hooks are gone when the block is
left. A plan without an edit (empty, or of gain 0) attaches nothing: the logits are those of the
unsteered model bit for bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from persona_probe.errors import InputError, MismatchError
from persona_probe.hooks import check_site, edit_at
from persona_probe.hooks.sites import causal_lm
from persona_probe.model.language_model import LanguageModel
from persona_probe.steering.bridge_hooks import bridge_hooks
from persona_probe.steering.intervention import Intervention
from persona_probe.steering.kernel import SiteEdit
from persona_probe.steering.matched import RandomMatched
from persona_probe.steering.positions import ForwardReader, may_overlap
from persona_probe.steering.receipt import Receipt

PlannedEdit = Intervention | RandomMatched

_SAME_DIRECTION = 0.9999


@dataclass(frozen=True)
class SteeringPlan:
    """`rows[i]` are the interventions of row i of the batch, in any number; a single entry serves
    every row.

    Interventions at one site all read the unedited activation, and what they move adds up. Raises
    `InputError` for two that fight over one direction at one site, and for random and plain ones
    mixed at one site of a row.
    """

    rows: tuple[tuple[PlannedEdit, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(tuple(row) for row in self.rows))
        checked: set[tuple[int, ...]] = set()
        for number, row in enumerate(self.rows):
            key = tuple(id(edit) for edit in row)
            if key not in checked:
                checked.add(key)
                _check_row(number, row)

    @classmethod
    def of(cls, fix: PlannedEdit | Sequence[PlannedEdit] | SteeringPlan) -> SteeringPlan:
        """A plan that does the same on every row; a plan is returned as it is."""
        if isinstance(fix, SteeringPlan):
            return fix
        return cls((((fix,) if isinstance(fix, PlannedEdit) else tuple(fix)),))

    def take(self, indices: Sequence[int]) -> SteeringPlan:
        """The plan of the rows `indices`, in that order: for a batch that was sorted or cut."""
        if len(self.rows) == 1:
            return self
        return SteeringPlan(tuple(self.rows[i] for i in indices))

    def repeat(self, times: int) -> SteeringPlan:
        """Every row `times` times over, in place."""
        return SteeringPlan(tuple(row for row in self.rows for _ in range(times)))

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """Every one that is used, once."""
        every = (edit for row in self.rows for edit in row)
        plain = (e.intervention if isinstance(e, RandomMatched) else e for e in every)
        return tuple({id(edit): edit for edit in plain}.values())

    @cached_property
    def sites(self) -> dict[str, SiteEdit]:
        """The compiled edit of every site that has one; gain 0 is none."""
        names = dict.fromkeys(edit.site for row in self.rows for edit in row if edit.gain)
        return {
            name: SiteEdit([[e.compiled for e in row if e.site == name and e.gain] for row in self.rows])
            for name in names
        }

    def fwd_hooks(
        self,
        *,
        prompt_lengths: Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
    ) -> list[tuple[str, Callable[..., Any]]]:
        """As `Intervention.fwd_hooks`, for the whole plan."""
        return bridge_hooks(self.sites, prompt_lengths=prompt_lengths, attention_mask=attention_mask)

    def describe(self, site: str) -> str:
        """The edits at one site in words, the first three of them."""
        texts = dict.fromkeys(
            str(edit) for row in self.rows for edit in row if edit.site == site and edit.gain
        )
        shown = "; ".join(list(texts)[:3])
        return shown if len(texts) <= 3 else f"{shown}; and {len(texts) - 3} more"


@contextmanager
def steer(
    lm: LanguageModel,
    fix: PlannedEdit | Sequence[PlannedEdit] | SteeringPlan,
    *,
    prompt_lengths: Sequence[int] | None = None,
) -> Generator[Receipt, None, None]:
    """Apply `fix` to every forward pass of `lm` inside the block, in prefill and in decoding.

    Pass the attention mask where there is padding, as always. `prompt_lengths` counts each row's
    real prompt tokens; it is found by itself in generation, and needed in a pass over prompt and
    answer at once (else all of it is prompt). Models that share weights with `lm` are not steered.
    Blocks nest: the inner one edits what the outer one left.

    Raises `UnknownSiteError`, `MismatchError` (width, number of rows), and `NotFiredError` on
    leaving the block when nothing was steered though something should have been.
    """
    plan = SteeringPlan.of(fix)
    if prompt_lengths is not None and any(length < 1 for length in prompt_lengths):
        raise InputError(f"prompt lengths must be at least 1, got {list(prompt_lengths)}")
    for edit in plan.interventions:
        check_site(lm.hf, edit.site)
        if edit.target.d_model != lm.d_model:
            raise MismatchError(
                f"{edit} acts on width {edit.target.d_model}, {lm.name} has width {lm.d_model}",
                fix="use a fix made for this model",
            )
    receipt = Receipt({site: plan.describe(site) for site in plan.sites}, len(plan.rows))
    with ExitStack() as stack:
        if plan.sites:
            decoder = _decoder(lm.hf)
            reader = ForwardReader(
                rows=len(plan.rows), prompt_lengths=prompt_lengths, pad_id=_distinct_pad_id(lm)
            )
            names = list(inspect.signature(decoder.forward).parameters)

            def follow(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                reader.read(names, args, kwargs)

            handle = decoder.register_forward_pre_hook(follow, with_kwargs=True)
            stack.callback(handle.remove)
            edits = {name: _edit(name, edit, reader, receipt) for name, edit in plan.sites.items()}
            stack.enter_context(edit_at(lm.hf, edits))
        yield receipt
    receipt.check()


def _edit(site: str, edit: SiteEdit, reader: ForwardReader, receipt: Receipt) -> Callable[[Tensor], Tensor]:
    def apply(x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        tokens = reader.tokens
        if tokens is None or tokens.position.shape != x.shape[:2]:
            raise MismatchError(
                f"activations of shape {tuple(x.shape)} came to {site}, not of the tokens that the "
                "model was given",
                fix="call the model itself, not one of its blocks",
            )
        edited, firing = edit.apply(x, tokens)
        receipt.record(site, x.shape[0], firing)
        return edited

    return apply


def _decoder(hf_model: nn.Module) -> nn.Module:
    """The module that is given the ids and the mask in every use: the causal model's body."""
    body: nn.Module = causal_lm(hf_model).base_model  # type: ignore[assignment]
    return body


def _distinct_pad_id(lm: LanguageModel) -> int | None:
    """The id that generate feeds to finished rows, where it can mean nothing else."""
    has_pad = lm.tokenizer.pad_token_id is not None
    return lm.pad_id if has_pad and lm.pad_id not in lm.eos_ids else None


def _check_row(number: int, row: Sequence[PlannedEdit]) -> None:
    by_site: dict[str, list[PlannedEdit]] = {}
    for edit in row:
        by_site.setdefault(edit.site, []).append(edit)
    for site, edits in by_site.items():
        random = [edit for edit in edits if isinstance(edit, RandomMatched)]
        if random and (
            len(random) < len(edits) or any(not torch.equal(edit.vector, random[0].vector) for edit in random)
        ):
            raise InputError(
                f"row {number}: a random direction stands for all the edits at {site}, or none",
                fix="make the null of the whole fix: matched_random(fix, generator)",
            )
        if random:
            edits = [edit.intervention for edit in random]
        _check_apart(number, [e for e in edits if isinstance(e, Intervention)])


def _check_apart(number: int, edits: Sequence[Intervention]) -> None:
    for i, one in enumerate(edits):
        for other in edits[i + 1 :]:
            if not may_overlap(one.positions, other.positions):
                continue
            if one.target.d_model != other.target.d_model:
                raise MismatchError(f"row {number}: {one} and {other} differ in width")
            cosines = one.target.unit @ other.target.unit.T
            if float(cosines.abs().max()) > _SAME_DIRECTION:
                raise InputError(
                    f"row {number}: two edits act on the same direction at the same tokens: {one}, "
                    f"and {other}",
                    fix="keep one of them, or nest two steer blocks to do one after the other",
                )
