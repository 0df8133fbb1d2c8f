"""What is followed through training: named latents and directions, read on fixed texts.

    watch = Watch.of(base, [probe], questions)      # the base's own greedy answers, read once
    watch.amounts(model)                            # {"villain": 0.31}

The texts are the same for every model and step, so that two readings differ by the weights alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from persona_probe.activations.masks import TokenMask
from persona_probe.activations.stream import batch_tokens_for, buckets
from persona_probe.artifact import digest_of
from persona_probe.errors import InputError
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.sampling import respond_greedy, transcripts
from persona_probe.hooks import capture_at, check_site
from persona_probe.model.chat import Rendered, pad
from persona_probe.model.language_model import LanguageModel
from persona_probe.sae.load import Dictionary
from persona_probe.steering.target import Read, Target, latents


@dataclass(frozen=True, eq=False)
class Probe:
    """A latent or a direction at a site. Raises `InputError` for more than one."""

    name: str
    site: str
    """Hook name."""
    target: Target

    def __post_init__(self) -> None:
        if self.target.n_latents != 1:
            raise InputError(f"a probe follows one latent or direction, not {self.target.n_latents}")

    @classmethod
    def latent(cls, dictionary: Dictionary, index: int, name: str | None = None) -> Probe:
        """The activation of one latent."""
        return cls(name or f"latent {index}", dictionary.site, latents(dictionary, [index]))

    @property
    def read(self) -> Read:
        """By the encoder where there is one, else by projection on the unit direction."""
        return "projection" if self.target.encoder is None else "encoder"


@dataclass(frozen=True, eq=False)
class Watch:
    """Probes and the texts that they are read on."""

    probes: tuple[Probe, ...]
    texts: tuple[Rendered, ...] = field(repr=False)
    """Prompts with answers."""
    counted: tuple[tuple[bool, ...], ...] = field(repr=False)
    """Which of their tokens count."""
    pad_id: int
    base: Mapping[str, float]
    """The amounts in the base."""

    @classmethod
    def of(
        cls,
        base: LanguageModel,
        probes: Sequence[Probe],
        questions: Sequence[Question],
        *,
        mask: TokenMask | None = None,
        max_new_tokens: int = 48,
    ) -> Watch:
        """On the base's greedy answers to `questions`; by default over the tokens of the Δ latent.

        Raises `InputError` for nothing to follow or to ask, `UnknownSiteError`.
        """
        if not probes or not questions:
            raise InputError("to watch training takes at least one probe and one question")
        names = [probe.name for probe in probes]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise InputError(
                f"two probes have the same name, {twice[0]!r}", fix="give every probe a name of its own"
            )
        for probe in probes:
            check_site(base.hf, probe.site)
        texts = transcripts(base, respond_greedy(base, questions, max_new_tokens=max_new_tokens))
        chosen = mask or TokenMask("answer")
        counted = tuple(tuple(chosen.select(text, base.special_ids)) for text in texts)
        blank = cls(tuple(probes), tuple(texts), counted, base.pad_id, {})
        return cls(blank.probes, blank.texts, counted, base.pad_id, blank.amounts(base.hf))

    @cached_property
    def digest(self) -> str:
        """Of the probes, and of the texts and tokens that they are read on."""
        probes = [(one.name, one.site, one.target) for one in self.probes]
        return digest_of([probes, [text.ids for text in self.texts], self.counted])

    @cached_property
    def _groups(self) -> list[list[int]]:
        used = [i for i, marks in enumerate(self.counted) if any(marks)]
        groups = buckets([len(self.texts[i]) for i in used], batch_tokens_for(torch.device("cpu")))
        return [[used[i] for i in group] for group in groups]

    @torch.no_grad()
    def amounts(self, model: nn.Module) -> dict[str, float]:
        """Each probe's amount, a mean over counted tokens, then over texts.

        The model is read in evaluation mode (so edits made in training only are off) and left as it
        was; no random number is drawn.
        """
        device = next(model.parameters()).device
        sums = {probe.name: 0.0 for probe in self.probes}
        training = model.training
        model.eval()
        try:
            with capture_at(model, list({probe.site for probe in self.probes})) as captured:
                for group in self._groups:
                    batch = pad([self.texts[i] for i in group], self.pad_id, side="right").to(device)
                    captured.run(lambda batch=batch: model(**batch._asdict(), use_cache=False))
                    counts = self._counts(group, batch.input_ids.shape[1]).to(device)
                    for probe in self.probes:
                        z = probe.target.amounts(captured[probe.site].float(), probe.read)[..., 0]
                        sums[probe.name] += float(((z * counts).sum(dim=-1) / counts.sum(dim=-1)).sum())
        finally:
            model.train(training)
        texts = sum(map(len, self._groups))
        return {name: total / texts for name, total in sums.items()}

    def shifts(self, model: nn.Module) -> dict[str, float]:
        """`amounts` minus the base's."""
        return {name: amount - self.base[name] for name, amount in self.amounts(model).items()}

    def _counts(self, group: Sequence[int], width: int) -> Tensor:
        counts = torch.zeros(len(group), width)
        for row, i in enumerate(group):
            counts[row, : len(self.counted[i])] = torch.tensor(self.counted[i], dtype=torch.float32)
        return counts
