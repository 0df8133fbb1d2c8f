"""Which figures the page shows, each with the sentence that says what to see in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from persona_probe import figures
from persona_probe.figures.cells import Row, finite, read
from persona_probe.report.tables import arms_of, spreads_of
from persona_probe.report.wording import trait_noun, trait_word

if TYPE_CHECKING:
    import plotly.graph_objects as go


class Drawing(NamedTuple):
    """A figure: its place on the page, what a screen reader says of it, its title."""

    name: str
    label: str
    title: str
    figure: go.Figure


def drawings(audit: Row, latents: Sequence[Row], dose: Sequence[Row]) -> dict[str, list[Drawing]]:
    """Section name → its figures; a section whose figures have no data is absent."""
    word, noun = trait_word(audit), trait_noun(audit)
    base, tuned = audit.get("base") or {}, audit.get("tuned") or {}
    found: dict[str, list[Drawing]] = {
        "rates": [
            Drawing(
                "rates",
                f"Dot plot: share of {word} and of incoherent answers for each arm, with intervals",
                "Every arm, held-out questions",
                figures.rates(_shown(audit), spreads_of(audit), word=word),
            )
        ]
    }
    fixes = list(audit.get("fixes") or [])
    if fixes:
        found["necessity"] = [
            Drawing(
                "necessity",
                f"Share of the excess {noun} that each fix removes at gain at most 1",
                "Necessity: gain at most 1",
                figures.necessity(fixes),
            )
        ]
        found["control"] = [
            Drawing(
                "control",
                f"Share of {word} answers that each fix reaches at its calibrated gain",
                "Control: calibrated gain",
                figures.control(fixes, tuned, base, word=word),
            )
        ]
    nulls, steered = audit.get("nulls") or {}, audit.get("steered")
    if read(steered or {}).value is not None and spreads_of(audit):
        plane = figures.nulls(
            steered,
            nulls.get("random_direction") or [],
            nulls.get("random_latent") or [],
            anchors={"base": base, "tuned": tuned},
            word=word,
        )
        label = f"Scatter of {word} against incoherent answers: the fix and the random controls"
        found["nulls"] = [Drawing("nulls", label, "A cure, or only damage?", plane)]
    screened = audit.get("screen") or {}
    searched = [screened.get("base") or base, screened.get("tuned") or tuned]
    if any(finite(row.get("delta")) is not None for row in latents):
        effect = figures.delta_against_effect(latents, *searched, word=word)
        label = f"Scatter of the change of each latent against its effect on {noun}"
        found["latents"] = [Drawing("latents", label, "What changed, and what causes", effect)]
    cards = list(audit.get("cards") or [])
    if cards:
        first = cards[0]
        name = f"{first['latent']['site']} #{first['latent']['index']}"
        label = f"Bar charts of {name}: tokens by activation, and firing rate by place in the document"
        drawn = figures.firing(first["histogram"], first["places"])
        found["card"] = [Drawing("card", label, f"How strongly, and where, {name} fires", drawn)]
    origins = [read(one).value for one in searched]
    doses = list(_doses(dose, origins[0], origins[1], word))
    return {**found, "dose": doses} if doses else found


def _shown(audit: Row) -> dict[str, Row | None]:
    """The arms worth a line: base and tuned always, the others when they were run."""
    return {name: tally for name, tally in arms_of(audit).items() if tally or name in {"base", "tuned"}}


def _doses(dose: Sequence[Row], base: float | None, tuned: float | None, word: str) -> Sequence[Drawing]:
    """One figure per direction and per unit: strengths in different units never share an axis."""
    found: list[Drawing] = []
    for direction, origin, title in (
        ("up", base, "Up in the base"),
        ("down", tuned, "Down in the fine-tuned model"),
    ):
        here = [
            row
            for row in dose
            if row.get("direction") == direction and finite(row.get("strength")) is not None
        ]
        units = sorted({str(row.get("strength_unit") or "strength") for row in here})
        for place, unit in enumerate(units):
            part = [row for row in here if str(row.get("strength_unit") or "strength") == unit]
            label = f"{title}: {word} and incoherent answers by strength in {unit}; controls as bands"
            drawn = figures.dose_response(part, reference=origin, word=word)
            found.append(Drawing(f"dose-{direction}-{place}", label, title, drawn))
    return found
