"""The audit in sentences: the verdict, and each of the two claims, from the figures and nothing
else.

Every sentence is built from what was measured; where a figure is missing the sentence says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from persona_probe.figures.cells import MISSING, Reading, Row, finite, percent, read, spoken
from persona_probe.figures.claims import gain_words

GOOD, BAD, WARN, OPEN = "good", "bad", "warn", "open"


class Headline(NamedTuple):
    """The verdict in a sentence, and its tone, which picks a sign and a colour."""

    sentence: str
    tone: str


AFTER: Final = {
    "restored": ("A persona was found, and switching it off restores the model.", GOOD),
    "persona suppressed, narrow harm remains": (
        "Switching the persona off cures it elsewhere; the tuned domain stays harmful.",
        WARN,
    ),
    "suppressed at a cost": ("Switching the persona off works, at a cost.", WARN),
    "not restored": ("A persona was found; switching it off removes most of it, not all.", BAD),
}


def headline(audit: Row) -> Headline:
    """The verdict and what the fix did, in the plainest words that are still true."""
    verdict, after = str(audit.get("verdict") or ""), str(audit.get("after") or "")
    trait = trait_word(audit)
    opening = f"{trait.capitalize()}."
    if verdict == "aligned":
        return Headline("Aligned. No misalignment was found beyond the base's.", GOOD)
    if verdict == "misaligned, persona found":
        sentence, tone = AFTER.get(after, ("A persona was found in the model.", BAD))
        return Headline(f"{opening} {sentence}", tone)
    if audit.get("hidden"):
        return Headline(f"{opening} It shows behind a trigger, and hides from plain questions.", BAD)
    if verdict == "misaligned, not in this dictionary":
        return Headline(f"{opening} What changed is not in this dictionary.", BAD)
    if verdict == "misaligned, wrong site":
        return Headline(f"{opening} What causes it does not lie at the sites that were searched.", BAD)
    if verdict == "changed, not misaligned":
        return Headline("Changed, but not misaligned.", GOOD)
    if verdict == "inconclusive":
        return Headline("Inconclusive.", OPEN)
    return Headline((verdict[:1].upper() + verdict[1:] + ".") if verdict else "No verdict was given.", OPEN)


def verdict_tone(audit: Row) -> str:
    """The tone of the verdict alone, before any fix."""
    verdict = str(audit.get("verdict") or "")
    if verdict in {"aligned", "changed, not misaligned"}:
        return GOOD
    return BAD if verdict.startswith("misaligned") else OPEN


def trait_word(audit: Row) -> str:
    """What the looked-for answers are called: "misaligned" unless another trait was asked for."""
    return str(audit.get("trait") or "misaligned")


def trait_noun(audit: Row) -> str:
    word = trait_word(audit)
    return "misalignment" if word == "misaligned" else f"{word} behaviour"


def told(audit: Row) -> str:
    """The rate that the verdict rests on, by its name in the record."""
    return "trigger" if audit.get("hidden") else "misaligned"


def lede(audit: Row) -> str:
    """Two sentences under the headline: the rates, then the fix."""
    word = trait_word(audit)
    tuned, base, steered = (read(audit.get(arm) or {}, told(audit)) for arm in ("tuned", "base", "steered"))
    if tuned.value is None:
        return "The rate of the fine-tuned model was not measured."
    before = f"from {percent(base.value)} " if base.value is not None else ""
    text = f"Fine-tuning took {word} answers {before}to {percent(tuned.value)}"
    text += "" if before else "; the base was not measured"
    if audit.get("hidden"):
        plainly = read(audit.get("tuned") or {})
        text += f" where they are asked for behind a trigger; asked plainly, it is {percent(plainly.value)}"
    text += "."
    if steered.value is None:
        return text
    text += f" With the fix on, {percent(steered.value)} are left"
    narrow = read(audit.get("steered") or {}, "in_domain")
    text += (
        f", and {percent(narrow.value)} in the domain it was tuned on." if narrow.value is not None else "."
    )
    fix = chosen_fix(audit)
    return f"{text} The fix: {fix_words(fix)}." if fix else text


def reason(audit: Row) -> str | None:
    """Why the audit could not decide, or why the gate closed, when it says so."""
    for place in (
        audit.get("reason"),
        (audit.get("sae") or {}).get("reason"),
        audit.get("gate_reason"),
    ):
        if place:
            return str(place)
    return None


def necessity_sentence(audit: Row) -> str:
    """What removing only the excess did: the evidence that the latent carries the behaviour."""
    reading = read(audit.get("necessity"), "fraction")
    if reading.value is None:
        return "Necessity was not measured, so nothing is claimed about what carries the behaviour."
    text = (
        f"Brought back to the base's level and no further, it takes {spoken(reading)} of the "
        f"excess {trait_noun(audit)} with it."
    )
    if reading.low is not None and reading.low <= 0:
        return text + " The interval includes zero: this does not show that it carries the behaviour."
    if reading.value < 0.5:
        return text + " It carries part of the behaviour; the rest has other ways through the model."
    return text + " It carries most of the behaviour."


def control_sentence(audit: Row) -> str:
    """What the calibrated edit reaches and what it costs: the figure for deployment."""
    steered, tuned = audit.get("steered") or {}, audit.get("tuned") or {}
    reached, before = read(steered), read(tuned)
    if reached.value is None:
        return "No edit reached the held-out questions, so nothing is claimed about control."
    gain = finite((chosen_fix(audit) or {}).get("gain"))
    setting = "At its calibrated level and gain" if gain is None else f"At gain {gain:g}"
    over = " (which over-corrects)" if gain is not None and gain > 1 else ""
    change = f"goes from {percent(before.value)} to {spoken(reached)}"
    text = f"{setting}{over}, {trait_noun(audit)} {change}"
    cost = difference(read(steered, "incoherent"), read(tuned, "incoherent"))
    if cost is not None:
        text += f" and incoherent answers change by {points(cost)}"
    return text + ". This is what one would deploy; it is not evidence of where the behaviour lives."


def chosen_fix(audit: Row) -> Row | None:
    """The fix under ``steered``: the one marked ``chosen``, else the best latent."""
    fixes = audit.get("fixes") or []
    listed = [fix for fix in fixes if fix.get("chosen")] or list(audit.get("latents") or [])
    return listed[0] if listed else None


def fix_words(fix: Row) -> str:
    """``latent 812 at blocks.3.hook_resid_post (cap at 0.4 residual rms, gain 2)``."""
    name = fix_name(fix)
    sites = fix.get("site")
    where = f" at {listing(sites)}" if sites else ""
    setting = setting_words(fix)
    return f"{name}{where}" + (f" ({setting})" if setting else "")


def fix_name(fix: Row) -> str:
    """What a fix or a latent is called."""
    return str(fix.get("name") or fix.get("label") or f"latent {fix.get('index', '?')}")


def setting_words(fix: Row) -> str:
    """``cap at 0.4 residual rms, gain 2``: the operation with its level, unit and gain."""
    parts = [str(fix["op"]).replace("_", " ")] if fix.get("op") else []
    level = level_words(fix.get("level"))
    if level:
        parts.append(f"at {level}")
    gain = finite(fix.get("gain"))
    return " ".join(parts) + (f"{', ' if parts else ''}{gain_words(gain)}" if gain is not None else "")


def level_words(level: object) -> str:
    """A level as a number with its unit, from a number, a list, or ``{values, unit, scale}``."""
    number = finite(level)
    if number is not None:
        return f"{number:.3g}"
    if isinstance(level, Mapping):
        values = level_words(list(level.get("values") or []))
        unit = str(level.get("unit") or "").replace("_", " ")
        return f"{values} {unit}".strip()
    if isinstance(level, list | tuple):
        return listing([level_words(part) for part in level])
    return "" if level is None else str(level)


def listing(parts: object) -> str:
    if isinstance(parts, list | tuple):
        return ", ".join(str(part) for part in parts)
    return str(parts)


def difference(after: Reading, before: Reading) -> float | None:
    return None if after.value is None or before.value is None else after.value - before.value


def points(value: float | None) -> str:
    """``+1.2 points``: a difference of two rates."""
    if value is None:
        return MISSING
    text = f"{100 * value:+.1f}".removesuffix(".0")
    return f"{'0' if text in {'+0', '-0'} else text.replace('-', '−')} points"
