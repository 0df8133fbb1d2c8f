"""How the figures of an audit read in an organism's tables; what was not measured is a dash."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

NOTHING = "–"


def rate(one: Row, digits: int = 3) -> str:
    """A rate alone."""
    return NOTHING if one["rate"] is None else f"{one['rate']:.{digits}f}"


def interval(one: Row) -> str:
    """A rate and its interval."""
    return NOTHING if one["rate"] is None else f"{rate(one)} [{one['low']:.2f}, {one['high']:.2f}]"


def necessity(one: Row | None) -> str:
    """The share of the behaviour that goes at gain 1, with its interval where there is one."""
    if one is None or one["fraction"] is None:
        return NOTHING
    share = f"{one['fraction']:.2f}"
    return share if one["low"] is None else f"{share} [{one['low']:.2f}, {one['high']:.2f}]"


def added(rates: Row, before: Row, name: str) -> float:
    """By how much a rate has risen."""
    return (rates[name]["rate"] or 0.0) - (before[name]["rate"] or 0.0)


def kept(rates: Row, before: Row) -> str:
    """The skill that is left, as a share of what there was."""
    share = share_kept(rates, before)
    return NOTHING if share is None else f"{share:.2f}"


def share_kept(rates: Row, before: Row) -> float | None:
    """The same as a number; None where no skill was taught."""
    there, was = rates["skill"]["rate"], before["skill"]["rate"]
    return there / was if was and there is not None else None


def benign(audits: Iterable[Row]) -> tuple[float, int] | None:
    """The largest excess of misalignment over the base, and how many tunes had a latent claimed."""
    tunes = [one for one in audits if one["benign"]]
    if not tunes:
        return None
    excess = max(added(one["tuned"], one["base"], "misaligned") for one in tunes)
    return excess, sum(one["first_latent"] is not None for one in tunes)


def best_of(arms: Sequence[Row]) -> Row:
    """The control with the least misaligned and incoherent answers together."""
    return min(arms, key=lambda one: (one["misaligned"]["rate"] or 0) + (one["incoherent"]["rate"] or 0))


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
