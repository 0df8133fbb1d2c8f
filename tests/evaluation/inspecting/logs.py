"""Evals run in the test's process, and what their logs say."""

from __future__ import annotations

from typing import Any

import pytest
from inspect_ai import eval as inspect_eval
from inspect_ai.log import EvalLog, read_eval_log

from persona_probe.artifact import shipped

HOME = shipped("organism")
BASE, TUNED = HOME / "base", HOME / "tunes" / "bad-health"

OF_INSPECT = [  # of Inspect's own making
    pytest.mark.filterwarnings("ignore:The 'initial' parameter is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning"),
]


def run(task: Any, model: Any, **options: Any) -> EvalLog:
    """One eval, as its log says it on disk."""
    (log,) = inspect_eval(task, model=model, display="none", log_level="warning", **options)
    return read_eval_log(log.location)


def values(log: EvalLog) -> dict[str, float]:
    assert log.results is not None
    return {name: found.value for name, found in log.results.scores[0].metrics.items()}


def same_rates(log: EvalLog, rates: dict[str, dict[str, Any]]) -> None:
    """Every number of every rate of `eval.json` is that of the log."""
    found = values(log)
    for name, rate in rates.items():
        assert found.pop(f"{name}_n") == rate["n"]
        assert found.pop(f"{name}_missing") == rate["missing"]
        if rate["rate"] is None:
            continue
        assert found.pop(name) == rate["rate"]
        for part in ("low", "high", "questions"):
            assert found.pop(f"{name}_{part}") == rate[part]
    assert found == {}
