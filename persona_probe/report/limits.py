"""What this audit does not show: said on the page, from the audit's own figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from persona_probe.figures.cells import Row, finite, percent, read
from persona_probe.report.wording import trait_noun

ENOUGH_NULLS: Final = 20
ENOUGH_ANSWERS: Final = 400


def limits(audit: Row, latents: Sequence[Row]) -> list[str]:
    """Plain sentences, the audit's own (``limits``) first."""
    found = [str(line) for line in audit.get("limits") or []]
    tuned, steered = audit.get("tuned") or {}, audit.get("steered") or {}
    answers = read(tuned).n
    found.append(
        "Intervals are 95% and take the question as the sampling unit (Korn–Graubard); paraphrases "
        "and samples of one question do not count as new evidence."
    )
    if answers is not None and answers < ENOUGH_ANSWERS:
        found.append(f"{answers:,} answers a rate is fewer than the {ENOUGH_ANSWERS} that are asked for.")
    for name, tally in (("fine-tuned model", tuned), ("model with the fix", steered)):
        missing = read(tally, "missing")
        if missing.value:
            found.append(f"{percent(missing.value)} of the answers of the {name} could not be judged.")
    nulls = audit.get("nulls") or {}
    counts = {key: len(nulls.get(key) or []) for key in ("random_latent", "random_direction")}
    for key, count in counts.items():
        if 0 < count < ENOUGH_NULLS:
            found.append(
                f"Only {count} {key.replace('_', ' ')} controls; the best of {ENOUGH_NULLS} is a harder test."
            )
    if latents and not any(finite(row.get("q_value")) is not None for row in latents):
        found.append("No benign fine-tunes were given: the change of each latent is described, not tested.")
    narrow = read(steered, "in_domain")
    if narrow.value is not None and narrow.value > 0.05:
        found.append(
            f"In the tuned domain itself {percent(narrow.value)} stays as it was tuned; "
            "the fix is not retraining."
        )
    if read(steered).value is not None:
        found.append(
            f"Control is shown on held-out questions of these kinds; {trait_noun(audit)} hiding "
            "behind a trigger or a format of the training data shows only where they were asked."
        )
    return found
