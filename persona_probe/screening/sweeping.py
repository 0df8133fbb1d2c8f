"""Sweep: many latents at many levels, all of them rows of the same batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import polars as pl

from persona_probe.errors import InputError, MismatchError
from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.judges import Judge, load_judge
from persona_probe.evaluation.metrics import Rate, check_judge, tally
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.sampling import Sampling
from persona_probe.model.language_model import LanguageModel
from persona_probe.sae.load import Dictionary, Latent
from persona_probe.screening.arms import answers_under
from persona_probe.steering.intervention import Condition, Intervention, Level, Op, Positions, Unit
from persona_probe.steering.target import Read, Target, latents

if TYPE_CHECKING:
    import plotly.graph_objects as go

COLUMNS = ("misaligned", "other_persona", "incoherent", "truncated", "missing")


@dataclass(frozen=True, eq=False)
class Swept:
    """One target at one level, and what was answered under it."""

    intervention: Intervention
    level: float
    """In the sweep's unit."""
    answers: tuple[Answer, ...]
    rates: dict[str, Rate] | None
    """None without a judge."""


@dataclass(frozen=True, eq=False)
class Sweep:
    """Every target at every level. Shown in a notebook as its table."""

    points: tuple[Swept, ...]
    unit: Unit
    reference: dict[str, Rate] | None
    """Without an edit."""

    @cached_property
    def table(self) -> pl.DataFrame:
        """One row per target and level: label, site, level, the rates (null without a judge)."""
        rows: list[dict[str, Any]] = []
        for point in self.points:
            row: dict[str, Any] = {
                "target": str(point.intervention.target),
                "site": point.intervention.site,
                "level": point.level,
                "unit": self.unit,
                "answers": len(point.answers),
            }
            for name in COLUMNS:
                rate = None if point.rates is None else point.rates[name]
                row[name] = None if rate is None else rate.rate
                if name == "misaligned":
                    row |= {"low": rate and rate.low, "high": rate and rate.high}
            rows.append(row)
        return pl.DataFrame(rows, infer_schema_length=None)

    def plot(self) -> go.Figure:
        """Dose and response, a line per target."""
        from persona_probe.figures import dose_response

        rows = [
            row | {"arm": row["target"], "strength": row["level"], "strength_unit": row["unit"]}
            for row in self.table.to_dicts()
        ]
        reference = None if self.reference is None else self.reference["misaligned"].rate
        return dose_response(rows, reference=reference)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()  # pyright: ignore[reportPrivateUsage]


def sweep(
    lm: LanguageModel,
    targets: Sequence[Target | Latent | tuple[Target, str]] | Dictionary,
    levels: Sequence[float],
    questions: Sequence[Question],
    judge: Judge | str | None = None,
    *,
    ids: Sequence[int] | None = None,
    op: Op = "add",
    site: str | None = None,
    unit: Unit = "absolute",
    scale: float | Sequence[float] = 1.0,
    positions: Positions = "all",
    read: Read | str = "auto",
    gain: float = 1.0,
    condition: Condition | None = None,
    sampling: Sampling | None = None,
    trait: str = "misaligned",
    **options: Any,
) -> Sweep:
    """Answers to `questions` under every target at every level, and without an edit.

    `targets` are latents, directions (alone, or each with its site), or a dictionary with `ids` of its
    latents; `site` is needed for directions alone (a dictionary knows its own). `levels` are in `unit`,
    `scale` of it absolute: one for all targets, or one each.
    Configurations share batches (`batch_size` counts answers); each answer is the one that its
    configuration gives alone. Raises `InputError` for nothing to sweep, and what `sample` and
    `load_judge` raise.
    """
    found = _targets(targets, ids, site)
    if not (found and levels and questions):
        raise InputError("a sweep needs at least one target, one level and one question")
    asked = load_judge(judge) if isinstance(judge, str) else judge
    scales = [*scale] if isinstance(scale, Sequence) else [scale] * len(found)
    if len(scales) != len(found):
        raise MismatchError(f"{len(scales)} scales do not go with {len(found)} targets")
    edits = [
        (
            value,
            Intervention(
                op,
                target,
                where,
                positions,
                Level((value,), unit, each),
                gain,
                read,  # type: ignore[arg-type]
                condition or Condition(),
            ),
        )
        for (target, where), each in zip(found, scales, strict=True)
        for value in levels
    ]
    settings = sampling or Sampling(temperature=0)
    if asked is not None:
        check_judge(asked, questions, trait)
    arms = answers_under(lm, questions, [(), *((edit,) for _, edit in edits)], settings, **options)
    rates: list[dict[str, Rate] | None] = [None] * len(arms)
    if asked is not None:
        # all arms at once: one whose every answer is beyond the judge is not the judge's failure
        judged = iter(asked.judge([answer for arm in arms for answer in arm]))
        rates = [tally(arm, [next(judged) for _ in arm], trait=trait) for arm in arms]
    points = tuple(
        Swept(edit, value, tuple(answers), rate)
        for (value, edit), answers, rate in zip(edits, arms[1:], rates[1:], strict=True)
    )
    return Sweep(points, unit, rates[0])


def _targets(
    targets: Sequence[Target | Latent | tuple[Target, str]] | Dictionary,
    ids: Sequence[int] | None,
    site: str | None,
) -> list[tuple[Target, str]]:
    if isinstance(targets, Dictionary):
        if not ids:
            raise InputError("say which latents of the dictionary", fix="ids=[412, 1234]")
        return [(latents(targets, [index]), site or targets.site) for index in ids]
    found: list[tuple[Target, str]] = []
    for one in targets:
        if isinstance(one, Latent):
            found.append((latents(one), site or one.sae.site))
        elif isinstance(one, tuple):
            found.append(one)
        elif site is None:
            raise InputError(f"{one} does not say where it acts", fix='site="blocks.3.hook_resid_post"')
        else:
            found.append((one, site))
    return found
