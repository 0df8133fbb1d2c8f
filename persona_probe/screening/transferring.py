"""Transfer: does a fix found on one fine-tune cure another?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import polars as pl

from persona_probe.errors import InputError, MismatchError
from persona_probe.evaluation.intervals import necessity
from persona_probe.evaluation.result import EvalResult
from persona_probe.model.language_model import LanguageModel
from persona_probe.screening.calibrate import Bench
from persona_probe.steering.plan import PlannedEdit

if TYPE_CHECKING:
    import plotly.graph_objects as go

NO_FIX = "none"


@dataclass(frozen=True, eq=False)
class Transfer:
    """Every fix on every tune, and each tune without one."""

    results: Mapping[tuple[str, str], EvalResult]
    """By (fix, tune); the fix `none` is the tune as it is."""
    base: EvalResult | None
    """The base model, where it was asked too."""

    @cached_property
    def table(self) -> pl.DataFrame:
        """One row per fix and tune: the rates, what the tune does without a fix (`before`), and, with
        a base, which fraction of the excess over it is `removed` (with its interval).
        """
        rows: list[dict[str, Any]] = []
        for (fix, tune), result in self.results.items():
            before, rates = self.results[NO_FIX, tune], result.rates
            removed = None
            if self.base is not None and fix != NO_FIX:
                removed = necessity(self.base.hits, before.hits, result.hits)
            rows.append(
                {
                    "fix": fix,
                    "tune": tune,
                    "own": fix == tune,
                    "misaligned": rates["misaligned"].rate,
                    "low": rates["misaligned"].low,
                    "high": rates["misaligned"].high,
                    "before": before.rates["misaligned"].rate,
                    "removed": removed and removed.fraction,
                    "removed_low": removed and removed.low,
                    "removed_high": removed and removed.high,
                    "other_persona": rates["other_persona"].rate,
                    "incoherent": rates["incoherent"].rate,
                    "n": rates["misaligned"].n,
                    "missing": rates["misaligned"].missing,
                }
            )
        return pl.DataFrame(rows, infer_schema_length=None)

    def plot(self) -> go.Figure:
        """Fixes down, tunes across: the rate that is left."""
        from persona_probe.figures.grid import transfer as drawn

        return drawn(self.table.to_dicts())

    def _repr_html_(self) -> str:
        return self.table._repr_html_()  # pyright: ignore[reportPrivateUsage]


def transfer(
    fixes: Mapping[str, Sequence[PlannedEdit]],
    tunes: Mapping[str, LanguageModel],
    bench: Bench,
    *,
    base: LanguageModel | None = None,
    **options: Any,
) -> Transfer:
    """Answers of every tune under every fix, by name; a fix and the tune it was found on share theirs.

    All fixes of one tune are rows of the same batches, with the same random numbers. Raises
    `InputError` without fixes or tunes, `MismatchError` for a tune of another width.
    """
    if not fixes or not tunes:
        raise InputError("a transfer needs at least one fix and one tune")
    if NO_FIX in fixes:
        raise InputError(f"no fix can be called {NO_FIX!r}: that is the tune as it is")
    widths = {name: lm.d_model for name, lm in tunes.items()}
    if len(set(widths.values())) > 1:
        raise MismatchError(f"the tunes differ in width: {widths}", fix="compare tunes of one base model")
    results: dict[tuple[str, str], EvalResult] = {}
    names = [NO_FIX, *fixes]
    for tune, lm in tunes.items():
        arms = bench.arms(lm, [(), *(tuple(fix) for fix in fixes.values())], **options)
        results |= {(name, tune): arm for name, arm in zip(names, arms, strict=True)}
    before = None if base is None else bench.arms(base, [()], **options)[0]
    return Transfer(results, before)
