"""What is decoded together: prompts under fixes, the answers wanted of each, and their steering."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor

from persona_probe.errors import NotFiredError
from persona_probe.model.language_model import LanguageModel
from persona_probe.steering.plan import PlannedEdit, Steering, SteeringPlan

Fix = tuple[PlannedEdit, ...]


@dataclass(frozen=True)
class Unit:
    """One prompt under one fix, and the answers (places in the result) wanted of it."""

    ids: tuple[int, ...]
    fix: Fix
    rows: tuple[int, ...]
    begun: tuple[int, ...] = ()
    """What these answers are known to begin with."""

    @property
    def read(self) -> tuple[int, ...]:
        """What the model reads before it writes."""
        return self.ids + self.begun

    def drawn(self, *, greedy: bool) -> tuple[int, ...]:
        """The rows that must be decoded: without chance, one speaks for all."""
        return self.rows[:1] if greedy else self.rows


def units_of(prompts: Sequence[tuple[int, ...]], fixes: Sequence[Fix]) -> list[Unit]:
    """One unit per prompt and fix, in order of appearance; `prompts[i]` and `fixes[i]` are of answer i."""
    grouped: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for row, (ids, fix) in enumerate(zip(prompts, fixes, strict=True)):
        grouped.setdefault((ids, tuple(id(one) for one in fix)), []).append(row)
    return [Unit(ids, fixes[rows[0]], tuple(rows)) for (ids, _), rows in grouped.items()]


def batches(units: Sequence[Unit], size: int, *, greedy: bool) -> Iterator[list[Unit]]:
    """Units of similar length together, at most `size` rows a batch."""
    batch: list[Unit] = []
    filled = 0
    for unit in sorted(units, key=lambda unit: len(unit.read)):
        step = len(unit.rows) if greedy else size
        for start in range(0, len(unit.rows), step):
            part = replace(unit, rows=unit.rows[start : start + step])
            weight = 1 if greedy else len(part.rows)
            if batch and filled + weight > size:
                yield batch
                batch, filled = [], 0
            batch.append(part)
            filled += weight
    if batch:
        yield batch


class UnitSteering:
    """Steers each batch of a run, and knows at the end whether any fix was ever applied: that none of
    the rows of one batch has the positions of its fix is no error.
    """

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm
        self._fired = False
        self._silent: NotFiredError | None = None

    @contextmanager
    def of(self, batch: Sequence[Unit]) -> Generator[Callable[[Tensor], object], None, None]:
        """Yields what is to be told of changes of the batch."""
        fixes = [unit.fix for unit in batch]
        if not any(fixes):
            yield lambda _rows: None
            return
        # one row serves a batch in which all are alike, at less cost
        alike = len({tuple(id(edit) for edit in fix) for fix in fixes}) == 1
        plan = SteeringPlan(tuple(fixes[:1] if alike else fixes))
        with Steering(self._lm, plan, prompt_lengths=[len(unit.ids) for unit in batch]) as steering:
            yield steering.select
        try:
            steering.receipt.check()
        except NotFiredError as error:
            self._silent = error
        else:
            self._fired = True

    def check(self) -> None:
        """Raise `NotFiredError` when no fix of the run was ever applied."""
        if self._silent is not None and not self._fired:
            raise self._silent
