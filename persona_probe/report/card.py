"""A finished audit in a notebook cell: verdict, reason, and the rates of its arms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from markupsafe import escape

from persona_probe.figures.cells import percent, read
from persona_probe.figures.small import interval
from persona_probe.figures.style import LOOKS, QUIET
from persona_probe.report import wording

ARMS: Final = ("base", "tuned", "steered", "induced")
COLUMNS: Final = ("misaligned", "other_persona", "incoherent", "in_domain", "skill")
TONES: Final = {
    wording.GOOD: LOOKS["steered"].colour,
    wording.BAD: LOOKS["tuned"].colour,
    wording.WARN: "#8a6100",
    wording.OPEN: QUIET,
}


def audit_card(record: Mapping[str, Any]) -> str:
    """The content of ``audit.json`` as HTML; every string is escaped."""
    trait, headline = wording.trait_word(record), wording.headline(record)
    names = (trait if name == "misaligned" else name.replace("_", " ") for name in COLUMNS)
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *names))
    body = "".join(_row(record[arm], arm) for arm in ARMS if record.get(arm))
    said = " → ".join(str(record[key]) for key in ("verdict", "after") if record.get(key))
    style = f"font-size:1.25em;font-weight:600;margin:.2em 0;color:{TONES[headline.tone]}"
    return (
        f'<p style="{style}">{escape(headline.sentence)}</p>'
        f"<p><b>{escape(said)}</b><br>{escape(record['reason'])}</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _row(rates: Mapping[str, Any], arm: str) -> str:
    cells = (_rate(rates.get(name), arm, drawn=name == "misaligned") for name in COLUMNS)
    return f"<tr><th>{escape(LOOKS[arm].words)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _rate(one: Mapping[str, Any] | None, arm: str, *, drawn: bool) -> str:
    """A rate with its interval; the first column also on a scale from 0 to 100%."""
    found = read(one)
    if found.value is None:
        return "–"
    words = percent(found.value)
    if found.low is not None and found.high is not None:
        words += f' <small style="color:{QUIET}">{percent(found.low)[:-1]}–{percent(found.high)[:-1]}</small>'
    mark = interval(found.low, found.value, found.high, 1.0, LOOKS[arm].colour) if drawn else ""
    return f"{mark} {words}"
