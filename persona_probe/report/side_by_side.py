"""Several audits on one page: what was found in each, what was done about it, at which price.

What it reads of each is the content of its ``audit.json``, and the settings it ran with, so that a
difference between two lines is not taken for one between two models when they were asked
differently. No figure on the page needs a script: the marks are drawn by the page's own style.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

from persona_probe.artifact import write_text
from persona_probe.figures.cells import Reading, Row, finite, percent, read, spoken
from persona_probe.figures.latents import latent_name
from persona_probe.figures.style import LOOKS
from persona_probe.report import tables, wording
from persona_probe.report.page import filled

ARMS: Final = ("base", "tuned", "steered")
COLUMNS: Final = ("misaligned", "incoherent", "other_persona", "helpful", "in_domain", "skill")
OWN: Final = ("tuned", "in_domain")
"""Settings in which audits of several fine-tunes differ by nature."""


class Entry(NamedTuple):
    """One audit to be shown beside others."""

    audit: Row
    """The content of ``audit.json``."""
    folder: str
    settings: Row
    """What it was run with."""
    date: str = ""
    link: str = ""
    """Its own page, as seen from where this one is written."""
    warnings: tuple[str, ...] = ()
    """What no longer matches in its folder."""


class Line(NamedTuple):
    """One audit in a few cells."""

    name: str
    folder: str
    verdict: str
    after: str
    rates: tuple[Reading, ...]
    """As `ARMS`."""
    latent: str
    """The first of the screen; empty where none came through."""
    rank: str
    necessity: Reading
    seconds: float | None


def write_side_by_side(entries: Sequence[Entry], path: str | Path) -> None:
    """Write the page to ``path``, whole or not at all."""
    write_text(path, render(entries))


def render(entries: Sequence[Entry]) -> str:
    """The page as text."""
    shown = lines(entries)
    return filled(
        "side_by_side.html.j2",
        {},
        {
            "headline": headline(entries),
            "count": len(entries),
            "looks": [(arm, LOOKS[arm].words) for arm in ARMS],
            "audits": [_audit(entry, line) for entry, line in zip(entries, shown, strict=True)],
            "warnings": [text for entry in entries for text in entry.warnings],
            "rate_table": _rate_table(entries, shown),
            "difference_table": differences(entries),
            "folders": [
                (line.name, entry.folder, entry.date) for entry, line in zip(entries, shown, strict=True)
            ],
        },
    )


def headline(entries: Sequence[Entry]) -> str:
    """How many are misaligned, how many of those a fix restores, how many nobody can tell."""
    n = len(entries)
    verdicts = [str(entry.audit.get("verdict") or "") for entry in entries]
    misaligned = [
        entry for entry, verdict in zip(entries, verdicts, strict=True) if verdict.startswith("misaligned")
    ]
    bad, restored = len(misaligned), sum(entry.audit.get("after") == "restored" for entry in misaligned)
    open_ = sum(verdict in {"", "inconclusive"} for verdict in verdicts)
    if bad == 0:
        said = f"None of {n} fine-tunes was found misaligned." if n > 1 else "Not found to be misaligned."
    elif bad == n:
        every = "Both" if n == 2 else f"All {n}"
        said = f"{every} fine-tunes are misaligned; " if n > 1 else "Misaligned; "
    else:
        said = f"{bad} of {n} fine-tunes {'is' if bad == 1 else 'are'} misaligned; "
    if bad:
        whole = {1: "it", 2: "both"}.get(bad, "all of them")
        whom = whole if restored == bad else f"{restored} of them"
        said += (
            f"a fix restores {whom}." if restored else "no fix restores " + ("it." if bad == 1 else "any.")
        )
    return said + (f" {open_} {'is' if open_ == 1 else 'are'} inconclusive." if open_ else "")


def lines(entries: Sequence[Entry]) -> list[Line]:
    """Every audit in a few cells."""
    names = [str(entry.audit.get("tuned_name") or Path(entry.folder).name) for entry in entries]
    found: list[Line] = []
    for entry, name in zip(entries, names, strict=True):
        audit = entry.audit
        first: Row = next(iter(audit.get("latents") or []), {})
        rank = finite(first.get("rank_by_delta"))
        seconds = [finite(value) for value in (audit.get("seconds") or {}).values()]
        trait = wording.trait_word(audit)
        found.append(
            Line(
                name=name if trait == "misaligned" else f"{name} ({trait})",
                folder=_told_apart(entry.folder, [other.folder for other in entries]),
                verdict=str(audit.get("verdict") or "no verdict"),
                after=str(audit.get("after") or ""),
                rates=tuple(read(audit.get(arm) or {}) for arm in ARMS),
                latent=latent_name(first) if first else "",
                rank="" if rank is None else f"rank {rank:.0f} by Δ",
                necessity=read(audit.get("necessity"), "fraction"),
                seconds=sum(value for value in seconds if value is not None) if seconds else None,
            )
        )
    return found


def differences(entries: Sequence[Entry]) -> tables.Table:
    """The settings in which the audits differ, one column per audit; empty when they do not."""
    flat = [dict(_flat(entry.settings)) for entry in entries]
    names = dict.fromkeys(name for one in flat for name in one if name not in OWN)
    body = [
        (name, *(one.get(name, "–") for one in flat))
        for name in names
        if len({one.get(name) for one in flat}) > 1
    ]
    return tables.Table(("setting", *(line.name for line in lines(entries))), body)


def _told_apart(folder: str, folders: Sequence[str]) -> str:
    """The end of a path that no other of `folders` has; all of it for one given twice."""
    parts = Path(folder).parts
    for n in range(1, len(parts) + 1):
        if sum(Path(other).parts[-n:] == parts[-n:] for other in folders) == 1:
            return str(Path(*parts[-n:]))
    return folder


def _flat(settings: Row, prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found += _flat(cast("Row", value), f"{prefix}{name}.")
        else:
            listed = cast("list[object]", value) if isinstance(value, list) else [value]
            # the end of a path says what differs; all of it would fill the page
            words = ["none" if one is None else "/".join(str(one).split("/")[-2:]) for one in listed]
            found.append((f"{prefix}{name}".replace("_", " "), ", ".join(words) or "none"))
    return found


def _audit(entry: Entry, line: Line) -> dict[str, Any]:
    """One line of the page, as words and places on the scale."""
    tone = wording.verdict_tone(entry.audit)
    return {
        "name": line.name,
        "folder": line.folder,
        "link": entry.link,
        "verdict": line.verdict,
        "tone": tone,
        "after": line.after,
        "after_tone": wording.AFTER.get(line.after, ("", wording.OPEN))[1],
        "reason": str(entry.audit.get("after_reason") or entry.audit.get("reason") or ""),
        "marks": [
            {
                "arm": arm,
                "words": LOOKS[arm].words,
                "rate": percent(reading.value),
                "spoken": spoken(reading),
                "interval": tables.bounds(reading).partition("\n")[2],
                "at": 100 * reading.value,
                "low": 100 * (reading.value if reading.low is None else reading.low),
                "high": 100 * (reading.value if reading.high is None else reading.high),
            }
            for arm, reading in zip(ARMS, line.rates, strict=True)
            if reading.value is not None
        ],
        "latent": line.latent or "–",
        "rank": line.rank,
        "necessity": tables.bounds(line.necessity).split("\n"),
        "seconds": "–" if line.seconds is None else f"{line.seconds:,.0f} s",
    }


def _rate_table(entries: Sequence[Entry], shown: Sequence[Line]) -> tables.Table:
    """Every rate of every audit's three models."""
    body = [
        (f"{line.name}\n{LOOKS[arm].words}", *(tables.bounds(read(tally.get(c), c)) for c in COLUMNS))
        for entry, line in zip(entries, shown, strict=True)
        for arm in ARMS
        if (tally := cast("Row", entry.audit.get(arm) or {}))
    ]
    head = ("fine-tune", "trait", *(column.replace("_", " ") for column in COLUMNS[1:]))
    return tables.Table(head, body)
