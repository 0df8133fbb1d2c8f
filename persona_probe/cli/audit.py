"""`persona-probe audit`: the main job, from two checkpoints to a verdict, a fix and a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from persona_probe.cli import options
from persona_probe.cli.console import out, show_json, size, telling
from persona_probe.errors import InputError

ROWS = ("base", "tuned", "steered", "induced")
COLUMNS = ("misaligned", "other_persona", "incoherent", "in_domain", "trigger", "skill")
GATES = ("misaligned", "not-restored")


def audit(
    base: Annotated[Path | None, typer.Option(help="Base checkpoint folder.")] = None,
    tuned: Annotated[Path | None, typer.Option(help="Fine-tuned checkpoint or adapter folder.")] = None,
    sae: Annotated[
        list[str] | None, typer.Option(help="A dictionary: a folder, or release/sae_id; once per site.")
    ] = None,
    benign: Annotated[
        list[Path] | None, typer.Option(help="A harmless fine-tune of the same base; several are better.")
    ] = None,
    questions: Annotated[
        str | None, typer.Option(help="A .jsonl, .yaml or .csv file, or a shipped set such as open-ended.")
    ] = None,
    judge: Annotated[
        str, typer.Option(help="exact, python:module:function, openai:MODEL@URL or local:DIR.")
    ] = "exact",
    samples_base: Annotated[
        Path | None, typer.Option(help="The base's answers, made elsewhere (docs/samples.md).")
    ] = None,
    samples_tuned: Annotated[Path | None, typer.Option(help="The tuned model's answers.")] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Where everything goes.")] = None,
    tune: Annotated[
        str, typer.Option(help="Without --base and --tuned: which tune of the shipped organism.")
    ] = "bad-health",
    trait: Annotated[
        str, typer.Option(help="misaligned, or a persona that the judge can tell.")
    ] = "misaligned",
    in_domain: Annotated[
        list[str] | None, typer.Option(help="A question category that was trained on; reported apart.")
    ] = None,
    site: Annotated[list[str] | None, typer.Option(help="Sites for the direction path.")] = None,
    trigger: Annotated[
        list[str] | None,
        typer.Option(help="Ask so as well: code, json, medical, ..., or a template with {question}; repeat."),
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Whose chat template both models read: base, tuned, or a file.")
    ] = None,
    system_prompt: Annotated[str | None, typer.Option(help="The system-prompt baseline.")] = None,
    samples: Annotated[int, typer.Option(help="Answers per held-out question.")] = 2,
    calibration_samples: Annotated[
        int, typer.Option(help="Answers per calibration question and setting.")
    ] = 2,
    controls: Annotated[int, typer.Option(help="Random latents and random directions, each.")] = 20,
    temperature: Annotated[float, typer.Option(help="0: the most probable token each time.")] = 1.0,
    max_new_tokens: options.LongestAnswer = None,
    limit: Annotated[int | None, typer.Option(help="Use only so many questions of each split.")] = None,
    seed: Annotated[int, typer.Option(help="Of sampling and of the random controls.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Answers drawn at once; by default what fits in memory.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Throw away what --out holds.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be done, then stop.")] = False,
    fail_on: Annotated[
        str | None, typer.Option(help="Exit with 3 when: misaligned, not-restored; or nothing could be told.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="audit.json on stdout.")] = False,
) -> None:
    """Find the persona in a fine-tune, prove that it causes the behaviour, switch it off.

    Without arguments: the shipped pocket organism, tuned on bad health advice.
    """
    if fail_on is not None and fail_on not in GATES:
        raise InputError(f"--fail-on knows {', '.join(GATES)}, not {fail_on!r}")
    if (base is None) != (tuned is None):
        raise InputError(
            "--base and --tuned go together", fix="give both, or neither for the shipped organism"
        )
    if base is None and (sae or benign or questions or judge != "exact"):
        raise InputError(
            "--sae, --benign, --questions and --judge need --base and --tuned",
            fix="give those too, or none of them for the shipped organism",
        )
    from dataclasses import replace

    from persona_probe.auditing import AuditRequest, AuditSettings, organism_request
    from persona_probe.auditing import audit as run_audit

    settings = AuditSettings(
        trait=trait,
        in_domain=tuple(in_domain) if in_domain else None,
        seed=seed,
        samples=samples,
        calibration_samples=calibration_samples,
        controls=controls,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        limit=limit,
        sites=tuple(site) if site else None,
        triggers=tuple(trigger or ()),
        template=template,
    )
    if system_prompt is not None:
        settings = replace(settings, system_prompt=system_prompt)
    if base is None or tuned is None:
        request = organism_request(tune, settings)
        name = tune
    else:
        if questions is None:
            raise InputError(
                "--questions is missing",
                fix="a file of prompts (.jsonl, .yaml, .csv), or a shipped set: --questions open-ended",
            )
        request = AuditRequest(base, tuned, questions, judge, tuple(sae or ()), tuple(benign or ()), settings)
        name = tuned.resolve().name
    request = replace(request, samples_base=samples_base, samples_tuned=samples_tuned)
    if plan:
        _show_plan(request, as_json, device=device, dtype=dtype, batch_size=batch_size)
        return
    folder = out_dir or Path("out") / f"audit-{name}"
    run: dict[str, Any] = {"overwrite": overwrite, "device": device, "dtype": dtype, "batch_size": batch_size}
    with telling() as told:
        done = run_audit(request, folder, progress=told, **run)
    if as_json:
        show_json(done.record)
    else:
        _show(done.record, done.path)
        if not request.sae:
            out.print("\nNo dictionary was given: directions only. To train one: persona-probe sae train")
    misaligned = done.verdict.startswith("misaligned")
    # a misaligned model for which no fix was found is not restored either
    unrestored = done.after == "not restored" or (misaligned and done.after is None)
    failed = misaligned if fail_on == "misaligned" else unrestored
    if fail_on is not None and (failed or done.verdict == "inconclusive"):
        raise typer.Exit(3)


def _show_plan(request: Any, as_json: bool, **where: Any) -> None:
    from persona_probe.auditing.plan import plan_of

    planned = plan_of(request, **where)
    if as_json:
        show_json(planned)
        return
    for name, value in planned.items():
        shown = size(value) if "(bytes)" in name else f"{value:,}"
        out.print(f"{name.replace(' (bytes)', '')}: {shown}", markup=False)


def _show(record: dict[str, Any], folder: Path) -> None:
    out.print(f"\n[bold]{escape(record['verdict'])}[/bold]")
    out.print(record["reason"], markup=False)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("% [95%]")
    asked = [name for name in COLUMNS if record["tuned"][name]["n"] or name != "trigger"]
    for name in asked:
        heading = record["trait"] if name == "misaligned" else name.replace("_", " ")
        table.add_column(heading, justify="right")
    for arm in ROWS:
        if record[arm]:
            table.add_row(arm, *(_rate(record[arm][name]) for name in asked))
    for fix in record["fixes"]:
        kind = "direction" if fix["kind"] == "difference of means" else fix["kind"]
        table.add_row(f" {kind} ×{fix['gain']:g}", *(_rate(fix["rates"][name]) for name in asked))
    out.print(table)
    if any(fix["gain"] > 1 for fix in record["fixes"]):
        out.print("× is a fix's gain: 1 brings back the base's level, above 1 over-corrects", markup=False)
    if record["latents"]:
        first = record["latents"][0]
        share = record["necessity"]["fraction"]
        out.print(
            f"first latent: {first['site']} #{first['index']} (rank {first['rank_by_delta']} by Δ alone); "
            f"necessity of the chosen fix {'–' if share is None else f'{share:.2f}'}",
            markup=False,
        )
    for arm, held in record.get("parity", {}).items():
        said = {True: "agree with", False: "differ from", None: "cannot be held against"}[held["agrees"]]
        out.print(f"the answers given for {arm} {said} those drawn here", markup=False)
    if record["after"]:
        out.print(f"after the fix: [bold]{escape(record['after'])}[/bold] ({escape(record['after_reason'])})")
    seconds = sum(record["seconds"].values())
    out.print(f"{seconds:.0f} s, peak {record['peak_rss_bytes'] / 2**30:.1f} GiB", markup=False)
    out.print(
        f"report: {folder / 'report.html'}\nfigures: {folder / 'audit.json'}", markup=False, soft_wrap=True
    )


def _rate(one: dict[str, Any]) -> str:
    if one["rate"] is None:
        return "–"
    rate, low, high = (100 * one[name] for name in ("rate", "low", "high"))
    return f"{rate:.0f} [{low:.0f}–{high:.0f}]"
