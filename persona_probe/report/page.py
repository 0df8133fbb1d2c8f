"""``report.html``: one self-contained page that reads the verdict in ten seconds and then shows
the evidence.

Nothing on the page reaches the network: plotly.js and the data are inlined once, and a content
security policy forbids every request and every script but the page's own (by digest). Every string
from the audit is escaped, in HTML by the template engine, in the figures' JSON here, and in
plotly's labels by ``figures``.

What it reads, beyond the contract of ``audit.json`` (all optional; what is absent is said to be
absent): ``title base_name tuned_name trait site reason date``; ``fixes: [{name, site, op, level,
gain, rates, necessity, chosen}]`` (the restoring fixes side by side, the one under ``steered``
marked ``chosen``); ``cards`` (of the fix's latents, as `figures.latent_card` takes them);
``screen.stages: [{name, count}]``; ``settings``, ``provenance`` (nested dicts); ``command`` (text or
list); ``limits`` (list of text).
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jinja2
from markupsafe import Markup, escape

from persona_probe.artifact import write_text
from persona_probe.figures.cells import Row, finite, percent, read, rows, spoken
from persona_probe.figures.latent_card import latent_card
from persona_probe.figures.style import INK, LOOKS, QUIET, RULE
from persona_probe.report import tables, wording
from persona_probe.report.checks import checks
from persona_probe.report.drawings import Drawing, drawings
from persona_probe.report.limits import limits

TEMPLATES: Final = Path(__file__).parent / "templates"


def write_report(
    audit: Row, latents: object, examples: Sequence[Row], dose: Sequence[Row], path: str | Path
) -> Path:
    """Render the page and write it to ``path`` atomically.

    Args:
        audit: the content of ``audit.json`` (keys above).
        latents: polars table or list of dicts ``{site, index, label, delta, low, high, q_value,
            induce, necessity, control, op, level, gain, rank}``, best first.
        examples: ``{question, category, base, tuned, steered, base_outcome, tuned_outcome,
            steered_outcome}``.
        dose: ``{direction: "up" | "down", arm, strength, strength_unit, misaligned, low, high,
            incoherent}``.
    """
    target = Path(path)
    write_text(target, render(audit, latents, examples, dose))
    return target


def render(audit: Row, latents: object, examples: Sequence[Row], dose: Sequence[Row]) -> str:
    """The page as text."""
    listed = rows(latents)
    return filled("page.html.j2", drawings(audit, listed, dose), _view(audit, listed, examples))


def filled(template: str, sections: Mapping[str, Sequence[Drawing]], view: Row) -> str:
    """A template of ours with its words, figures, style and scripts in it: nothing is left to fetch.

    A page without figures needs no script, and may run none.
    """
    from plotly.offline import get_plotlyjs

    library, script = Markup(_newlines(get_plotlyjs())), Markup(_newlines(_asset("page.js")))
    style = _asset("page.css")
    for name, look in LOOKS.items():
        style = style.replace(f"@{name}@", look.colour)
    for name, colour in (("ink", INK), ("quiet", QUIET), ("rule", RULE)):
        style = style.replace(f"@{name}@", colour)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    environment.filters["short_digest"] = _short_digest
    return environment.get_template(template).render(
        **view,
        sections=sections,
        data=[(drawing.name, inline_json(drawing)) for part in sections.values() for drawing in part],
        style=Markup(style),
        library=library,
        script=script,
        policy=policy([str(library), str(script)] if sections else []),
    )


def policy(scripts: Sequence[str]) -> str:
    """The content security policy: these scripts by digest, the page's own styles, no requests."""
    allowed = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts
    )
    allowed = allowed or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def inline_json(drawing: Drawing) -> Markup:
    """The figure's JSON with no ``<``, ``>``, ``&`` or line separator left in it."""
    text = str(drawing.figure.to_json())
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _view(audit: Row, latents: Sequence[Row], examples: Sequence[Row]) -> dict[str, Any]:
    """Everything the template prints, as words."""
    word = wording.trait_word(audit)
    command = audit.get("command") or []
    cards: Sequence[Row] = audit.get("cards") or ()
    answers = tables.example_cards(examples, word)
    return {
        "title": str(audit.get("title") or "Audit of a fine-tune"),
        "byline": [str(part) for key in ("date",) if (part := audit.get(key))],
        "names": {arm: str(audit.get(f"{arm}_name") or "") for arm in ("base", "tuned")},
        "verdict": str(audit.get("verdict") or "no verdict"),
        "after": str(audit.get("after") or ""),
        "trait": word,
        "headline": wording.headline(audit),
        "hidden": bool(audit.get("hidden")),
        "verdict_tone": wording.verdict_tone(audit),
        "lede": wording.lede(audit),
        "reason": wording.reason(audit),
        "gauges": _gauges(audit),
        "checks": checks(audit),
        "necessity_sentence": wording.necessity_sentence(audit),
        "control_sentence": wording.control_sentence(audit),
        "claimed": any(
            read(audit.get(key) or {}, column).value is not None
            for key, column in (("necessity", "fraction"), ("steered", "misaligned"))
        ),
        "rate_table": tables.rate_table(audit),
        "null_table": tables.null_table(audit),
        "fix_table": tables.fix_table(audit, word),
        "latent_table": tables.latent_table(latents, word),
        "latent_count": len(latents),
        "stages": tables.stages_of(audit),
        "examples": answers,
        "cards": [
            (f"{card['latent']['site']} #{card['latent']['index']}", Markup(latent_card(card, drawn=i > 0)))
            for i, card in enumerate(cards)
        ],
        "examples_left": max(0, len(examples) - len(answers)),
        "sae": _sae(audit),
        "limits": limits(audit, latents),
        "timings": tables.timings(audit),
        "settings": tables.groups(audit.get("settings")),
        "provenance": tables.groups(_without_times(audit.get("provenance"))),
        "commands": [str(command)] if isinstance(command, str) else [str(line) for line in command],
        "intervention": str(audit.get("intervention") or ""),
    }


def _gauges(audit: Row) -> list[dict[str, Any]]:
    """The big figures: base, fine-tuned, with the fix, each with its interval on one scale."""
    found = {arm: read(audit.get(arm) or {}, wording.told(audit)) for arm in ("base", "tuned", "steered")}
    readings = {arm: reading for arm, reading in found.items() if reading.value is not None}
    return [
        {
            "arm": arm,
            "words": LOOKS[arm].words,
            "rate": percent(reading.value),
            "spoken": spoken(reading),
            "interval": None
            if reading.low is None or reading.high is None
            else f"{percent(reading.low)[:-1]}–{percent(reading.high)}",
            "n": reading.n,
            "at": 100 * (reading.value or 0.0),
            "low": 100 * (reading.value or 0.0 if reading.low is None else reading.low),
            "high": 100 * (reading.value or 0.0 if reading.high is None else reading.high),
        }
        for arm, reading in readings.items()
    ]


def _sae(audit: Row) -> dict[str, Any]:
    """The dictionary's gate, one row per site that was searched."""
    sae: Row = audit.get("sae") or {}
    sites: dict[str, Row] = dict(
        sae.get("sites") or ({str(audit.get("site") or "the site"): sae} if sae else {})
    )
    head = (
        "site",
        "explained variance",
        "active latents (L0)",
        "dead latents",
        "change inside",
        "gate",
    )
    body = [
        (
            str(site),
            *(_both(_sides(row, key)) for key in ("explained_variance", "l0")),
            _both(_sides(row, "dead"), percent),
            percent(row.get("change_inside")) if finite(row.get("change_inside")) is not None else "–",
            str(row.get("gate") or "–"),
        )
        for site, row in sites.items()
    ]
    return {
        "given": bool(sae),
        "gate": str(sae.get("gate") or ""),
        "reason": str(sae.get("reason") or ""),
        "table": tables.Table(head, body),
    }


def _sides(row: Row, key: str) -> object:
    """``{base, tuned}`` of a figure, which a site's row has under two names."""
    sides = {arm: row.get(f"{key}_{arm}") for arm in ("base", "tuned")}
    return row.get(key) if set(sides.values()) == {None} else sides


def _both(cell: object, words: Callable[[float], str] = "{:.3g}".format) -> str:
    """``{base, tuned}`` as ``base → tuned``; a single number as itself."""
    sides = [cell.get(arm) for arm in ("base", "tuned")] if isinstance(cell, dict) else [cell]
    values = [finite(side) for side in sides]
    return " → ".join("–" if value is None else words(value) for value in values)


def _breakable(text: str) -> Markup:
    # A hook name or a path may break after its marks; it stays whole when copied.
    return Markup(str(escape(text)).replace("_", "_<wbr>").replace(".", ".<wbr>").replace("/", "/<wbr>"))


def _short_digest(text: str) -> Markup | str:
    # enough to tell two apart; whole in manifest.json, and when pointed at
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", text):
        return text
    return Markup('<code title="{}">{}…</code>').format(text, text[:19])


def _without_times(provenance: Row | None) -> Row:
    # they are told with the peak of memory
    return {name: value for name, value in (provenance or {}).items() if name != "seconds"}


def _asset(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _newlines(text: str) -> str:
    # An HTML parser reads CR LF as LF, and the digest in the policy is over what the parser reads.
    return text.replace("\r\n", "\n").replace("\r", "\n")
