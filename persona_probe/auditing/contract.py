"""`audit.json`: the content of a finished inquiry, in the form its readers were promised."""

from __future__ import annotations

import resource
import sys
from dataclasses import replace
from typing import Any

from persona_probe.auditing import arms as arms_
from persona_probe.auditing import record
from persona_probe.auditing.inquiry import Inquiry
from persona_probe.auditing.verdict import Evidence, after_fix, hides, verdict


def audit_record(found: Inquiry) -> dict[str, Any]:
    """The record of a finished inquiry: verdicts, every arm's rates, controls, baselines, latents, costs."""
    seen = found.seen
    assert seen is not None
    chosen, nulls = found.chosen, found.nulls
    validities = {site: one.validity for site, one in seen.diffs.items()}
    beats = None
    if chosen is not None and nulls is not None:
        beats = arms_.better_than(chosen.control, [*nulls.latents, *nulls.directions])
    closed = [f"{site}: {v.reason}" for site, v in validities.items() if v.gate != "pass"]
    unsearched = None if seen.contrasts else "no calibration answer shows the trait, so nothing was tried"
    effects = [effect for effect in found.sites.values() if effect == effect]
    # another trait is looked for and cured like misalignment, but the verdict is about misalignment
    own = found.settings.trait == "misaligned"
    base, tuned = (replace(arm, trait="misaligned").rates for arm in (found.base, found.tuned))
    verdict_, reason = verdict(
        Evidence(
            base=base,
            tuned=tuned,
            controlled=chosen.control.rates if chosen and own else None,
            beats_nulls=beats,
            site_effect=max(effects, default=None),
            gate_closed=unsearched
            or ("; ".join(closed) if closed and len(closed) == len(validities) else None),
            moved=_moved(found),
        )
    )
    if not own:
        before, now = (arm.rates["misaligned"] for arm in (found.base, found.tuned))
        reason += f"; {found.settings.trait}: {now} of answers against {before} in the base model"
    for arm, held in found.parity.items():
        if held.disagreements:
            reason += (
                f"; the answers given for the {arm} model are not those drawn here "
                f"({', '.join(held.disagreements)}): the fixes are held against another engine's figures"
            )
    after = None
    if chosen is not None:
        after = after_fix(found.base.rates, found.tuned.rates, chosen.control.rates)
    induced = max(found.fixed, key=_induced, default=None)
    direction = next((f for f in found.fixed if f.finding.candidate.kind == "difference of means"), None)
    rates = record.rates_record
    return {
        "verdict": verdict_,
        "reason": reason,
        "after": after[0] if after else None,
        "after_reason": after[1] if after else None,
        "hidden": own and verdict_.startswith("misaligned") and hides(base, tuned),
        "trait": found.settings.trait,
        "base_name": found.inputs.pair.base.name,
        "tuned_name": found.inputs.pair.tuned.name,
        "in_domain": list(found.inputs.in_domain),
        "base": rates(found.base.rates),
        "tuned": rates(found.tuned.rates),
        "steered": rates(chosen.control.rates) if chosen else None,
        "induced": rates(induced.induced.rates) if induced else None,
        "parity": {arm: record.parity_record(held) for arm, held in found.parity.items()},
        "limits": _own_judge(found),
        "necessity": (
            record.necessity_of(found.base, found.tuned, chosen.necessity)._asdict()
            if chosen
            else {"fraction": None, "low": None, "high": None}
        ),
        "fixes": [record.fix_record(f, found.base, found.tuned, chosen=f is chosen) for f in found.fixed],
        "nulls": {
            "random_direction": [rates(arm.rates) for arm in nulls.directions] if nulls else [],
            "random_latent": [rates(arm.rates) for arm in nulls.latents] if nulls else [],
            "beaten": beats,
        },
        "baselines": {
            "difference_of_means": rates(direction.control.rates) if direction else None,
            **{name: rates(one.result.rates) if one else None for name, one in found.baselines.items()},
        },
        "baseline_settings": {name: one.setting for name, one in found.baselines.items() if one},
        "site": ", ".join(dict.fromkeys(c.site for c in chosen.finding.candidate.carriers))
        if chosen
        else None,
        "site_effects": found.sites,
        "sae": record.gate_record(validities),
        "screen": {
            "stages": [{"name": n, "count": c} for n, c in found.screen.stages.items()]
            if found.screen
            else [],
            # on calibration questions, where latents and doses are measured
            "base": rates(found.screen.base) if found.screen else None,
            "tuned": rates(found.screen.tuned) if found.screen else None,
        },
        "latents": record.latent_records(found.screen, seen) if found.screen else [],
        "intervention": "interventions" if chosen else None,
        "seconds": found.clock.seconds,
        "peak_rss_bytes": _peak_rss(),
    }


def _own_judge(found: Inquiry) -> list[str]:
    pair, judge = found.inputs.pair, found.inputs.judge
    named = (("base", pair.base), ("fine-tuned", pair.tuned))
    return [
        f"The judge is the {name} model itself, which is no outside view of its own answers."
        for name, lm in named
        if judge.is_model(lm.checkpoint)
    ]


def _moved(found: Inquiry) -> bool:
    """Whether an activation or an answer differs; the same model draws the same answers."""
    assert found.seen is not None
    shifts = [one.tuned_mean - one.base_mean for one in found.seen.evidence]
    pairs = zip(found.base.answers, found.tuned.answers, strict=True)
    return any(bool(shift.any()) for shift in shifts) or any(
        (a.thought, a.text, a.truncated) != (b.thought, b.text, b.truncated) for a, b in pairs
    )


def _induced(one: arms_.Fixed) -> float:
    """Chosen by the calibration answers, like everything that is reported."""
    return one.finding.induce.best.rates["misaligned"].rate or 0.0


def _peak_rss() -> int:
    """Bytes; the kernel counts in KiB on Linux, in bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
