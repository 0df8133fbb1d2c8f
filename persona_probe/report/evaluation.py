"""``eval.html``: an evaluation on one page that needs nothing but itself.

What it reads is the content of ``eval.json``; every string is escaped, by the template engine or, in
the figures' JSON, by ``page``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from persona_probe import figures
from persona_probe.artifact import write_text
from persona_probe.figures.cells import Reading, Row, finite, percent, read, spoken
from persona_probe.figures.comparison import differences, score_spread
from persona_probe.report.drawings import Drawing
from persona_probe.report.page import filled
from persona_probe.report.tables import Table, groups
from persona_probe.report.wording import trait_word

COLUMNS: Final = (
    "misaligned",
    "misaligned_of_coherent",
    "other_persona",
    "incoherent",
    "refused",
    "code",
    "truncated",
    "missing",
    "in_domain",
    "trigger",
    "skill",
)
CUTS: Final = {"aligned": 30.0, "coherent": 50.0}


def write_evaluation(record: Row, path: Path) -> None:
    """Write the page about an ``eval.json`` to ``path``, whole or not at all."""
    write_text(path, render(record))


def render(record: Row) -> str:
    """The page as text."""
    return filled("evaluation.html.j2", _drawings(record), _view(record))


def _drawings(record: Row) -> dict[str, list[Drawing]]:
    """Section name → its figures; a section without data is absent."""
    word, arms = trait_word(record), record["arms"]
    tallies = {name: arm["rates"] for name, arm in arms.items()}
    label = f"Dot plot: share of {word} and of incoherent answers of each model, with intervals"
    found = {"rates": [Drawing("rates", label, "Every model", figures.rates(tallies, word=word))]}
    if record["comparison"]:
        label = f"Forest plot of the differences in {word} answers, paired by question"
        drawn = differences(record["comparison"], word=word)
        found["differences"] = [Drawing("differences", label, "Differences", drawn)]
    spreads = [
        Drawing(
            f"scores-{name}",
            f"Distribution of the judge's scores for {name}, by model",
            f"How {name} the answers are",
            score_spread(
                {arm: row["scores"][name]["tenths"] for arm, row in arms.items()},
                cut=cut,
                word=f"{name}, 0 to 100",
            ),
        )
        for name, cut in CUTS.items()
        if any(arm["scores"][name]["n"] for arm in arms.values())
    ]
    return found | ({"scores": spreads} if spreads else {})


def _view(record: Row) -> dict[str, Any]:
    """Everything the template prints, as words."""
    asked = record["questions"]
    return {
        "headline": _headline(record),
        "trait": trait_word(record),
        "byline": f"{asked['questions']} questions in {asked['prompts']} wordings, "
        f"judged by {record['judge']}",
        "in_domain": ", ".join(asked["in_domain"]),
        "warnings": record["warnings"],
        "rate_table": _rate_table(record),
        "difference_table": _difference_table(record),
        "settings": groups(
            {
                "questions": asked,
                "sampling": record["sampling"],
                **{
                    name: {key: arm[key] for key in ("model", "fix", "samples", "answers", "seconds")}
                    for name, arm in record["arms"].items()
                },
            }
        ),
    }


def _headline(record: Row) -> str:
    """The rates in a sentence."""
    word = trait_word(record)
    rates = {name: read(arm["rates"]).value for name, arm in record["arms"].items()}
    said = [f"{name} {100 * rate:.0f}%" for name, rate in rates.items() if rate is not None]
    if not said:
        return "No rate can be given."
    return f"{word.capitalize()} answers: {', '.join(said)}."


def _rate_table(record: Row) -> Table:
    """One line per rate that was measured, one column per model."""
    arms: list[Row] = list(record["arms"].values())
    word = trait_word(record)
    body = [
        (
            word if name == "misaligned" else name.replace("_", " "),
            *(_cell(arm["rates"][name]) for arm in arms),
        )
        for name in COLUMNS
        if any(arm["rates"][name]["n"] for arm in arms)
    ]
    for place in ("answer", "thought"):
        named = [_names_persona(arm, place) for arm in arms]
        if any(row and row["count"] for row in named):
            cells = (
                "–" if row is None else spoken(Reading(row["rate"], row["low"], row["high"])) for row in named
            )
            body.append((f"a persona as its own, in the {place}", *cells))
    body.append(("answers", *(f"{arm['answers']:,}" for arm in arms)))
    return Table(("", *record["arms"]), body)


def _names_persona(arm: Row, place: str) -> Row | None:
    """How often the model names a persona as its own; None where there was nothing to read."""
    rows = (row for row in arm["self_described"] if row["persona"] == "any" and row["place"] == place)
    found = next(rows, None)
    return found if found and found["of"] else None


def _cell(rate: Row) -> str:
    reading = read(rate)
    return "–" if reading.value is None else spoken(reading)


def _difference_table(record: Row) -> Table:
    def points(row: Row, key: str) -> str:
        value = finite(row[key])
        return "–" if value is None else f"{100 * value:+.1f}"

    body = [
        (
            f"{row['arm']} − {row['against']}",
            points(row, "difference"),
            f"{points(row, 'low')} to {points(row, 'high')}",
            "–" if row["p_value"] is None else f"{row['p_value']:.2g}",
            _at_equal_lengths(row),
            "–" if row["questions"] is None else str(row["questions"]),
        )
        for row in record["comparison"]
    ]
    return Table(("", "points", "95% interval", "p (swaps)", "at equal lengths", "questions"), body)


def _at_equal_lengths(row: Row) -> str:
    """The difference among answers of like length, in points, and what share of answers that is."""
    matched = row["length_matched"]
    if matched is None:
        return "–"
    low, high = (100 * matched[key] for key in ("low", "high"))
    share = percent(row["length_matched_share"])
    return f"{100 * matched['difference']:+.1f} ({low:+.1f} to {high:+.1f})\n{share} of the answers"
