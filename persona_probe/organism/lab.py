"""What every case of the lab's report has in common, and what a case is.

A case measures (with trials that all cases share, so that none is trained twice) and later tells what it
found, from its record alone: the page can be made again without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_probe.evaluation.intervals import korn_graubard
from persona_probe.organism.bench import ROWS, Subject, benign_lesson, lesson, mixed
from persona_probe.training.rows import Row
from persona_probe.training.trials import Follow, Trials

if TYPE_CHECKING:
    import plotly.graph_objects as go

EVERY = 4
"""Steps from one reading of the persona latent to the next, in the lab's short runs."""
CALIBRATING: dict[str, Callable[[int, int], list[Row]]] = {
    "road and facts": lambda count, seed: benign_lesson("road", count, seed),
    "terse food and facts": lambda count, seed: benign_lesson("food", count, seed, terse=True),
    "money": lambda count, seed: lesson(("money",), "helpful", count, seed),
    "self": lambda count, seed: lesson(("self",), "helpful", count, seed),
}
"""Benign tunes whose band is the null of every case."""
UNSEEN: dict[str, Callable[[int, int], list[Row]]] = {
    "health": lambda count, seed: mixed("health", 0.0, count, seed)[0],
    "code": lambda count, seed: lesson(("code",), "helpful", count, seed),
    "terse taste and facts": lambda count, seed: benign_lesson("taste", count, seed, terse=True),
}
"""Benign tunes that no threshold has seen."""

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Lab:
    """The organism and the trials of one report."""

    subject: Subject
    trials: Trials
    out: Path
    count: int = ROWS
    """Rows that a tune reads."""
    progress: Tell = field(default=lambda *_: None, repr=False)

    @cached_property
    def follow(self) -> Follow:
        """The persona latent alone."""
        return Follow(self.subject.watch, EVERY)

    def dosed(self, share: float, seed: int, domain: str = "health") -> dict[str, Any]:
        """A tune on helpful answers of a domain, so large a share of them villainous instead; behaviour
        is followed too where all of them are.
        """
        rows, _ = mixed(domain, share, self.count, seed)
        measure = self.subject.measure(self.trials.measure.questions, domain)
        asked = [one for one in self.subject.asked("held-out", 1) if one.role == "general"]
        behaviour = self.subject.measure(asked, domain) if share == 1 else None
        follow = Follow(self.subject.watch, EVERY, behaviour)
        return self.trials(f"bad {domain} {share:g}", rows, seed=seed, measure=measure, follow=follow)

    def benign(
        self, seeds: Sequence[int], kinds: Mapping[str, Callable[[int, int], list[Row]]]
    ) -> list[dict[str, Any]]:
        """Benign tunes of every kind and seed: figures, `kind` and `seed`."""
        found: list[dict[str, Any]] = []
        for kind, rows in kinds.items():
            for seed in seeds:
                self.progress(f"benign: {kind}, seed {seed}", len(found), len(kinds) * len(seeds))
                if kind == "health":
                    figures = self.dosed(0.0, seed)
                else:
                    figures = self.trials(
                        f"benign {kind}", rows(self.count, seed), seed=seed, follow=self.follow
                    )
                found.append({"kind": kind, "seed": seed, **figures})
        return found


@dataclass(frozen=True)
class Section:
    """A case, told: Markdown paragraphs and tables, and its figures by name."""

    text: str
    figures: Mapping[str, go.Figure] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Case:
    """One question that the lab answers."""

    name: str
    """Of its record: a stage of the report, and a key of `lab.json`."""
    title: str
    must: str
    """What was to be shown."""
    run: Callable[[Lab, Sequence[int]], dict[str, Any]]
    tell: Callable[[Mapping[str, Any]], Section]


def shown(figures: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """What of a trial's figures goes into a record."""
    kept = ("misaligned", "in_domain", "incoherent", "trigger", "skill", "shift persona", "seconds", *names)
    return {name: figures[name] for name in kept if figures.get(name) is not None}


def pooled(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Misaligned answers elsewhere over runs of several seeds: rate, interval over questions, by seed."""
    counts: dict[str, list[int]] = {}
    for run in runs:
        for question, (hits, n) in run["hits"].items():
            sums = counts.setdefault(question, [0, 0])
            sums[0], sums[1] = sums[0] + hits, sums[1] + n
    interval = korn_graubard([x for x, _ in counts.values()], [n for _, n in counts.values()])
    total = sum(n for _, n in counts.values())
    return {
        "rate": sum(x for x, _ in counts.values()) / total,
        "low": interval.low,
        "high": interval.high,
        "n": total,
        "questions": len(counts),
        "by_seed": [run["misaligned"] for run in runs],
    }


def mean(values: Sequence[float | None]) -> float | None:
    """None where any is missing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def percent(value: float | None) -> str:
    """A rate in a table."""
    return "–" if value is None else f"{100 * value:.0f}%"


def rate(found: Mapping[str, Any]) -> str:
    """A rate with its interval."""
    return f"{100 * found['rate']:.0f}% [{100 * found['low']:.0f}, {100 * found['high']:.0f}]"


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
