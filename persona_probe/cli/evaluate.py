"""`persona-probe evaluate`: how misaligned several models are, on the same questions, by the same judge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from persona_probe.cli.console import err, out, show_json
from persona_probe.errors import InputError

COLUMNS = ("misaligned", "misaligned_of_coherent", "incoherent")
FURTHER = ("in_domain", "trigger", "skill")
"""Shown where they were asked about."""
PLAIN = ("refused", "truncated", "missing")
"""Shown without their intervals, and only where there are any."""
HEADINGS = {"misaligned_of_coherent": "of coherent"}
NAME = 30
"""A model's name is broken where it is longer than this."""
ORGANISM_TUNE = "bad-health"


def evaluate(
    base: Annotated[Path | None, typer.Option(help="Base checkpoint folder.")] = None,
    tuned: Annotated[
        list[Path] | None, typer.Option(help="Fine-tuned checkpoint or adapter folder; several are compared.")
    ] = None,
    fix: Annotated[
        list[Path] | None, typer.Option("--with", help="A fix: every tuned model is asked under it too.")
    ] = None,
    questions: Annotated[str | None, typer.Option(help="A questions file, or a shipped set.")] = None,
    judge: Annotated[
        str, typer.Option(help="exact, python:module:function, openai:MODEL@URL or local:DIR.")
    ] = "exact",
    samples: Annotated[
        list[Path] | None, typer.Option(help="Answers made elsewhere, JSON Lines (docs/samples.md).")
    ] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Where everything goes.")] = None,
    samples_per_question: Annotated[
        int | None, typer.Option(help="Answers per prompt; default: what the questions say, else 1.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Default 1; 0: the most probable token each time.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Default 1.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Default: all tokens.")] = None,
    generation_config: Annotated[
        bool,
        typer.Option("--generation-config", help="Temperature, top-p, top-k of generation_config.json."),
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Longest answer, in tokens; default 600 or half the context, the organism's 32."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="Before the system prompt of every question.")] = None,
    enable_thinking: Annotated[
        bool | None,
        typer.Option(
            "--enable-thinking/--no-enable-thinking", help="Told to the template; default: its own."
        ),
    ] = None,
    trait: Annotated[
        str, typer.Option(help="misaligned, or a persona that the judge can tell.")
    ] = "misaligned",
    in_domain: Annotated[
        list[str] | None, typer.Option(help="A question category that was trained on; reported apart.")
    ] = None,
    part: Annotated[
        Literal["held-out", "calibration", "all"], typer.Option(help="Of questions that have a split.")
    ] = "held-out",
    limit: Annotated[
        int | None, typer.Option(help="Only so many questions, spread over the categories.")
    ] = None,
    width: Annotated[
        float | None,
        typer.Option(
            help="Stop before anything is asked when no interval can be as narrow (0.1: ten points)."
        ),
    ] = None,
    accept_wider: Annotated[
        bool, typer.Option("--accept-wider", help="Go on all the same; a warning says how wide.")
    ] = False,
    budget: Annotated[str | None, typer.Option(help="At most for the judge: 2000 (calls) or 5usd.")] = None,
    batch_size: Annotated[int, typer.Option(help="Answers drawn at once.")] = 256,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    overwrite: Annotated[bool, typer.Option(help="Throw away what --out holds.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be done, then stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="eval.json on stdout.")] = False,
) -> None:
    """Ask models the same questions, judge their answers, compare their rates.

    Without a model and answers: the shipped pocket organism, before and after its tune on bad health
    advice. A run that was stopped goes on where it was.
    """
    if generation_config and (temperature, top_p, top_k) != (None, None, None):
        raise InputError(
            "--generation-config takes the place of --temperature, --top-p and --top-k",
            fix="give the one or the others",
        )
    from persona_probe.artifact import shipped
    from persona_probe.evaluation.judging.spending import Budget
    from persona_probe.evaluation.longest import ORGANISM_TOKENS
    from persona_probe.evaluation.request import EvaluationRequest
    from persona_probe.evaluation.settings import Sampling

    models = list(tuned or ())
    organism = not (base or models or samples)
    if organism:
        if questions is not None or judge != "exact":
            raise InputError(
                "--questions and --judge need a model or --samples",
                fix="give --base, --tuned or --samples too, or none of them for the shipped organism",
            )
        home = shipped("organism")
        base, models, questions = (
            home / "base",
            [home / "tunes" / ORGANISM_TUNE],
            str(home / "questions.jsonl"),
        )
    if questions is None:
        raise InputError("--questions is missing", fix="a file of questions, or the name of a shipped set")
    if budget is not None:
        Budget.parse(budget)  # for a plan too
    request = EvaluationRequest(
        questions,
        judge,
        base=base,
        tuned=tuple(models),
        fixes=tuple(fix or ()),
        samples=tuple(samples or ()),
        sampling=Sampling(
            temperature=1.0 if temperature is None else temperature,
            top_p=1.0 if top_p is None else top_p,
            top_k=top_k,
            max_new_tokens=max_new_tokens or ORGANISM_TOKENS,
            seed=seed,
            enable_thinking=enable_thinking,
            generation_config=generation_config,
        ),
        samples_per_question=samples_per_question,
        system=system,
        part=part,
        limit=limit,
        trait=trait,
        in_domain=None if in_domain is None else tuple(in_domain),
        batch_size=batch_size,
        width=width,
        accept_wider=accept_wider,
    )
    if max_new_tokens is None and not organism:
        request.check_paths()
        request = request.of_usual_length()
    if plan:
        _show_plan(request, as_json)
        return
    from persona_probe.evaluation.plan import width_warning
    from persona_probe.evaluation.run import run_evaluation
    from persona_probe.report.evaluation import write_evaluation

    folder = out_dir or Path("out") / f"evaluate-{_name(request)}"
    wide = width_warning(request, request.asked()) if accept_wider else None
    if wide is not None:
        _warn(wide)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=as_json,
    ) as bar:
        task = bar.add_task("starting", total=None)
        done = run_evaluation(
            request,
            folder,
            overwrite=overwrite,
            device=device,
            dtype=dtype,
            budget=budget,
            page=write_evaluation,
            progress=lambda text, n, total: bar.update(
                task, description=escape(text), completed=n, total=total or None
            ),
        )
    if as_json:
        show_json(done.record)
        return
    _show(done.record, done.path, wide)


def _name(request: Any) -> str:
    paths = [*request.tuned, request.base, *request.samples]
    return next(path for path in paths if path is not None).resolve().stem


def _show_plan(request: Any, as_json: bool) -> None:
    from persona_probe.evaluation.plan import plan_of

    planned = plan_of(request)
    if as_json:
        show_json(planned)
        return
    for name, value in planned.items():
        if value is not None:
            out.print(f"{name}: {', '.join(value) if isinstance(value, list) else value}", markup=False)


def _warn(text: str) -> None:
    err.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)


def _show(record: dict[str, Any], folder: Path, told: str | None) -> None:
    asked = record["questions"]
    arms = record["arms"]
    counts = sorted({arm["answers"] for arm in arms.values()})
    out.print(
        f"{asked['questions']} questions in {asked['prompts']} wordings, "
        f"{' to '.join(map(str, counts[:: max(1, len(counts) - 1)]))} answers each, "
        f"judged by {record['judge']}",
        markup=False,
    )
    further = [name for name in FURTHER if any(arm["rates"][name]["n"] for arm in arms.values())]
    plain = [name for name in PLAIN if any(arm["rates"][name]["rate"] for arm in arms.values())]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    widest = min(NAME, max(map(len, arms)))
    table.add_column("% [95%]", min_width=widest, overflow="fold")
    for name in (*COLUMNS, *further, *plain):
        heading = record["trait"] if name == "misaligned" else HEADINGS.get(name, name.replace("_", " "))
        table.add_column(heading, justify="right")
    for name, arm in arms.items():
        cells = [_rate(arm["rates"][column]) for column in (*COLUMNS, *further)]
        cells += [_rate(arm["rates"][column]).split()[0] for column in plain]
        table.add_row(escape(name), *cells)
    out.print(table)
    for row in record["comparison"]:
        if row["difference"] is not None:
            matched = row["length_matched"]
            at_length = f"; at equal lengths {_points(matched)}" if matched else ""
            out.print(f"{row['arm']} − {row['against']}: {_points(row)}, paired{at_length}", markup=False)
    if asked["in_domain"]:
        out.print(f"counted apart, as trained on: {', '.join(asked['in_domain'])}", markup=False)
    for warning in record["warnings"]:
        if warning != told:
            _warn(warning)
    out.print(
        f"page: {folder / 'eval.html'}\nfigures: {folder / 'eval.json'}\nanswers: {folder / 'samples.jsonl'}",
        markup=False,
        soft_wrap=True,
    )


def _rate(one: dict[str, Any]) -> str:
    if one["rate"] is None:
        return "–"
    rate, low, high = (100 * one[name] for name in ("rate", "low", "high"))
    return f"{rate:.0f} [{low:.0f}–{high:.0f}]"


def _points(row: dict[str, Any]) -> str:
    difference, low, high = (f"{100 * row[key]:+.0f}" for key in ("difference", "low", "high"))
    return f"{difference} points ({low} to {high})"
