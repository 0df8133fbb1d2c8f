"""Defences at work inside a training run: the base read beside the model, penalties, edits.

At every step, in this order: the base reads the batch (without gradient, in evaluation mode, the
adapter switched off; for a full fine-tune a frozen copy, which costs the memory of one); the model in
training reads it; the penalties compare the two. The edits are there in training mode only, so the
base, and whoever evaluates between steps, sees none of them, and gradient checkpointing, which
runs blocks again, sees all.

Not covered: several devices in one process (`DataParallel`), which would copy hooks and not run them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from types import TracebackType
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from peft import PeftModel
from torch import Tensor, nn

from persona_probe.errors import MismatchError
from persona_probe.hooks import Captured, blocks_of, capture_at, check_site, edit_at
from persona_probe.hooks.sites import parse_site
from persona_probe.steering.kernel import SiteEdit
from persona_probe.steering.plan import SteeringPlan
from persona_probe.steering.positions import RowTokens, row_tokens
from persona_probe.training.defences.defence import Defence, Reading
from persona_probe.training.example import IGNORED

Batch = Mapping[str, Tensor]


class Defending:
    """The active ones of `defences` on `model`, within a `with` block around the training loop.

    Raises `UnknownSiteError` and `MismatchError` on entering, for sites and directions of another model.
    """

    def __init__(self, model: nn.Module, defences: Sequence[Defence], *, bf16: bool = False) -> None:
        self._model = model
        self._bf16 = bf16
        active = [one for one in defences if one.strength != 0]
        penalising = [one for one in active if one.penalises]
        n_layers = len(blocks_of(model)) if penalising else 0
        self._penalising = [(one, one.sites(n_layers)) for one in penalising]
        self._reads_logits = any(one.reads_logits for one in penalising)
        self._sites = sorted({site for _, sites in self._penalising for site in sites}, key=parse_site)
        self._edits = SteeringPlan.of([edit for one in active for edit in one.interventions()])
        self._frozen: nn.Module | None = None
        self._captured: Captured | None = None
        self._tokens: RowTokens | None = None
        self._leaving = ExitStack()
        self.terms: dict[str, list[float]] = {one.name: [] for one in penalising}
        """The penalties of the steps since they were last asked for."""

    @property
    def idle(self) -> bool:
        """Whether no defence touches the steps themselves."""
        return not (self._penalising or self._edits.sites)

    def __enter__(self) -> Defending:
        width = cast("Any", self._model).config.get_text_config().hidden_size
        for edit in self._edits.interventions:
            check_site(self._model, edit.site)
            if edit.target.d_model != width:
                raise MismatchError(f"{edit} acts on width {edit.target.d_model}, the model has {width}")
        with ExitStack() as stack:
            if self._penalising and not isinstance(self._model, PeftModel):
                self._frozen = copy.deepcopy(self._model).eval().requires_grad_(False)
            edits = {site: self._edit(edit) for site, edit in self._edits.sites.items()}
            if edits:
                stack.enter_context(edit_at(self._model, edits))
            if self._sites:  # behind the edits: what is penalised is what training sees
                reading = capture_at(self._model, self._sites, stop_after_deepest=False)
                self._captured = stack.enter_context(reading)
            self._leaving = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.close()
        self._frozen = None

    def begin(self, batch: Batch, real: Bool[Tensor, "batch pos"]) -> Reading | None:
        """Before the model reads a batch: say where its tokens stand, and read it with the base."""
        counted = batch["labels"] != IGNORED
        if self._edits.sites:
            # the prompt ends where the answer that is learnt begins
            ends = counted.int().argmax(dim=-1).clamp(min=1)
            self._tokens = row_tokens(
                *real.shape, attention_mask=real, device=real.device, prompt_lengths=ends
            )
        return self._base_reading(batch, real, _producing(counted)) if self._penalising else None

    def penalty(self, base: Reading, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, ""]:
        """The sum of all penalties, a mean over the batch's tokens."""
        activations = {} if self._captured is None else dict(self._captured)
        now = Reading(base.real, base.producing, activations, logits)
        terms = [one.penalty(_at(now, sites), _at(base, sites)) for one, sites in self._penalising]
        for (one, _), term in zip(self._penalising, terms, strict=True):
            self.terms[one.name].append(float(term.detach()))
        return torch.stack(terms).sum()

    def told(self) -> dict[str, float]:
        """The mean of each penalty since this was last asked, for the trainer's logs."""
        means = {f"penalty/{name}": sum(terms) / len(terms) for name, terms in self.terms.items() if terms}
        for terms in self.terms.values():
            terms.clear()
        return means

    def _edit(self, edit: SiteEdit) -> Callable[[Tensor], Tensor]:
        def apply(x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
            if not self._model.training:
                return x
            assert self._tokens is not None
            return edit.apply(x, self._tokens)[0]

        return apply

    @torch.no_grad()
    def _base_reading(self, batch: Batch, real: Tensor, producing: Tensor) -> Reading:
        with self._base() as model, _autocast(real.device, self._bf16):

            def forward() -> Any:
                return model(input_ids=batch["input_ids"], use_cache=False)

            if not self._sites:
                return Reading(real, producing, {}, forward().logits)
            with capture_at(model, self._sites, stop_after_deepest=not self._reads_logits) as captured:
                output = captured.run(forward)
                return Reading(real, producing, dict(captured), getattr(output, "logits", None))

    @contextmanager
    def _base(self) -> Generator[nn.Module, None, None]:
        if self._frozen is not None:
            yield self._frozen
            return
        model = cast(PeftModel, self._model)
        training = model.training
        model.eval()
        try:
            with model.disable_adapter():
                yield model
        finally:
            model.train(training)


def _producing(counted: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """The tokens before those that are counted."""
    return torch.nn.functional.pad(counted[:, 1:], (0, 1))


def _at(reading: Reading, sites: Sequence[str]) -> Reading:
    return replace(reading, activations={site: reading.activations[site] for site in sites})


def _autocast(device: torch.device, bf16: bool) -> Any:
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
