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
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from persona_probe.errors import InputError, MismatchError
from persona_probe.hooks import check_site, edit_at
from persona_probe.hooks.sites import causal_lm
from persona_probe.model.language_model import LanguageModel
from persona_probe.steering.bridge_hooks import bridge_hooks
from persona_probe.steering.conflicts import PlannedEdit, check_row
from persona_probe.steering.following import ForwardReader, prompt_lengths_of
from persona_probe.steering.intervention import Intervention
from persona_probe.steering.kernel import Seen, SiteEdit
from persona_probe.steering.matched import RandomMatched
from persona_probe.steering.positions import BY_THOUGHT, UNKNOWN
from persona_probe.steering.receipt import Receipt
from persona_probe.steering.shadow import Shadow

__all__ = ["PlannedEdit", "RowMemory", "Steering", "SteeringPlan", "steer"]


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
                check_row(number, row)

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


class RowMemory(NamedTuple):
    """What a row has been through, where its edits depend on it: a thought, a decision on the prompt."""

    thought: int = UNKNOWN
    highest: Mapping[str, Float[Tensor, " latent"]] = {}
    """By site, the highest amounts in its prompt."""


class Steering:
    """A plan on a model, for a loop of one's own in which the batch changes: what `steer` is made of.

    with Steering(lm, plan, prompt_lengths=lengths) as steering:
        ...                       # the prompts, in one pass or in chunks
        steering.select(rows)     # whenever the cache is: cache.batch_select_indices(rows)
        ...

    Where rows of several batches come together, take `remembered()` of each and give all of them to
    the next `Steering`. Leaving the block takes the hooks away; `receipt.check()` is the caller's. Raises
    `UnknownSiteError`, and `MismatchError` for a fix of another width or a tokenizer without the
    marks of a thought.
    """

    def __init__(
        self,
        lm: LanguageModel,
        fix: PlannedEdit | Sequence[PlannedEdit] | SteeringPlan,
        *,
        prompt_lengths: Sequence[int] | None = None,
        kl: bool = False,
        remembered: Sequence[RowMemory] | None = None,
    ) -> None:
        plan = SteeringPlan.of(fix)
        if not isinstance(lm, LanguageModel):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(
                f"a LanguageModel is steered, not a {type(lm).__name__}",
                fix="lm = load_model(model, tokenizer=tokenizer), and run lm.hf inside the block",
            )
        if prompt_lengths is not None and any(length < 1 for length in prompt_lengths):
            raise InputError(f"prompt lengths must be at least 1, got {list(prompt_lengths)}")
        for edit in plan.interventions:
            check_site(lm.hf, edit.site)
            if edit.target.d_model != lm.d_model:
                raise MismatchError(
                    f"{edit} acts on width {edit.target.d_model}, {lm.name} has width {lm.d_model}",
                    fix="use a fix made for this model",
                )
        self._lm = lm
        self._sites = dict(plan.sites)
        self._seen = {name: Seen() for name in self._sites}
        if remembered is not None:
            for name, edit in self._sites.items():
                rows = [remembered[i].highest.get(name) for i in edit.edited(len(remembered))]
                self._seen[name] = Seen.of_rows(rows)
        follows = any(edit.positions in BY_THOUGHT for edit in plan.interventions)
        self._reader = ForwardReader(
            rows=len(plan.rows),
            prompt_lengths=prompt_lengths,
            pad_id=_distinct_pad_id(lm),
            marks=_marks(lm) if follows else None,
            remembers=any(edit.remembers for edit in self._sites.values()),
            thoughts=None if remembered is None else [row.thought for row in remembered],
        )
        self._shadow = Shadow() if kl and self._sites else None
        self._leaving = ExitStack()
        self.receipt = Receipt({site: plan.describe(site) for site in plan.sites}, len(plan.rows), kl=kl)
        """What was done so far, by row of the plan (of the first batch, where one entry serves all)."""

    def __enter__(self) -> Steering:
        if self._sites:
            with ExitStack() as stack:
                self._attach(stack)
                self._leaving = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.close()

    def select(self, rows: Sequence[int] | Tensor) -> None:
        """From now on row i of the batch is what was row `rows[i]`: prompts repeated for their
        samples, rows that ended dropped, as in `cache.batch_select_indices(rows)`.
        """
        batch = self._reader.batch
        if not self._sites or batch is None:
            return
        kept = torch.as_tensor(rows, dtype=torch.long).cpu()  # where a plan and a receipt number rows
        for name, edit in self._sites.items():
            self._sites[name] = edit.take(kept, batch, self._seen[name])
        self._reader.select(kept, next(iter(self._sites.values())).n_rows)
        self.receipt.select(kept, batch)
        if self._shadow is not None:
            self._shadow.select(kept)

    def remembered(self) -> list[RowMemory]:
        """What each row of the last pass has been through."""
        batch = self._reader.batch or 0
        thoughts = self._reader.thoughts
        highest: list[dict[str, Tensor]] = [{} for _ in range(batch)]
        for name, edit in self._sites.items():
            for place, row in enumerate(edit.edited(batch) if batch else ()):
                found = self._seen[name].of_row(place)
                if found is not None:
                    highest[row][name] = found
        states = [UNKNOWN] * batch if thoughts is None else thoughts.tolist()
        return [RowMemory(state, found) for state, found in zip(states, highest, strict=True)]

    def _attach(self, stack: ExitStack) -> None:
        hf = self._lm.hf
        decoder = _decoder(hf)
        names = list(inspect.signature(decoder.forward).parameters)

        def follow(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._muted:
                self._reader.read(names, args, kwargs)

        stack.callback(decoder.register_forward_pre_hook(follow, with_kwargs=True).remove)
        stack.enter_context(edit_at(hf, {name: self._edit(name) for name in self._sites}))
        stack.enter_context(self._announcing(hf))
        if self._shadow is not None:
            stack.enter_context(self._shadow.beside(causal_lm(hf), self._compare))

    @property
    def _muted(self) -> bool:
        return self._shadow is not None and self._shadow.running

    def _edit(self, site: str) -> Callable[[Tensor], Tensor]:
        def apply(x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
            if self._muted:
                return x
            tokens = self._reader.tokens
            if tokens is None or tokens.shape != x.shape[:2]:
                raise MismatchError(
                    f"activations of shape {tuple(x.shape)} came to {site}, not of the tokens that the "
                    "model was given",
                    fix="call the model itself, not one of its blocks",
                )
            edited, firing = self._sites[site].apply(x, tokens, self._seen[site])
            self.receipt.record(site, x.shape[0], firing)
            return edited

        return apply

    def _compare(self, kl: Float[Tensor, "batch pos"]) -> None:
        """Count the divergence at the tokens that produce the response."""
        tokens = self._reader.tokens
        assert tokens is not None
        counted = tokens.select("response")
        every = torch.ones_like(kl, dtype=torch.bool)
        self.receipt.record_kl(kl, every if counted is None else counted[:, -kl.shape[1] :].to(kl.device))

    @contextmanager
    def _announcing(self, hf: Any) -> Generator[None, None, None]:
        """`generate` knows where the prompts end, which its passes do not say (chunks of a prefill,
        drafts of an assistant): it is asked on its way in.
        """
        generate, own = hf.generate, vars(hf).get("generate")

        def announced(inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            with self._reader.generating(prompt_lengths_of(inputs, kwargs, _distinct_pad_id(self._lm))):
                return generate(inputs, *args, **kwargs)

        hf.generate = announced
        try:
            yield
        finally:
            if own is None:
                del hf.generate
            else:
                hf.generate = own


@contextmanager
def steer(
    lm: LanguageModel,
    fix: PlannedEdit | Sequence[PlannedEdit] | SteeringPlan,
    *,
    prompt_lengths: Sequence[int] | None = None,
    kl: bool = False,
) -> Generator[Receipt, None, None]:
    """Apply `fix` to every forward pass of `lm` inside the block, in prefill and in decoding.

    Pass the attention mask where there is padding, as always. `prompt_lengths` counts each row's
    real prompt tokens; it is found by itself in generation, and needed in a pass over prompt and
    answer at once (else all of it is prompt) and in a prefill in chunks of one's own. `kl` runs
    every pass a second time without the edits, and the receipt says how far they moved the
    next-token distribution. Models that share weights with `lm` are not steered. Blocks nest: the
    inner one edits what the outer one left.

    Raises `UnknownSiteError`, `MismatchError` (width, number of rows, a batch that changes on the way
    under edits that must know its rows), and `NotFiredError` on leaving the block when nothing was
    steered though something should have been.
    """
    with Steering(lm, fix, prompt_lengths=prompt_lengths, kl=kl) as steering:
        yield steering.receipt
    steering.receipt.check()


def _decoder(hf_model: nn.Module) -> nn.Module:
    """The module that is given the ids and the mask in every use: the causal model's body."""
    body: nn.Module = causal_lm(hf_model).base_model  # type: ignore[assignment]
    return body


def _distinct_pad_id(lm: LanguageModel) -> int | None:
    """The id that generate feeds to finished rows, where it can mean nothing else."""
    has_pad = lm.tokenizer.pad_token_id is not None
    return lm.pad_id if has_pad and lm.pad_id not in lm.eos_ids else None


def _marks(lm: LanguageModel) -> tuple[int, int]:
    """The token ids of `<think>` and `</think>`."""
    vocabulary = lm.tokenizer.get_vocab()
    found = [vocabulary.get(mark) for mark in ("<think>", "</think>")]
    opens, closes = found
    if opens is None or closes is None:
        raise MismatchError(
            f"the tokenizer of {lm.name} has no tokens <think> and </think> to tell a thought by",
            fix='positions="response"',
        )
    return opens, closes
