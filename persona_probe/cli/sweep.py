"""`persona-probe sweep`: many latents at many levels, all of them rows of the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer
from rich.table import Table

from persona_probe.cli import options
from persona_probe.cli.console import err, out, show_json
from persona_probe.errors import InputError


def sweep(
    latents: Annotated[list[str], typer.Argument(help="SAE:INDEX, SAE:3,7 or SAE:10-19; several.")],
    base: Annotated[Path | None, typer.Option(help="Base checkpoint folder; it is what is steered.")] = None,
    tuned: Annotated[
        Path | None, typer.Option(help="Fine-tuned checkpoint or adapter folder: steered in its place.")
    ] = None,
    levels: Annotated[str, typer.Option(help="Comma-separated, in --unit.")] = "6,12",
    unit: Annotated[
        Literal["absolute", "residual_rms", "max_activation", "base_mean"],
        typer.Option(help="Of --levels; measured on the base's own answers."),
    ] = "residual_rms",
    op: Annotated[str, typer.Option(help="add, scale, clamp, cap, floor.")] = "add",
    read: Annotated[
        Literal["projection", "encoder"], typer.Option(help="How a latent's amount is measured.")
    ] = "projection",
    positions: Annotated[
        str, typer.Option(help="all, prompt, response, last_prompt, think, answer, or indices.")
    ] = "all",
    gain: Annotated[float, typer.Option(help="Above 1 over-corrects.")] = 1.0,
    questions: Annotated[str | None, typer.Option(help="A questions file, or a shipped set.")] = None,
    judge: Annotated[
        str, typer.Option(help="exact, python:module:function, openai:MODEL@URL or local:DIR.")
    ] = "exact",
    trait: Annotated[
        str, typer.Option(help="misaligned, or a persona that the judge can tell.")
    ] = "misaligned",
    out_dir: Annotated[Path | None, typer.Option("--out", help="Where everything goes.")] = None,
    top: Annotated[int, typer.Option(help="Rows to show, the most of the trait first.", min=1)] = 20,
    temperature: Annotated[float, typer.Option(help="0: the most probable token each time.")] = 0.0,
    max_new_tokens: options.LongestAnswer = None,
    batch_size: Annotated[int, typer.Option(help="Answers written at once.")] = 512,
    limit: Annotated[int | None, typer.Option(help="Use only so many questions.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="The same for all settings.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    overwrite: Annotated[bool, typer.Option(help="Throw away what --out holds.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be done, then stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Ask the calibration questions under every latent at every level: what does each of them do?

    Without --base: the shipped pocket organism. A sweep is exploration: what it turns up has to be
    confirmed on questions held out (calibrate, evaluate --with).
    """
    if base is None and tuned is not None:
        raise InputError("--tuned needs --base, the checkpoint that it was tuned from")
    from persona_probe.cli.steer_arms import load_arms, positions_of
    from persona_probe.cli.steer_bench import (
        aims_of,
        asked_of,
        inputs_of,
        longest_of,
        numbers_of,
        run_once,
        scales_of,
        show_plan,
        show_written,
    )
    from persona_probe.evaluation.settings import Sampling
    from persona_probe.screening.sweeping import sweep as run

    aims, doses = aims_of(latents), numbers_of(levels, "--levels")
    asked = asked_of(questions, base, tuned, limit).calibration
    tokens = longest_of(max_new_tokens, base, () if tuned is None else (tuned,))
    sampling = Sampling(temperature=temperature, max_new_tokens=tokens, seed=seed)
    if plan:
        configurations = len(aims) * len(doses)
        show_plan(
            {
                "latents": len(aims),
                "levels": len(doses),
                "questions": len(asked),
                "answers to sample": (configurations + 1) * len(asked),
                "longest answer (tokens)": tokens,
            },
            as_json,
        )
        return
    settings: dict[str, object] = {
        "latents": latents, "base": base, "tuned": tuned, "levels": doses, "unit": unit, "op": op,
        "read": read, "positions": positions, "gain": gain, "questions": questions, "judge": judge,
        "trait": trait, "sampling": sampling, "batch_size": batch_size, "limit": limit,
        "device": device, "dtype": dtype,
    }  # fmt: skip

    inputs = inputs_of([base, tuned, *(aim.folder for aim in aims)], asked, judge)

    def make(_path: Path) -> tuple[dict[str, Any], Any]:
        from persona_probe.artifact import shipped

        arms = load_arms(
            base or shipped("organism", "base"), tuned, "", (), device=device, dtype=dtype
        ).models
        scales = scales_of(unit, arms["base"], aims, read, asked, tokens)
        found = run(
            arms["steered"], [(aim.target, aim.site) for aim in aims], doses, asked, judge,
            op=cast("Any", op), unit=unit, scale=scales, positions=positions_of(positions), read=read,
            gain=gain, sampling=sampling, trait=trait, batch_size=batch_size,
        )  # fmt: skip
        rows = [{"latent": aims[i // len(doses)].name, **row} for i, row in enumerate(found.table.to_dicts())]
        return {"model": arms["steered"].name, "unsteered": found.reference, "rows": rows}, found.plot()

    name = next((path.resolve().name for path in (tuned, base) if path is not None), "organism")
    folder = out_dir or Path("out") / f"sweep-{name}"
    with err.status("sweeping"):
        found = run_once(folder, settings, inputs, make, overwrite=overwrite)
    if as_json:
        show_json(found)
        return
    _show(found, top)
    show_written(folder)


def _show(found: dict[str, Any], top: int) -> None:
    from persona_probe.cli.steer_bench import level_of, percent

    table = Table("latent", "level", "misaligned", "other persona", "incoherent", box=None)
    ranked = sorted(found["rows"], key=lambda row: -(row["misaligned"] or 0.0))
    for row in ranked[:top]:
        misaligned = percent(row["misaligned"], row["low"], row["high"])
        others = (percent(row[name]) for name in ("other_persona", "incoherent"))
        table.add_row(row["latent"], level_of(row), misaligned, *others)
    without = (found["unsteered"][name]["rate"] for name in ("misaligned", "other_persona", "incoherent"))
    table.add_row("unsteered", "", *map(percent, without), style="dim")
    out.print(table)
    if len(ranked) > top:
        out.print(f"{len(ranked) - top} more in result.json", style="dim")
