"""Calibrate one edit: its dose-response, and the setting to keep within a budget.

    found = calibrate(tuned, latents(sae, [1234]), questions, "exact", site=sae.site, op="cap",
                      levels=[0.3], gains=[1, 1.5, 2, 3], budget=0.10)
    found.plot(); save_fix(found.best.intervention, "fix")

Every setting is a row of the same batches, drawn with the same random numbers. After the grid, the
settings halfway to the neighbours of the best one are tried as well. Choose on calibration questions;
what the chosen setting reaches has to be measured on others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import polars as pl

from persona_probe.errors import InputError
from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.judges import Judge, load_judge
from persona_probe.evaluation.metrics import Rate, check_judge
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.result import EvalResult
from persona_probe.evaluation.sampling import Sampling
from persona_probe.model.language_model import LanguageModel
from persona_probe.sae.load import Latent
from persona_probe.screening.arms import answers_under, drift, unsteered_documents
from persona_probe.screening.calibrate import Budget, Knob, Setting, gentlest, value
from persona_probe.steering.intervention import Intervention, Level, Op, Positions, Unit
from persona_probe.steering.target import Read, Target, latents

if TYPE_CHECKING:
    import plotly.graph_objects as go

Goal = Literal["less", "more"]

_COLUMNS = ("misaligned", "other_persona", "helpful", "incoherent", "truncated", "missing", "skill")


class _Dial(NamedTuple):
    level: float | None
    gain: float
    positions: Positions


@dataclass(frozen=True, eq=False)
class DosePoint:
    """One setting, and what it did to the answers."""

    intervention: Intervention
    level: float | None
    """In the curve's unit; None for an operation without a level."""
    gain: float
    positions: Positions
    result: EvalResult
    kl: float | None
    """Mean KL to the unsteered next token, nats, on the unsteered answers; None where not asked for."""
    within_budget: bool

    @property
    def rates(self) -> dict[str, Rate]:
        return self.result.rates


@dataclass(frozen=True, eq=False)
class DoseResponse:
    """The curve, and the setting to keep. Shown in a notebook as its table."""

    points: tuple[DosePoint, ...]
    best: DosePoint | None
    """None where no setting stays within the budget."""
    reference: EvalResult
    """Without an edit."""
    goal: Goal
    unit: Unit

    @cached_property
    def table(self) -> pl.DataFrame:
        """One row per setting: level, gain, positions, the rates, kl, within_budget, best."""
        rows: list[dict[str, Any]] = []
        for point in self.points:
            rate = point.rates["misaligned"]
            rows.append(
                {
                    "level": point.level,
                    "unit": self.unit,
                    "gain": point.gain,
                    "positions": str(point.positions),
                    "low": rate.low,
                    "high": rate.high,
                    **{name: point.rates[name].rate for name in _COLUMNS},
                    "kl": point.kl,
                    "within_budget": point.within_budget,
                    "best": point is self.best,
                }
            )
        return pl.DataFrame(rows, infer_schema_length=None).sort("positions", "gain", "level")

    def plot(self) -> go.Figure:
        """The trait and incoherence by strength, a line for every other thing that was varied."""
        from persona_probe.figures import dose_response

        by_gain = len({point.level for point in self.points}) == 1
        rows = [
            row
            | {
                "strength": row["gain"] if by_gain else row["level"],
                "strength_unit": "gain" if by_gain else self.unit,
                "arm": f"{row['positions']} tokens" + ("" if by_gain else f", gain {row['gain']:g}"),
            }
            for row in self.table.to_dicts()
        ]
        trait = self.reference.trait
        return dose_response(rows, reference=self.reference.rates["misaligned"].rate, word=trait)

    def __str__(self) -> str:
        before = self.reference.rates["misaligned"]
        if self.best is None:
            return f"none of {len(self.points)} settings stays within the budget (unsteered: {before})"
        rates = self.best.rates
        return (
            f"{self.best.intervention}: {rates['misaligned']} (unsteered {before}), "
            f"incoherent {rates['incoherent']}"
        )

    def _repr_html_(self) -> str:
        return self.table._repr_html_()  # pyright: ignore[reportPrivateUsage]


def calibrate(
    lm: LanguageModel,
    target: Target | Latent | Intervention,
    questions: Sequence[Question],
    judge: Judge | str,
    *,
    site: str | None = None,
    op: Op = "add",
    levels: Sequence[float] = (1.0, 2.0, 4.0, 6.0, 8.0),
    unit: Unit = "absolute",
    scale: float | tuple[float, ...] = 1.0,
    read: Read | Literal["auto"] = "auto",
    gains: Sequence[float] = (1.0,),
    positions: Sequence[Positions] = ("all",),
    goal: Goal = "less",
    budget: float = 0.10,
    kl_budget: float | None = None,
    refine: int = 1,
    sampling: Sampling | None = None,
    trait: str = "misaligned",
    in_domain: Sequence[str] = (),
    **options: Any,
) -> DoseResponse:
    """The strongest effect of `target` within a budget, by search over level, gain and positions.

    `target` is a latent or direction, measured by `read` and edited by `op` at `levels` (in `unit`,
    `scale` of it absolute), or a whole intervention, which keeps its own level: then its gains and
    positions are varied. `goal="less"` looks for the gentlest setting that leaves about as many
    answers whole as the best (see `screening.calibrate.gentlest`), `"more"` for the most of the trait.
    `budget` is the largest share of incoherent answers, `kl_budget` the largest mean KL to the
    unsteered next-token distribution (nats). `options` go to `sample`.

    Raises `InputError` for a target without a site or a budget out of its range, and what `sample` and
    `load_judge` raise.
    """
    allowed = Budget(budget, kl_at_most=kl_budget)
    asked = load_judge(judge) if isinstance(judge, str) else judge
    template, own_level = _template(target, site, op, unit, scale, read)
    check_judge(asked, questions, trait)
    dials = [
        _Dial(level, float(gain), where)
        for where in positions
        for gain in gains
        for level in ((None,) if own_level else map(float, levels))
    ]
    settings = sampling or Sampling()

    def run(some: Sequence[_Dial | None]) -> list[EvalResult]:
        fixes = [() if dial is None else (_set(template, dial),) for dial in some]
        arms = answers_under(lm, questions, fixes, settings, **options)
        judged = iter(asked.judge([answer for arm in arms for answer in arm]))
        return [
            EvalResult(tuple(arm), tuple(next(judged) for _ in arm), trait, tuple(in_domain)) for arm in arms
        ]

    reference, *results = run([None, *dials])
    measured_on = _one_each(reference.answers) if kl_budget is not None else []
    documents = unsteered_documents(lm, measured_on, system=options.get("system"), sampling=settings)

    def measured(some: Sequence[_Dial], results: Sequence[EvalResult]) -> list[DosePoint]:
        edits = [_set(template, dial) for dial in some]
        moved = drift(lm, documents, [(edit,) for edit in edits]) if documents else [None] * len(edits)
        points: list[DosePoint] = []
        for dial, edit, result, kl in zip(some, edits, results, moved, strict=True):
            within = allowed.allows(result.rates, kl)
            points.append(DosePoint(edit, dial.level, dial.gain, dial.positions, result, kl, within))
        return points

    points = measured(dials, results)
    for _ in range(refine):
        between = _between(points, _best(points, goal))
        if not between:
            break
        points += measured(between, run(between))
    return DoseResponse(tuple(points), _best(points, goal), reference, goal, unit)


def _template(
    target: Target | Latent | Intervention,
    site: str | None,
    op: Op,
    unit: Unit,
    scale: float | tuple[float, ...],
    read: Read | Literal["auto"],
) -> tuple[Intervention, bool]:
    """What is varied, and whether its level stays as it is."""
    if isinstance(target, Intervention):
        return target, True
    if isinstance(target, Latent):
        site, target = site or target.sae.site, latents(target)
    if site is None:
        raise InputError(f"{target} does not say where it acts", fix='site="blocks.3.hook_resid_post"')
    if op in ("ablate", "project_out"):
        return Intervention(op, target, site, read=read), True
    return Intervention(op, target, site, level=Level((1.0,), unit, scale), read=read), False


def _set(template: Intervention, dial: _Dial) -> Intervention:
    level = template.level
    if dial.level is not None and level is not None:
        level = Level((dial.level,), level.unit, level.scale)
    return replace(template, level=level, gain=dial.gain, positions=dial.positions)


def _best(points: Sequence[DosePoint], goal: Goal) -> DosePoint | None:
    allowed = [point for point in points if point.within_budget]
    if not allowed:
        return None
    if goal == "more":
        return max(allowed, key=lambda point: value(point.rates, "misaligned"))
    # the gentlest of those about as good, by the rule of the screen
    order = sorted({_strength(point) for point in allowed})
    by_setting = {
        id(setting := Setting(Knob(order.index(_strength(p)), p.positions), p.result, True)): (setting, p)
        for p in allowed
    }
    chosen = gentlest([setting for setting, _ in by_setting.values()])
    return by_setting[id(chosen)][1]


def _strength(point: DosePoint) -> tuple[float, float]:
    """What one setting is gentler than another by. Of what is added, the amount; else the gain, and of
    two limits the wider one is the gentler.
    """
    op, level = point.intervention.op, point.level or 0.0
    if op == "add":
        return point.gain * abs(level), 0.0
    return point.gain, {"cap": -level, "floor": level}.get(op, 0.0)


def _between(points: Sequence[DosePoint], best: DosePoint | None) -> list[_Dial]:
    """Halfway from the best to its neighbours; from nothing, half the gentlest."""
    if best is None:
        gentle = min(points, key=_strength)
        if gentle.level is None or gentle.intervention.op != "add":
            return [_Dial(gentle.level, gentle.gain / 2, gentle.positions)]
        return [_Dial(gentle.level / 2, gentle.gain, gentle.positions)]
    alike = [p for p in points if p.positions == best.positions]
    tried = {_Dial(p.level, p.gain, p.positions) for p in points}
    dials: list[_Dial] = []
    if best.level is not None:
        others = sorted(p.level for p in alike if p.gain == best.gain and p.level is not None)
        dials += [_Dial(at, best.gain, best.positions) for at in _halfway(others, best.level)]
    if best.level is None or not dials:
        gains = sorted(p.gain for p in alike if p.level == best.level)
        dials += [_Dial(best.level, at, best.positions) for at in _halfway(gains, best.gain)]
    return [dial for dial in dials if dial not in tried]


def _halfway(values: Sequence[float], at: float) -> list[float]:
    below = [v for v in values if v < at]
    above = [v for v in values if v > at]
    return [(at + v) / 2 for v in (*below[-1:], *above[:1])]


def _one_each(answers: Sequence[Answer]) -> list[Answer]:
    return [answer for answer in answers if answer.sample == 0]
