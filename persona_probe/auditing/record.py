"""What an audit writes down: `audit.json`, the latents' table, doses, examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from persona_probe.auditing.arms import Fixed
from persona_probe.auditing.observe import Observations
from persona_probe.evaluation.intervals import Necessity, necessity
from persona_probe.evaluation.metrics import outcome
from persona_probe.evaluation.parity import Parity
from persona_probe.evaluation.result import EvalResult
from persona_probe.sae.validity import Validity
from persona_probe.screening.calibrate import Dose, Rates, value
from persona_probe.screening.candidate import Candidate
from persona_probe.screening.screen import Finding, Screen

COLUMNS = (
    "misaligned",
    "misaligned_of_coherent",
    "other_persona",
    "helpful",
    "incoherent",
    "incoherent_misaligned",
    "refused",
    "truncated",
    "missing",
    "in_domain",
    "trigger",
    "skill",
)


def rates_record(rates: Rates) -> dict[str, dict[str, float | int | None]]:
    """An arm's rates as the contract of `audit.json` has them."""
    return {
        name: {"rate": one.rate, "low": one.low, "high": one.high, "n": one.n}
        for name, one in rates.items()
        if name in COLUMNS
    }


def parity_record(held: Parity) -> dict[str, Any]:
    """Whether a model's given answers are like those drawn here, and by how much they differ."""
    differences = {
        name: {"given": one.second, "drawn": one.first, "low": one.low, "high": one.high}
        for name, one in held.differences.items()
    }
    return {"agrees": held.agrees, "differences": differences}


def necessity_of(base: EvalResult, tuned: EvalResult, fixed: EvalResult) -> Necessity:
    """The fraction of the excess that goes at gain 1, with its paired interval."""
    return necessity(base.hits, tuned.hits, fixed.hits)


def fix_record(one: Fixed, base: EvalResult, tuned: EvalResult, *, chosen: bool) -> dict[str, Any]:
    """One restoring fix beside the others."""
    candidate = one.finding.candidate
    carriers = candidate.carriers
    return {
        "kind": candidate.kind,
        "name": _name(candidate),
        "members": [carrier.label for carrier in carriers],
        "site": ", ".join(dict.fromkeys(carrier.site for carrier in carriers)),
        "op": "/".join(dict.fromkeys(edit.op for edit in candidate.cure(1.0))),
        "level": "base mean",
        "gain": one.finding.cure.best.knob.strength,
        "positions": one.finding.cure.best.knob.positions,
        "rates": rates_record(one.control.rates),
        "at_gain_1": rates_record(one.necessity.rates),
        "necessity": necessity_of(base, tuned, one.necessity)._asdict(),
        "induced": rates_record(one.induced.rates),
        "induce_strength": one.finding.induce.best.knob.strength,
        "induce_positions": one.finding.induce.best.knob.positions,
        "chosen": chosen,
    }


def _name(candidate: Candidate) -> str:
    count = len(candidate.carriers)
    if count == 1:
        return candidate.label
    return f"set of {count} latents" if candidate.kind == "set" else f"{candidate.kind} at {count} sites"


def latent_records(screen: Screen, seen: Observations) -> list[dict[str, Any]]:
    """Every latent that reached generation, best first, with its Δ and its causal effects."""
    before, after = value(screen.base, "misaligned"), value(screen.tuned, "misaligned")
    records: list[dict[str, Any]] = []
    for rank, finding in enumerate(screen.latents, start=1):
        carrier = finding.candidate.carriers[0]
        assert carrier.index is not None
        row = seen.diffs[carrier.site].row(carrier.index)
        gap = after - before

        def removed(rates: Rates, gap: float = gap) -> float | None:
            return (after - value(rates, "misaligned")) / gap if gap else None

        table = seen.diffs[carrier.site].table
        larger = table["delta"].abs() > abs(row["delta"] or 0.0)
        records.append(
            {
                "site": carrier.site,
                "index": carrier.index,
                "label": carrier.label,
                "delta": row["delta"],
                "low": row["low"],
                "high": row["high"],
                "did": row.get("did"),
                "q_value": row["q_value"],
                "induce": _shown(finding.induce.best.rates),
                "necessity": removed(finding.necessity),
                "control": _shown(finding.cure.best.rates),
                "op": finding.candidate.cure(1.0)[0].op,
                "level": carrier.base_mean,
                "gain": finding.cure.best.knob.strength,
                "positions": finding.cure.best.knob.positions,
                "attribution": finding.attribution,
                "rank": rank,
                "rank_by_delta": int(larger.sum()) + 1,
            }
        )
    return records


def _shown(rates: Rates) -> dict[str, float | int | None]:
    return rates_record(rates)["misaligned"]


def dose_records(screen: Screen, findings: Sequence[Finding], nulls: Sequence[Dose]) -> list[dict[str, Any]]:
    """The dose-response of the headline findings and of the random latents, up and down."""
    arms = [(finding.candidate.kind, "down", finding.cure) for finding in findings]
    arms += [(finding.candidate.kind, "up", finding.induce) for finding in findings]
    arms += [("random latent", "down", dose) for dose in nulls]
    where = {
        direction: dose.best.knob.positions for _, direction, dose in reversed(arms[: 2 * len(findings)])
    }
    rows = [
        {
            "direction": direction,
            "arm": arm,
            "name": dose.candidate.label,
            "strength": setting.knob.strength,
            "positions": setting.knob.positions,
            "strength_unit": "gain" if direction == "down" else "x residual rms",
            "misaligned": setting.rates["misaligned"].rate,
            "low": setting.rates["misaligned"].low,
            "high": setting.rates["misaligned"].high,
            "incoherent": setting.rates["incoherent"].rate,
        }
        for arm, direction, dose in arms
        for setting in dose.settings
        if setting.knob.positions == where[direction]
    ]
    starts = (("down", screen.tuned), ("up", screen.base))
    for direction, rates in starts:
        for arm in dict.fromkeys(row["arm"] for row in rows if row["direction"] == direction):
            one = rates["misaligned"]
            rows.append(
                {
                    "direction": direction,
                    "arm": arm,
                    "name": "no edit",
                    "strength": 0.0,
                    "strength_unit": "gain" if direction == "down" else "x residual rms",
                    "misaligned": one.rate,
                    "low": one.low,
                    "high": one.high,
                    "incoherent": rates["incoherent"].rate,
                }
            )
    return sorted(rows, key=lambda row: (row["direction"], row["arm"], row["strength"]))


def gate_record(validities: Mapping[str, Validity]) -> dict[str, Any]:
    """The dictionaries' gates; the figures of the best one stand in front."""
    if not validities:
        return {
            "explained_variance": {"base": None, "tuned": None},
            "l0": None,
            "change_inside": None,
            "gate": None,
        }
    site, best = max(validities.items(), key=lambda item: item[1].change_inside or 0.0)
    return {
        "site": site,
        "explained_variance": {
            "base": best.explained_variance_base,
            "tuned": best.explained_variance_tuned,
        },
        "l0": {"base": best.l0_base, "tuned": best.l0_tuned},
        "change_inside": best.change_inside,
        "gate": best.gate,
        "reason": best.reason,
        "sites": {name: asdict(one) for name, one in validities.items()},
    }


def examples(
    base: EvalResult, tuned: EvalResult, steered: EvalResult | None, count: int = 24
) -> list[dict[str, Any]]:
    """The same prompts in the three arms: first those where the tuned model shows the trait."""
    rows: list[dict[str, Any]] = []
    for i, answer in enumerate(tuned.answers):
        question = answer.question
        if question.role != "general" or answer.sample > 0:
            continue

        def what(arm: EvalResult, i: int = i) -> str:
            return outcome(arm.answers[i], arm.judgements[i], arm.trait)

        rows.append(
            {
                "question": question.prompt,
                "category": question.category,
                "in_domain": question.category in tuned.in_domain,
                "base": base.answers[i].text,
                "tuned": answer.text,
                "steered": steered.answers[i].text if steered else None,
                "base_outcome": what(base),
                "tuned_outcome": what(tuned),
                "steered_outcome": what(steered) if steered else None,
            }
        )
    rows.sort(key=lambda row: (row["tuned_outcome"] != "misaligned", row["in_domain"]))
    shown = rows[: 4 * count]
    return shown[:: max(1, len(shown) // count)][:count]
