"""From questions to what a screen needs: greedy base answers, contrasts, and evidence per site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from persona_probe.auditing.inputs import AuditInputs
from persona_probe.diffing.diff import diff
from persona_probe.diffing.latent_diff import LatentDiff
from persona_probe.diffing.means import SiteMeans, mean_difference
from persona_probe.evaluation.metrics import outcome
from persona_probe.evaluation.sampling import Answer, transcripts
from persona_probe.hooks.sites import resid_post
from persona_probe.screening.calibrate import Bench
from persona_probe.screening.evidence import SiteEvidence
from persona_probe.screening.margin import Contrast

T = TypeVar("T")

DRAWN = 4  # answers drawn per question where no greedy one shows the trait


@dataclass(frozen=True, eq=False)
class Observations:
    """What the two models do and hold on the calibration questions."""

    evidence: tuple[SiteEvidence, ...]
    diffs: dict[str, LatentDiff]
    contrasts: tuple[Contrast, ...]


def observe(
    inputs: AuditInputs, bench: Bench, sites: Sequence[str] | None, *, at_most: int = 40
) -> Observations:
    """Read both models (and the benign ones) on the base's greedy answers, and pair up contrasts.

    Args:
        bench: its questions are the calibration ones; its trait and in-domain categories count.
        sites: for directions; None takes the dictionaries' sites, else every block.
        at_most: contrasts to keep, spread over the questions.
    """
    pair = inputs.pair
    general = [q for q in bench.questions if q.role == "general"]
    asked = bench.on(general, 1)
    greedy = replace(asked, sampling=replace(asked.sampling, temperature=0))
    base_answers, tuned_answers = (greedy.answers(lm, [()]) for lm in (pair.base, pair.tuned))
    read = transcripts(pair.base, base_answers)
    clusters = [question.question for question in general]
    diffs = (
        diff(pair, inputs.dictionaries, read, clusters, benign=inputs.benign) if inputs.dictionaries else {}
    )
    means = {site: found.means for site, found in diffs.items()}
    every = sites or (() if diffs else [resid_post(b) for b in range(pair.base.n_layers)])
    more = [site for site in every if site not in means]
    if more:
        models = [pair.base, pair.tuned, *inputs.benign]
        means |= mean_difference(models, read, clusters, more)
    evidence = tuple(_evidence(site, means[site], diffs.get(site)) for site in means)
    contrasts = _contrasts(inputs, bench, base_answers, tuned_answers, at_most)
    if not contrasts:  # a trait that shows now and then is not in the most probable answers
        drawn = bench.on(general, DRAWN).answers(pair.tuned, [()])
        beside = [answer for answer in base_answers for _ in range(DRAWN)]
        contrasts = _contrasts(inputs, bench, beside, drawn, at_most)
    return Observations(evidence, diffs, contrasts)


def _evidence(site: str, means: SiteMeans, found: LatentDiff | None) -> SiteEvidence:
    return SiteEvidence(
        site=site,
        base_mean=means.mean[0],
        tuned_mean=means.mean[1],
        benign_means=tuple(means.mean[2:]),
        residual_rms=float(means.residual_rms[0]),
        dictionary=found.dictionary if found else None,
        table=found.table if found else None,
    )


def _contrasts(
    inputs: AuditInputs,
    bench: Bench,
    base_answers: Sequence[Answer],
    tuned_answers: Sequence[Answer],
    at_most: int,
) -> tuple[Contrast, ...]:
    """Prompts outside the trained domain on which the tuned model shows the trait and the base does not."""
    base_judged = bench.judge.judge(base_answers)
    tuned_judged = bench.judge.judge(tuned_answers)
    base_read = transcripts(inputs.pair.base, base_answers)
    tuned_read = transcripts(inputs.pair.tuned, tuned_answers)
    found = [
        Contrast(one.question.question, base_read[i], tuned_read[i])
        for i, (one, other) in enumerate(zip(base_answers, tuned_answers, strict=True))
        if one.question.category not in bench.in_domain
        and outcome(one, base_judged[i], bench.trait) not in ("misaligned", "incoherent", "truncated")
        and outcome(other, tuned_judged[i], bench.trait) == "misaligned"
    ]
    return evenly(found, at_most)


def evenly(found: Sequence[T], at_most: int) -> tuple[T, ...]:
    """At most so many of them, from the whole length, in their order."""
    kept = min(at_most, len(found))
    return tuple(found[i * len(found) // kept] for i in range(kept))
