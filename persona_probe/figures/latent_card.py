"""A latent on a card: what it fires on, says and does, as HTML for a notebook cell or a page.

Drawn from the plain values of `Interpretation.summary`, which is what `interpretation.json` holds, so that
a card can be shown again without the model. Every string is escaped; examples, which may be harmful text,
are folded away.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Final

from persona_probe.figures.cells import Row, finite, percent, read, spoken
from persona_probe.figures.highlight import Token, excerpt, highlight
from persona_probe.figures.small import bars, interval, lines
from persona_probe.figures.style import ARMS, LOOKS, QUIET

STRONGEST: Final = 5
GROUPS: Final = 3
"""Groups of documents that are listed of each label."""
_CELL = f'style="text-align:left;vertical-align:top;padding:3px 16px 3px 0;color:{QUIET};font-weight:500"'
_TEXT = 'style="text-align:left;vertical-align:top;padding:3px 0;overflow-wrap:anywhere"'


def latent_card(record: Row, *, drawn: bool = True) -> str:
    """The card of one latent.

    ``record``: as `Interpretation.summary` gives it; ``effect`` and ``dose`` in it are optional. ``drawn``
    leaves out the small drawings where a page has figures of its own.
    """
    latent = record["latent"]
    facts = (
        f"fires on {percent(record['rate'])} of {record['tokens']:,} tokens, in "
        f"{record['documents_fired']:,} of {record['documents']:,} documents ({record['model']})"
    )
    lead = f"<p><b>{escape(latent['site'])} #{latent['index']}</b> {escape(facts)}</p>"
    table = "".join(
        f"<tr><th {_CELL}>{escape(name)}</th><td {_TEXT}>{cell}</td></tr>" for name, cell in _rows(record)
    )
    pictures = _pictures(record) if drawn else ""
    return f'{lead}<table style="border-collapse:collapse">{table}</table>{pictures}{examples(record)}'


def examples(record: Row) -> str:
    """The strongest documents and some of every quantile, folded."""
    runs = [("strongest documents", list(record["top"][:STRONGEST]))]
    n = len(record["quantiles"])
    for i, run in reversed(list(enumerate(record["quantiles"]))):
        runs.append((f"{percent(i / n)[:-1]} to {percent((i + 1) / n)} of the documents it fires on", run))
    peak = max((finite(one["maximum"]) or 0.0 for one in record["top"]), default=0.0)
    return "".join(
        f"<details><summary>{escape(name)} ({len(run)})</summary>{_documents(run, peak)}</details>"
        for name, run in runs
        if run
    )


def _documents(run: Sequence[Row], peak: float) -> str:
    return "".join(
        f'<p style="margin:.3em 0;overflow-wrap:anywhere" title="{escape(str(one["place"]))}">'
        f"<code>{one['maximum']:.2f}</code> "
        f"{highlight(excerpt([Token(*token) for token in one['tokens']]), peak)}</p>"
        for one in run
    )


def _rows(record: Row) -> Iterable[tuple[str, str]]:
    effect = record.get("effect") or {}
    delta = finite(effect.get("delta"))
    if delta is not None:
        yield "Δ, tuned − base", escape(_delta(effect, delta))
    for name, column in (("added to the base", "induce"), ("taken out of the tuned", "control")):
        if read(effect.get(column)).value is not None:
            yield name, escape(spoken(read(effect[column])))
    if (share := finite(effect.get("necessity"))) is not None:
        yield "necessity", escape(f"{percent(share)} of the excess goes with it, at gain 1")
    if record["terms"]:
        yield (
            "words around it",
            f"{escape(', '.join(record['terms']))}{_scored(record.get('terms_detection'))}",
        )
    said = record.get("explanation")
    if said:
        yield "in a sentence", f"{escape(said['text'])}{_scored(said.get('detection'), said['judge'])}"
    for name, side in (("raises", "top"), ("lowers", "bottom")):
        yield name, escape(", ".join(_token(token) for token, _ in record["lens"][side]))
    if record["sources"]:
        yield "driven by", _sources(record["sources"])
    for name, key, what in (("fires with", "together", "share"), ("points like", "neighbours", "cosine")):
        if record[key]:
            said = [f"#{row['index']} ({row[what]:.2f})" for row in record[key][:5]]
            yield name, escape(", ".join(said))


def _token(text: str) -> str:
    """A token as one reads it; quoted where more than a space before the word would be lost."""
    word = text.removeprefix(" ")
    return word if word and word == word.strip() and word.isprintable() and "," not in word else repr(text)


def _delta(effect: Row, delta: float) -> str:
    low, high, q = (finite(effect.get(name)) for name in ("low", "high", "q_value"))
    around = "" if low is None or high is None else f" ({low:.3g} to {high:.3g})"
    rank = finite(effect.get("rank_by_delta"))
    place = "" if rank is None else f", rank {rank:.0f} by size"
    return f"{delta:+.3g}{around}{place}" + ("" if q is None else f", q = {q:.2g} against benign fine-tunes")


def _scored(found: Row | None, by: str = "these words alone") -> str:
    if not found:
        return ""
    words = (
        f"{by}, on {found['documents']} held-out documents: AUC {found['auc']:.2f} "
        f"({found['low']:.2f} to {found['high']:.2f}); labels shuffled {found['null']:.2f}, "
        f"97.5% below {found['null_high']:.2f}"
    )
    return f'<br><small style="color:{QUIET}">{escape(words)}</small>'


def drivers(sources: Sequence[Row]) -> list[Row]:
    """The groups of documents that drive a latent most, some of every label, label by label."""
    by_label: dict[str, list[Row]] = {}
    for row in sources:
        by_label.setdefault(str(row["label"]), []).append(row)
    return [row for groups in by_label.values() for row in groups[:GROUPS]]


def _sources(table: Sequence[Row]) -> str:
    shown = drivers(table)
    most = max([finite(row["high"]) or finite(row["mean"]) or 0.0 for row in shown], default=0.0)
    return "".join(
        f'<div style="display:flex;gap:10px;align-items:center">'
        f"{interval(row['low'], row['mean'], row['high'], most)}"
        f"<span>{escape(str(row['label']))} = {escape(str(row['value']))} "
        f'<small style="color:{QUIET}">mean {row["mean"]:.3g}, {row["documents"]:,} documents</small>'
        "</span></div>"
        for row in shown
    )


def _pictures(record: Row) -> str:
    blue = ARMS["latent"].colour
    sizes, places = record["histogram"], record["places"]
    low, high, last = f"{sizes[0]['low']:.3g}", f"{sizes[-1]['high']:.3g}", f"token {places[-1]['last']:,}"
    found = [
        bars([row["tokens"] for row in sizes], "tokens by activation", low, high, blue),
        bars([row["rate"] for row in places], "firing rate by place", "0", last, blue),
    ]
    for direction, words, arm in (("up", "misaligned when added", "induced"),
                                  ("down", "misaligned when taken out", "latent")):  # fmt: skip
        dose = [row for row in record.get("dose") or () if row.get("direction") == direction]
        if dose:
            colour = LOOKS["induced"].colour if arm == "induced" else blue
            found.append(lines(dose, words, colour))
    return f'<div style="display:flex;flex-wrap:wrap;gap:8px 28px;margin:8px 0">{"".join(found)}</div>'
