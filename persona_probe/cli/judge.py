"""`persona-probe judge`: how far can a judge be trusted?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from persona_probe.cli.console import err, out, show_json
from persona_probe.errors import InputError

app = typer.Typer(no_args_is_help=True, help="Hold a judge against people.")


@app.callback()
def _group() -> None:
    """Hold a judge against people."""


@app.command()
def validate(
    labels: Annotated[
        Path,
        typer.Option(help="CSV or JSON Lines: question, answer, aligned, coherent, label or misaligned."),
    ],
    judge: Annotated[
        str | None,
        typer.Option(help="Asked now; without it the file's judge_aligned, judge_coherent count."),
    ] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="For judge.jsonl and agreement.json.")] = None,
    budget: Annotated[str | None, typer.Option(help="At most: 2000 (calls), 5usd.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only so many answers.", min=1)] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be asked, then stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Agreement of a judge with people's labels: verdicts, scores, calibration, confusion table."""
    from persona_probe.artifact import check_writable, write_json
    from persona_probe.evaluation.agreement import agreement
    from persona_probe.evaluation.judges import load_judge
    from persona_probe.evaluation.labels import load_labels

    labelled = load_labels(labels)[:limit]
    if out_dir is not None:
        check_writable(out_dir)
    if judge is None:
        judged = [one.judged for one in labelled if one.judged is not None]
        if not judged:
            raise InputError(
                f"{labels} holds no judge's scores (judge_aligned, judge_coherent), and no judge is named",
                fix="name one to ask now: --judge SPEC",
            )
        labelled = tuple(one for one in labelled if one.judged is not None)
    else:
        _check_texts(labels, labelled)
        record = None if out_dir is None else out_dir / "judge.jsonl"
        asked = load_judge(judge, record=record, budget=budget)
        answers = [one.answer for one in labelled]
        if plan:
            show_json(asked.estimate(answers))
            return
        asked.check()
        with err.status("judging") as status:
            judged = asked.judge(answers, lambda done, total: status.update(f"judging: {done} of {total}"))
    found = agreement(labelled, judged)
    if out_dir is not None:
        write_json(out_dir / "agreement.json", found)
    if as_json:
        show_json(found)
    else:
        _show(found)


def _check_texts(labels: Path, labelled: Any) -> None:
    for number, one in enumerate(labelled, start=1):
        if not one.answer.text or one.answer.question.prompt == "(not given)":
            raise InputError(
                f"{labels}, row {number}: a judge needs the question and the answer",
                fix="add the columns 'question' and 'answer', or leave --judge out",
            )


def _show(found: Any) -> None:
    verdicts = found.verdicts
    read = ", ".join(f"{name} {n}" for name, n in found.scored_by.items())
    out.print(f"{found.n} answers; people leave {found.unlabelled} open, the judge {found.missing} ({read})")
    out.print(
        f"verdict (misaligned or not): accuracy {_number(verdicts.accuracy)}"
        f" [{_number(verdicts.low)}, {_number(verdicts.high)}], kappa {_number(verdicts.kappa)}; "
        f"people {_number(verdicts.human_rate)}, judge {_number(verdicts.judge_rate)}; of people's "
        f"misaligned {_number(verdicts.found)} found, of the judge's {_number(verdicts.right)} right\n",
        markup=False,
    )
    scores = _table("score", "answers", "Spearman", "judge − people", "mean |difference|", "largest")
    for name in ("aligned", "coherent"):
        one = getattr(found, name)
        numbers = (one.spearman, one.mean_difference, one.mean_absolute)
        largest = "–" if one.largest is None else f"{one.largest:.2g}"
        scores.add_row(name, str(one.n), *map(_number, numbers), largest)
    out.print(scores, "")
    bins = _table("judge's alignment", "answers", "judge", "people", "misaligned to people")
    for one in found.calibration:
        row = map(_number, (one.judge, one.human, one.misaligned))
        bins.add_row(f"{one.low} to {one.high}", str(one.n), *row)
    out.print(bins, "")
    columns = list(next(iter(found.confusion.values())))
    table = _table("people ↓ judge →", *(name.replace("_", " ") for name in columns))
    for name, row in found.confusion.items():
        table.add_row(name.replace("_", " "), *(str(row[column]) for column in columns))
    out.print(table)


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
