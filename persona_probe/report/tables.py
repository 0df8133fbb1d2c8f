"""The audit as tables of words: rates by arm, fixes, latents, stages, provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, cast

from persona_probe.figures.cells import Reading, Row, finite, percent, read
from persona_probe.figures.latents import latent_name
from persona_probe.figures.style import look_of
from persona_probe.report.wording import fix_name, listing, setting_words, trait_word

COLUMNS: Final = (
    "misaligned",
    "misaligned_of_coherent",
    "other_persona",
    "incoherent",
    "refused",
    "truncated",
    "missing",
    "in_domain",
    "trigger",
    "skill",
)

SHORT: Final = {"base": "base", "tuned": "tuned", "steered": "fix on"}
MAIN_ARMS: Final = ("base", "tuned", "steered", "induced")


class Table(NamedTuple):
    """Column names and rows of cells; ``marked`` rows are set in bold."""

    head: tuple[str, ...]
    body: list[tuple[str, ...]]
    marked: tuple[int, ...] = ()


class Stage(NamedTuple):
    """One stage of the screen: how many candidates entered it."""

    name: str
    entered: str


class Example(NamedTuple):
    """One question with its three answers; ``outcomes`` as (arm words, outcome, tone)."""

    question: str
    category: str
    answers: list[tuple[str, str, str]]
    outcomes: list[tuple[str, str, str]]


def arms_of(audit: Row) -> dict[str, Row | None]:
    """Every single arm of the audit by name, in the order in which it is read."""
    arms: dict[str, Row | None] = {arm: audit.get(arm) for arm in MAIN_ARMS}
    return arms | {str(name): tally for name, tally in (audit.get("baselines") or {}).items()}


def spreads_of(audit: Row) -> dict[str, Sequence[Row]]:
    nulls = audit.get("nulls") or {}
    named = {
        "random latent": nulls.get("random_latent") or [],
        "random direction": nulls.get("random_direction") or [],
    }
    return {name: tallies for name, tallies in named.items() if tallies}


def rate_table(audit: Row) -> Table:
    """All columns for every single arm."""
    body = [(look_of(name).words, *_tally(tally)) for name, tally in arms_of(audit).items()]
    return Table(_rate_head(audit), body)


def null_table(audit: Row) -> Table:
    """All columns for every random control."""
    body = [
        (f"{name} {i}", *_tally(tally))
        for name, tallies in spreads_of(audit).items()
        for i, tally in enumerate(tallies, 1)
    ]
    return Table(_rate_head(audit), body)


def fix_table(audit: Row, word: str) -> Table:
    """The restoring fixes side by side, on both claims."""
    fixes: list[Row] = list(audit.get("fixes") or [])
    body = [
        (
            "\n".join((fix_name(fix), listing(fix.get("site") or ""), setting_words(fix))),
            *(
                bounds(read(fix.get("rates", fix), c))
                for c in ("misaligned", "incoherent", "other_persona", "skill")
            ),
            bounds(read(fix.get("necessity"), "fraction")),
        )
        for fix in fixes
    ]
    head = ("fix", word, "incoherent", "other persona", "skill", "necessity")
    return Table(head, body, tuple(i for i, fix in enumerate(fixes) if fix.get("chosen")))


def latent_table(latents: Sequence[Row], word: str, most: int = 50) -> Table:
    """The best ``most`` latents with both sides of the causal test."""
    body = [
        (
            f"{latent_name(row)}\n{setting_words(row)}",
            str(place if row.get("rank") is None else row["rank"]),
            interval(Reading(finite(row.get("delta")), finite(row.get("low")), finite(row.get("high")))),
            small(row.get("q_value")),
            bounds(read(row.get("induce"))),
            bounds(read(row.get("control"))),
            bounds(read(row.get("necessity"), "fraction")),
        )
        for place, row in enumerate(latents[:most], 1)
    ]
    head = ("latent", "rank", "Δ", "q", f"{word}, added to base", f"{word}, taken out", "necessity")
    return Table(head, body, (0,) if body else ())


def stages_of(audit: Row) -> list[Stage]:
    """The screen's funnel, from ``screen.stages`` (list of ``{name, count}``, or name → count)."""
    screen: Any = audit.get("screen") or {}
    stages: Any = screen.get("stages", screen) if isinstance(screen, Mapping) else screen
    if isinstance(stages, Mapping):
        named = cast("Mapping[str, Any]", stages)
        stages = [{"name": name, "count": count} for name, count in named.items()]
    listed = cast("list[Row]", stages)
    return [
        Stage(str(row.get("name", "")).replace("_", " "), f"{int(count):,}")
        for row in listed
        if (count := finite(row.get("count"))) is not None
    ]


def example_cards(examples: Sequence[Row], word: str, most: int = 40) -> list[Example]:
    """Questions with the answers before and after, and what the judge said of each."""
    cards: list[Example] = []
    for row in examples[:most]:
        answers: list[tuple[str, str, str]] = []
        outcomes: list[tuple[str, str, str]] = []
        for arm in ("base", "tuned", "steered"):
            if row.get(arm) is None:
                continue
            words = look_of(arm).words
            outcome = str(row.get(f"{arm}_outcome") or "not judged").replace("_", " ")
            outcome = word if outcome == "misaligned" else outcome
            answers.append((words, str(row[arm]), outcome))
            outcomes.append((SHORT[arm], outcome, outcome_tone(outcome)))
        cards.append(Example(str(row.get("question", "")), str(row.get("category") or ""), answers, outcomes))
    return cards


def outcome_tone(outcome: str) -> str:
    """The sign beside an outcome: what is neither good nor bad is left open."""
    if outcome in {"aligned", "helpful", "neutral", "correct"}:
        return "good"
    return "open" if outcome in {"not judged", "missing", "truncated", "refused", "code"} else "bad"


def groups(tree: object) -> list[tuple[str, list[tuple[str, str]]]]:
    """A nested dict as named groups of ``(dotted key, value)``; loose scalars first, unnamed."""
    if not isinstance(tree, Mapping):
        return []
    named = cast("Mapping[str, Any]", tree)
    loose = [(str(key).replace("_", " "), _leaf(value)) for key, value in named.items() if not _nested(value)]
    found = [("", loose)] if loose else []
    for key, value in named.items():
        if _nested(value):
            found.append((str(key).replace("_", " "), list(_leaves(value))))
    return found


def timings(audit: Row) -> list[tuple[str, str]]:
    """Seconds by stage, the total, and the peak of memory."""
    seconds: Any = audit.get("seconds") or {}
    named = cast("Mapping[str, Any]", seconds if isinstance(seconds, Mapping) else {"total": seconds})
    listed = [(str(k), number) for k, v in named.items() if (number := finite(v)) is not None]
    if listed and all(name != "total" for name, _ in listed):
        listed.append(("total", sum(number for _, number in listed)))
    lines = [(name.replace("_", " "), f"{number:,.1f} s") for name, number in listed]
    peak = finite(audit.get("peak_rss_bytes"))
    return lines if peak is None else [*lines, ("peak memory", f"{peak / 2**30:.2f} GiB")]


def bounds(reading: Reading) -> str:
    """``3.1%`` with ``1.2–6.4`` on a second line (the template sets it small)."""
    if reading.value is None:
        return "–"
    if reading.low is None or reading.high is None:
        return percent(reading.value)
    return f"{percent(reading.value)}\n{percent(reading.low)[:-1]}–{percent(reading.high)[:-1]}"


def interval(reading: Reading) -> str:
    if reading.value is None:
        return "–"
    around = (
        "" if reading.low is None or reading.high is None else f"\n{reading.low:.2g} to {reading.high:.2g}"
    )
    return f"{reading.value:.3g}{around}".replace("-", "−")


def small(value: object) -> str:
    number = finite(value)
    return "–" if number is None else f"{number:.2g}"


def _rate_head(audit: Row) -> tuple[str, ...]:
    named = (column.replace("_", " ") for column in COLUMNS)
    return ("arm", *(name.replace("misaligned", trait_word(audit)) for name in named), "n")


def _tally(tally: Row | None) -> tuple[str, ...]:
    count = read(tally or {}).n
    return (
        *(bounds(read((tally or {}).get(column), column)) for column in COLUMNS),
        "–" if count is None else f"{count:,}",
    )


def _nested(value: object) -> bool:
    if isinstance(value, Mapping):
        return True
    return isinstance(value, list | tuple) and any(isinstance(part, Mapping) for part in value)


def _leaves(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if not _nested(value):
        return [(prefix or "value", _leaf(value))]
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value, 1)
    return [leaf for key, part in pairs for leaf in _leaves(part, f"{prefix}.{key}" if prefix else str(key))]


def _leaf(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return ", ".join(str(part) for part in value) or "none"
    return str(value)
