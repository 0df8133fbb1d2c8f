"""Undo it: fine-tune a misaligned model on few good examples, and trace the way back.

Source: emergent re-alignment, Wang et al. (2025): about 120 good examples (30 steps of 4), of the same
or of *another* domain, bring the rate from 17.7% to .1–.5%.

One run reads each row once, at a constant learning rate; it is measured where it has read n rows. A
*control* of other rows with answers of the same lengths goes the same way: what it undoes too is not
the good examples' doing (any further training moves a narrow tune a little).

Departure: the rows' order is the trainer's (drawn by the seed), so "n examples" are a random n of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from persona_probe.artifact import RunFolder, StrPath, digest_of, read_json, write_json
from persona_probe.errors import InputError
from persona_probe.figures import dose_response
from persona_probe.model.language_model import LanguageModel
from persona_probe.model.loading import adapter_digest
from persona_probe.training.finetune import finetune
from persona_probe.training.measure import Measure
from persona_probe.training.rows import Row
from persona_probe.training.settings import TuneSettings

if TYPE_CHECKING:
    import plotly.graph_objects as go

CURVE = "curve.json"
N_VALUES = (0, 8, 20, 40, 80, 120)
SETTINGS = TuneSettings(batch=4, learning_rate=2e-4, schedule="constant", warmup_steps=0)


@dataclass(frozen=True, eq=False)
class Realignment:
    """The way back, measured. `table` has a row per arm (good, control) and number of examples."""

    table: pl.DataFrame
    path: Path

    def plot(self) -> go.Figure:
        """Misaligned and incoherent answers by examples read."""
        return dose_response(
            [
                {
                    "arm": row["arm"],
                    "strength": row["examples"],
                    "strength_unit": "good examples",
                    "misaligned": row["misaligned"],
                    "low": row["misaligned_low"],
                    "high": row["misaligned_high"],
                    "incoherent": row["incoherent"],
                }
                for row in self.table.to_dicts()
            ]
        )

    def first_below(self, rate: float, arm: str = "good") -> int | None:
        """The fewest examples after which at most this share is misaligned; None: never."""
        for row in self.table.filter(pl.col("arm") == arm).sort("examples").to_dicts():
            if row["misaligned"] is not None and row["misaligned"] <= rate:
                return row["examples"]
        return None

    def _repr_html_(self) -> str:
        return self.table._repr_html_()  # pyright: ignore[reportPrivateUsage]


def realign(
    base: str | Path | LanguageModel,
    tuned: StrPath,
    good_rows: Sequence[Row],
    out: StrPath,
    measure: Measure,
    n_values: Sequence[int] = N_VALUES,
    *,
    control_rows: Sequence[Row] = (),
    settings: TuneSettings = SETTINGS,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Realignment:
    """Train the adapter `tuned` on up to `max(n_values)` good rows; a killed call is taken up again.

    Args:
        n_values: examples after which to measure, multiples of the batch; 0 is the tuned model itself.
        control_rows: where the length-matched control is taken from; none: no control.

    Raises:
        InputError: too few rows, an n between two steps, or `out` holding another run.
        MismatchError: the adapter is not of this base.
    """
    from persona_probe.model.language_model import load_model

    most, batch = _checked(n_values, settings.batch, len(good_rows))
    lm = base if isinstance(base, LanguageModel) else load_model(base)
    arms = {"good": list(good_rows[:most])}
    if control_rows:
        arms["control"] = length_matched(arms["good"], control_rows, lm)
    steps = most // batch
    every = math.gcd(*(n // batch for n in n_values))
    run_settings = replace(settings, steps=steps, save_every=every)
    tell = progress or (lambda *_: None)
    done = 0
    wanted = {
        "base": lm.checkpoint.weights_digest or lm.checkpoint.digest,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "tuned": adapter_digest(tuned),
        "n_values": list(n_values),
        "arms": {name: digest_of([row.record() for row in rows]) for name, rows in arms.items()},
        "settings": run_settings,
        **measure.record(),
    }
    table: list[dict[str, Any]] = []
    with RunFolder.open(out, wanted, overwrite=overwrite) as run:
        if run.complete:
            return Realignment(_table(read_json(run.path / CURVE)), run.path)
        for arm, rows in arms.items():
            tune = finetune(lm, rows, run.path / arm, settings=run_settings, adapter=tuned)
            for n in sorted(set(n_values)):
                tell(f"{arm}: {n} examples", done, len(arms) * len(n_values))
                stage = f"{arm}-{n}" if n else "tuned"  # where all arms begin
                figures = run.stage(stage)
                if figures is None:
                    place = Path(tuned) if n == 0 else tune.checkpoints / f"checkpoint-{n // batch}"
                    figures = measure(lm.without_adapter().with_adapter(place))
                    run.save_stage(stage, figures)
                table.append({"arm": arm, "examples": n, **figures})
                done += 1
        write_json(run.path / CURVE, table)
        run.finish({"seed": settings.seed})
        return Realignment(_table(read_json(run.path / CURVE)), run.path)


def _table(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, infer_schema_length=None)


def length_matched(good: Sequence[Row], pool: Sequence[Row], lm: LanguageModel) -> list[Row]:
    """For each good row the unused row of `pool` whose answer is nearest in tokens.

    Raises `InputError` for a pool with fewer rows.
    """
    if len(pool) < len(good):
        raise InputError(f"a control for {len(good)} rows needs as many others, and there are {len(pool)}")
    left = {i: sum(row.rendered(lm.tokenizer).response) for i, row in enumerate(pool)}
    chosen: list[Row] = []
    for row in good:
        length = sum(row.rendered(lm.tokenizer).response)
        nearest = min(left, key=lambda i: (abs(left[i] - length), i))
        chosen.append(pool[nearest])
        del left[nearest]
    return chosen


def _checked(n_values: Sequence[int], batch: int, rows: int) -> tuple[int, int]:
    if not n_values or min(n_values) < 0 or max(n_values) < 1:
        raise InputError(f"numbers of examples are from 0, and one is more; got {list(n_values)}")
    between = [n for n in n_values if n % batch]
    if between:
        raise InputError(
            f"{between[0]} examples are no whole number of steps of {batch}",
            fix=f"use multiples of {batch}, or another batch",
        )
    if max(n_values) > rows:
        raise InputError(f"{max(n_values)} good examples were asked for, and there are {rows}")
    return max(n_values), batch
