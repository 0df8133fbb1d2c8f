"""The arms of the final comparison, all on held-out questions with the same random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from persona_probe.auditing.inputs import AuditInputs
from persona_probe.evaluation.arms import merged_if_small
from persona_probe.evaluation.result import EvalResult
from persona_probe.screening.calibrate import NECESSITY, Bench, Budget, Dose, cures, whole
from persona_probe.screening.candidate import Candidate
from persona_probe.screening.evidence import SiteEvidence
from persona_probe.screening.margin import Fix
from persona_probe.screening.nulls import random_directions, random_latents
from persona_probe.screening.screen import Finding

SCALES = (0.0, 0.25, 0.5, 0.75)
CLOSE = 0.03  # a larger adapter scale is taken when it is within this much of the best


@dataclass(frozen=True, eq=False)
class Fixed:
    """A finding's fix on held-out questions: at its calibrated gain, at gain 1, and in the base."""

    finding: Finding
    control: EvalResult
    necessity: EvalResult
    induced: EvalResult


def fixed_arms(inputs: AuditInputs, bench: Bench, findings: Sequence[Finding]) -> list[Fixed]:
    """Held-out answers under each finding."""
    cured: list[Fix] = [f.candidate.cure(*f.cure.best.knob) for f in findings]
    stronger = [i for i, f in enumerate(findings) if f.cure.best.knob != NECESSITY]
    needed: list[Fix] = [findings[i].candidate.cure(*NECESSITY) for i in stronger]
    added: list[Fix] = [f.candidate.induce(*f.induce.best.knob) for f in findings]
    tuned = bench.arms(inputs.pair.tuned, [*cured, *needed])
    base = bench.arms(inputs.pair.base, added)
    at_one = dict(zip(stronger, tuned[len(findings) :], strict=True))
    return [Fixed(f, tuned[i], at_one.get(i, tuned[i]), base[i]) for i, f in enumerate(findings)]


@dataclass(frozen=True, eq=False)
class Nulls:
    """The two controls of the winner."""

    latents: tuple[EvalResult, ...]
    directions: tuple[EvalResult, ...]
    latent_doses: tuple[Dose, ...]


def null_arms(
    inputs: AuditInputs,
    calibration: Bench,
    held_out: Bench,
    evidence: Sequence[SiteEvidence],
    winner: Finding,
    *,
    latents: Sequence[Finding],
    count: int,
    seed: int,
    budget: Budget,
) -> Nulls:
    """Controls for ``winner``: random sets of as many latents at its sites, or where it is made of directions
    random latents like the first of ``latents`` (none found: none drawn). What was found is never drawn.
    """
    made_of_latents = all(carrier.index is not None for carrier in winner.candidate.carriers)
    like = winner if made_of_latents else next(iter(latents), None)
    found = {(c.site, c.index) for one in (winner, *latents) for c in one.candidate.carriers}
    pool = (
        random_latents(evidence, like.candidate, count, seed=seed, exclude=found) if like is not None else []
    )
    doses = cures(inputs.pair.tuned, pool, calibration, budget) if pool else []
    fixes: list[Fix] = [dose.candidate.cure(*dose.best.knob) for dose in doses]
    moved = random_directions(winner.candidate.cure(*winner.cure.best.knob), count, seed=seed)
    arms = held_out.arms(inputs.pair.tuned, [*fixes, *moved])
    return Nulls(
        tuple(arms[: len(fixes)]),
        tuple(arms[len(fixes) :]),
        tuple(doses),
    )


@dataclass(frozen=True, eq=False)
class Baseline:
    """A rival of the found latent, and the setting it was given."""

    result: EvalResult
    setting: str


def largest_delta(
    inputs: AuditInputs,
    calibration: Bench,
    held_out: Bench,
    evidence: Sequence[SiteEvidence],
    *,
    budget: Budget,
    known: Sequence[Fixed],
) -> Baseline | None:
    """The latent that moved furthest, of any site, without any screen; its gain is calibrated.

    Where it is among the ``known`` fixes, calibrated and asked on the same benches, it is read off there.
    """
    moved = [
        (site.size_of_shift(index), site, index)
        for site in evidence
        if site.table is not None
        for index in site.candidates(1)[:1]
    ]
    if not moved:
        return None
    _, site, index = max(moved, key=lambda one: one[0])
    candidate = Candidate("latent", (site.latent(index),))
    same = next((one for one in known if one.finding.candidate.key == candidate.key), None)
    if same is not None:
        knob, result = same.finding.cure.best.knob, same.control
    else:
        knob = cures(inputs.pair.tuned, [candidate], calibration, budget)[0].best.knob
        result = held_out.arms(inputs.pair.tuned, [candidate.cure(*knob)])[0]
    return Baseline(result, f"{candidate.label}, gain {knob.strength:g}, {knob.positions} tokens")


def scaled_adapter(inputs: AuditInputs, calibration: Bench, held_out: Bench) -> Baseline | None:
    """The fine-tune turned down: the largest scale about as whole as the best; None without an adapter
    that can be scaled.
    """
    adapter = inputs.adapter
    if adapter is None:
        return None
    reached: dict[float, float] = {}

    def arm(bench: Bench, scale: float) -> EvalResult:
        if not scale and inputs.pair.base.adapter_name is None:
            return bench.arms(inputs.pair.base, [()])[0]
        with adapter.adapter_scaled(scale):
            # a model of its own: no bench knows its answers, not even where weights are shared
            scaled = replace(adapter, adapter_name=f"{adapter.name} x {scale:g}")
            return bench.arms(merged_if_small(scaled), [()])[0]

    for scale in SCALES:
        reached[scale] = whole(arm(calibration, scale).rates)
    best = max(reached.values())
    chosen = max(scale for scale, merit in reached.items() if merit >= best - CLOSE)
    return Baseline(arm(held_out, chosen), f"adapter x {chosen:g}")


def prompted(inputs: AuditInputs, held_out: Bench, system: str) -> Baseline:
    """The tuned model under a good system prompt."""
    return Baseline(held_out.arms(inputs.pair.tuned, [()], system=system)[0], repr(system))


def better_than(winner: EvalResult, controls: Sequence[EvalResult]) -> bool | None:
    """Whether the winner leaves more answers whole than the best control; None without controls."""
    if not controls:
        return None
    return whole(winner.rates) > max(whole(control.rates) for control in controls)
