"""Several models on the same questions: asked, judged, compared, written down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from persona_probe.artifact import (
    RunFolder,
    disk_full_named,
    read_json,
    write_json,
    write_jsonl,
)
from persona_probe.evaluation.arms import Models
from persona_probe.evaluation.asking import Asking, Progress
from persona_probe.evaluation.eval_record import eval_record
from persona_probe.evaluation.judges import load_judge
from persona_probe.evaluation.metrics import check_trait
from persona_probe.evaluation.plan import check_wanted_width
from persona_probe.evaluation.request import EvaluationRequest
from persona_probe.evaluation.result import EvalResult
from persona_probe.steering.io import load_fix

Page = Callable[[Mapping[str, Any], Path], None]
"""Writes a page about `eval.json` to a path."""

SAMPLES, RECORD, PAGE, JUDGE_LOG = "samples.jsonl", "eval.json", "eval.html", "judge.jsonl"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A finished evaluation. `record` is the content of `eval.json`."""

    path: Path
    record: dict[str, Any]

    @property
    def rates(self) -> pl.DataFrame:
        """One row per model and rate, with interval and counts."""
        return pl.DataFrame(
            [
                {"arm": arm, "name": name, **rate}
                for arm, found in self.record["arms"].items()
                for name, rate in found["rates"].items()
            ],
            infer_schema_length=None,
        )


def run_evaluation(
    request: EvaluationRequest,
    out: str | Path,
    *,
    overwrite: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    budget: str | None = None,
    page: Page | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Ask every model, judge, compare, and write everything to `out`; what is there is gone on with.

    Writes `samples.jsonl`, `judge.jsonl` (for a judge that is a model), `eval.json`, `eval.html`
    when there is a `page` to write it, and, last, `manifest.json`. `budget` is the most that the
    judge may be asked (`"2000"` calls) or cost (`"5usd"`).

    Raises:
        InputError: an input that is missing, malformed, or does not fit the others; `out` holds
            something else, or an evaluation of inputs that have changed since.
        BusyError: another run is writing to `out`.
        JudgeError: the judge cannot be reached (said before anything is sampled), or judges nothing.
        DiskFullError: no room to write.
    """
    tell = progress or (lambda *_: None)
    request.check_paths()
    settings = {**request.settings, "device": device, "dtype": dtype}
    with RunFolder.open(out, settings, overwrite=overwrite) as run, disk_full_named(run.path):
        asked = request.asked()
        check_wanted_width(request, asked)
        digests = request.digests(asked.questions)
        run.check_inputs(digests, "evaluation")
        if run.complete:
            return Evaluation(run.path, read_json(run.path / RECORD))
        judge = load_judge(request.judge, record=run.path / JUDGE_LOG, budget=budget)
        check_trait(request.trait, judge)
        judge.check_questions(asked.questions)
        folded = request.check_prompts(asked.questions)
        for fix in request.fixes:
            load_fix(fix)
        tell("checking the judge", 0, 0)
        judge.check()
        run.save_stage("inputs", digests)
        models = Models(request.base, device=device, dtype=dtype)
        asking = Asking(request, asked, models, run.path / SAMPLES, tell)
        answers = asking.answers()
        every = [answer for arm in answers.values() for answer in arm]
        # all arms at once: one whose every answer is beyond the judge is not the judge's failure
        judgements = iter(judge.judge(every, lambda done, total: tell("judging", done, total)))
        results = {
            name: EvalResult(tuple(arm), tuple(next(judgements) for _ in arm), request.trait, asked.in_domain)
            for name, arm in answers.items()
        }
        tell("writing", 0, 0)
        rows = (
            {"arm": name, **row, "token_ids": answer.token_ids}
            for name, result in results.items()
            for answer, row in zip(result.answers, result.records(), strict=True)
        )
        write_jsonl(run.path / SAMPLES, rows)
        record = eval_record(request, asked, results, judge, folded=folded, seconds=asking.seconds)
        if page is not None:
            page(record, run.path / PAGE)
        write_json(run.path / RECORD, record)
        run.finish({"inputs": digests, "seconds": asking.seconds, "seed": request.sampling.seed})
        return Evaluation(run.path, read_json(run.path / RECORD))
