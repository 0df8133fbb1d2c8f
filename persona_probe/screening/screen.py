"""The screen: which latents, sets and directions cause the behaviour, cheap stages first.

1. candidates: at every site, latents by |Δ| and by |difference in differences|, rising and falling;
2. attribution: one backward pass ranks them all (first order);
3. margin: the exact edit, teacher-forced, on every survivor; sets of up to five grow greedily from the
   best, within a block or across blocks, at gain 1 (necessity) and at gain 2 (control), on every token
   and on the last prompt token;
4. generation and judge, only for what is left: dose-response of the cure in the tuned model and of
   inducing in the base, settings chosen under an incoherence budget, in a race (see `racing`).

Difference-of-means directions, which need no dictionary, run through the same stages beside the latents.
All of it sees calibration questions only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import torch

from persona_probe.model.language_model import LanguageModel
from persona_probe.model.pair import ModelPair
from persona_probe.screening.attribution import attributions
from persona_probe.screening.calibrate import (
    NECESSITY,
    Bench,
    Budget,
    Dose,
    Knob,
    Rates,
    about_as_good,
    cures,
    inductions,
    value,
    whole,
)
from persona_probe.screening.candidate import Candidate, Carrier
from persona_probe.screening.evidence import SiteEvidence, mean_differences
from persona_probe.screening.margin import Contrast, restored

Progress = Callable[[str], None]
TRIED = tuple(Knob(gain, where) for where in ("all", "last_prompt") for gain in (1.0, 2.0))
"""Without generation: necessity and control, on every token and where it is decided who speaks."""


@dataclass(frozen=True)
class ScreenSettings:
    """How wide to search and how much incoherence to accept."""

    per_ranking: int = 16
    """Latents taken from each ranking at each site."""
    after_attribution: int = 24
    """Latents that go on to the margin stage."""
    after_margin: int = 5
    """Single latents that go on to generation."""
    directions: int = 2
    """Differences of means that go on to generation, plain and benign-corrected each."""
    set_size: int = 5
    """Largest set."""
    set_pool: int = 12
    """Latents a set may be made of."""
    cure_incoherence: float = 0.04
    """Incoherent answers a cure may add to the tuned model's."""
    skill_kept: float = 0.9
    """Share of the tuned model's taught skill that a cure must keep."""
    induce_incoherence: float = 0.10
    """Incoherent answers an induced base model may give."""
    set_gain: float = 0.002
    """Least improvement (nats per token of the base's answers) that a third or later member must bring."""


@dataclass(frozen=True, eq=False)
class Finding:
    """What is known of one candidate after the last stage."""

    candidate: Candidate
    cure: Dose
    induce: Dose
    attribution: float | None
    """Estimated change of the margin, nats per token; None where not estimated."""
    restored: float | None
    """Log-probability of the base's answers under the cure, nats per token (margin stage)."""

    @property
    def necessity(self) -> Rates:
        """Rates at gain 1 on every token: brought back to the base's level and no further."""
        return next(s.rates for s in self.cure.settings if s.knob == NECESSITY)


@dataclass(frozen=True, eq=False)
class Screen:
    """Findings best first, by kind, with the rates they are to be compared with.

    Latents are ranked by necessity (whole answers at gain 1), the only evidence that a latent carries the
    behaviour; sets and directions by control.
    """

    latents: tuple[Finding, ...]
    sets: tuple[Finding, ...]
    directions: tuple[Finding, ...]
    base: Rates
    tuned: Rates
    """Calibration rates without any edit."""
    budget: Budget
    """What a cure was allowed to cost."""
    stages: dict[str, int]
    """How many candidates each stage looked at."""

    @property
    def headline(self) -> tuple[Finding, ...]:
        """The first latent, the latent that cures best (often the same), the best set and direction."""
        curing = sorted(self.latents, key=_merit, reverse=True)[:1]
        every = [*self.latents[:1], *curing, *self.sets[:1], *self.directions[:1]]
        return tuple(dict.fromkeys(every))

    @property
    def best(self) -> Finding | None:
        """The gentlest headline about as good as the one with most whole answers.

        Of those within the budget, where any is; the one with fewer parts where two are equally strong.
        """
        allowed = [one for one in self.headline if one.cure.best.within_budget] or list(self.headline)
        if not allowed:
            return None
        top = max(allowed, key=_merit).cure.best.result
        close = [one for one in allowed if about_as_good(one.cure.best.result, top)]
        return min(close, key=lambda one: (one.cure.best.knob.strength, len(one.candidate.carriers)))

    def _repr_html_(self) -> str:
        passed = " → ".join(f"{count} {stage}" for stage, count in self.stages.items())
        facts = (
            f"{passed}. Calibration questions: base {self.base['misaligned']} and tuned "
            f"{self.tuned['misaligned']} with the trait"
        )
        head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
        every = (*self.latents, *self.sets, *self.directions)
        rows = "".join(_row(one, chosen=one is self.best) for one in every)
        return f"<p>{escape(facts)}</p><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def screen(
    pair: ModelPair,
    evidence: Sequence[SiteEvidence],
    contrasts: Sequence[Contrast],
    bench: Bench,
    *,
    settings: ScreenSettings | None = None,
    progress: Progress | None = None,
) -> Screen:
    """Find what causes the tuned model's behaviour; see the module's text.

    Args:
        evidence: one entry per site, with a dictionary where there is one.
        contrasts: calibration prompts on which the models differ in the trait.
        bench: calibration questions, sampling and judge.

    Raises:
        InputError: no contrast.
    """
    how = settings or ScreenSettings()
    tell = progress or (lambda _: None)
    carriers = [site.latent(index) for site in evidence for index in site.candidates(how.per_ranking)]
    stages = {"candidates": len(carriers)}

    tell(f"attribution of {len(carriers)} latents")
    effects = attributions(pair.tuned, contrasts, carriers) if carriers else torch.zeros(0)
    order = torch.argsort(effects)[: how.after_attribution].tolist()
    kept = [carriers[i] for i in order]
    stages["attribution"] = len(kept)

    tell(f"margin of {len(kept)} latents")
    singles = [Candidate("latent", (carrier,)) for carrier in kept]
    scores = _restored(pair.tuned, contrasts, singles)
    ranked = sorted(range(len(singles)), key=lambda i: -scores[i])
    pool = [kept[i] for i in ranked[: how.set_pool]]
    survivors = [singles[i] for i in ranked[: how.after_margin]]
    stages["margin"] = len(kept)

    tell("growing sets")
    sets = _unique([_grow(pair.tuned, contrasts, pool, knob, how) for knob in TRIED])
    benign = any(site.benign_means for site in evidence)
    directions = _best_of(pair.tuned, contrasts, mean_differences(evidence, corrected=False), how.directions)
    if benign:
        corrected = mean_differences(evidence, corrected=True)
        directions += _best_of(pair.tuned, contrasts, corrected, how.directions)

    everything = [*survivors, *sets, *directions]
    stages["generation"] = len(everything)
    tell(f"generating under {len(everything)} candidates")
    tuned, base = (bench.arms(lm, [()])[0] for lm in (pair.tuned, pair.base))
    bench = bench.knowing((pair.tuned, tuned.answers), (pair.base, base.answers))
    budget = Budget(
        value(tuned.rates, "incoherent") + how.cure_incoherence,
        how.skill_kept * value(tuned.rates, "skill"),
    )
    cured = cures(pair.tuned, everything, bench, budget)
    tell(f"inducing with {len(everything)} candidates")
    general = bench.on([q for q in bench.questions if q.role == "general"], bench.sampling.samples)
    induced = inductions(pair.base, everything, general, Budget(how.induce_incoherence))
    estimated = {c.label: float(e) for c, e in zip(carriers, effects, strict=True)}
    reached = {c.label: s for c, s in zip(singles, scores, strict=True)}
    findings = [
        Finding(c, cure, induce, estimated.get(c.label), reached.get(c.label))
        for c, cure, induce in zip(everything, cured, induced, strict=True)
    ]

    def of(kind: str) -> tuple[Finding, ...]:
        return tuple(sorted((f for f in findings if f.candidate.kind == kind), key=_merit, reverse=True))

    latents = tuple(sorted(of("latent"), key=_carries, reverse=True))
    return Screen(
        latents,
        of("set"),
        of("difference of means"),
        base.rates,
        tuned.rates,
        budget,
        stages,
    )


_COLUMNS = ("", "", "left at gain 1", "left as set", "incoherent", "setting", "induced in the base")


def _row(finding: Finding, *, chosen: bool) -> str:
    cure, induced = finding.cure.best, finding.induce.best.rates["misaligned"]
    knob = f"gain {cure.knob.strength:g}, {cure.knob.positions}"
    cells = (
        finding.candidate.kind,
        finding.candidate.label + (" (chosen)" if chosen else ""),
        finding.necessity["misaligned"],
        cure.rates["misaligned"],
        cure.rates["incoherent"],
        knob if cure.within_budget else f"{knob}: over budget",
        induced,
    )
    return f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in cells)}</tr>"


def _carries(finding: Finding) -> tuple[float, float]:
    """How strong the evidence is that a latent carries the behaviour: necessity, then control."""
    return whole(finding.necessity), whole(finding.cure.best.rates)


def _merit(finding: Finding) -> tuple[bool, float, int]:
    best = finding.cure.best
    return best.within_budget, whole(best.rates), -len(finding.candidate.carriers)


def _restored(
    lm: LanguageModel, contrasts: Sequence[Contrast], candidates: Sequence[Candidate]
) -> list[float]:
    """Log-probability of the base's answers under each cure, as `TRIED` brings it furthest."""
    if not candidates:
        return []
    fixes = [candidate.cure(*knob) for knob in TRIED for candidate in candidates]
    scores = restored(lm, contrasts, fixes).reshape(len(TRIED), -1)
    return scores.amax(dim=0).tolist()


def _best_of(
    lm: LanguageModel, contrasts: Sequence[Contrast], candidates: Sequence[Candidate], count: int
) -> list[Candidate]:
    """The candidates that bring the base's answers back furthest, best first."""
    scores = _restored(lm, contrasts, candidates)
    return [candidates[i] for i in sorted(range(len(candidates)), key=lambda i: -scores[i])[:count]]


def _grow(
    lm: LanguageModel,
    contrasts: Sequence[Contrast],
    pool: Sequence[Carrier],
    knob: Knob,
    how: ScreenSettings,
) -> Candidate | None:
    """Add, one at a time, the latent that brings the base's answers back furthest; None below two."""
    members: tuple[Carrier, ...] = ()
    reached = float("-inf")
    while len(members) < how.set_size:
        extended = [
            Candidate("set", (*members, carrier))
            for carrier in pool
            if not any(_same(carrier, member) for member in members)
        ]
        if not extended:
            break
        scores = restored(lm, contrasts, [c.cure(*knob) for c in extended])
        best = int(scores.argmax())
        if len(members) > 1 and float(scores[best]) < reached + how.set_gain:
            break
        members, reached = extended[best].carriers, float(scores[best])
    return Candidate("set", members) if len(members) > 1 else None


def _same(one: Carrier, other: Carrier) -> bool:
    """Nearly one direction at one site: editing both would edit it twice."""
    return one.site == other.site and abs(float(one.unit @ other.unit)) > 0.95


def _unique(candidates: Sequence[Candidate | None]) -> list[Candidate]:
    found = {candidate.key: candidate for candidate in candidates if candidate is not None}
    return list(found.values())
