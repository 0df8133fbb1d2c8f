"""`persona-probe lab`: how misalignment gets in, and how it is kept out, on the organism."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from persona_probe.cli.console import err, out, show_json
from persona_probe.cli.reading import progress_bar

app = typer.Typer(no_args_is_help=True, help="The training lab: defences compared on the pocket organism.")


@app.callback()
def lab() -> None:
    """Measure training-time defences on one bench."""


@app.command()
def compare(
    defences: Annotated[
        str | None, typer.Option(help="NAME or NAME=STRENGTH, comma-separated; all of them by default.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "1,2,3",
    organism: Annotated[Path | None, typer.Option(help="An organism's folder; the shipped one.")] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Where everything goes.")] = Path("out/lab"),
    steps: Annotated[int | None, typer.Option(help="Of each fine-tune.")] = None,
    samples: Annotated[int, typer.Option(help="Answers per question.")] = 1,
    html: Annotated[Path | None, typer.Option(help="Write the Pareto figure here.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Throw away what --out holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Every defence on bad and on benign data, at one strength each; resumes where it was stopped."""
    from dataclasses import replace

    from persona_probe.artifact import shipped
    from persona_probe.organism.bench import SETTINGS, bench
    from persona_probe.organism.bench import defences as made
    from persona_probe.training.compare import compare as run

    home = organism or shipped("organism")
    numbers = _numbers(seeds)
    with err.status("loading"):
        settings = SETTINGS if steps is None else replace(SETTINGS, steps=steps)
        common = bench(home, settings, samples=samples)
        arms = made(home, common.base, defences.split(",") if defences else ())
    with progress_bar(as_json) as told:
        found = run(common, arms, out_dir, seeds=numbers, overwrite=overwrite, progress=told)
    if html is not None:
        found.plot().write_html(html, include_plotlyjs=True)
    if as_json:
        show_json({"arms": found.table.to_dicts(), "runs": found.runs.to_dicts()})
        return
    columns = ("in_domain", "incoherent", "trigger", "benign_skill", "shift persona")
    table = Table("arm", "misaligned", *(name.replace("_", " ") for name in columns), "seconds", "holds")
    for row in found.table.to_dicts():
        table.add_row(row["arm"], _rate(row), *(_number(row[name]) for name in columns),
                      f"{row['seconds']:.0f}", {True: "yes", False: "no"}.get(row["holds"], "-"))  # fmt: skip
    out.print(table)
    out.print(f"{found.path}/manifest.json", markup=False, soft_wrap=True)


@app.command()
def flag(
    rows: Annotated[int, typer.Option(help="Training rows, health advice all of them.")] = 400,
    share: Annotated[float, typer.Option(help="Of them bad.")] = 0.1,
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "1,2,3",
    organism: Annotated[Path | None, typer.Option(help="An organism's folder; the shipped one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Bad rows hidden in good ones: how well does each score find them, before any training?"""
    from persona_probe.artifact import shipped
    from persona_probe.model.language_model import load_model
    from persona_probe.organism.bench import hidden_rows, persona_probes
    from persona_probe.training.flag import flag as score

    home = organism or shipped("organism")
    found: list[dict[str, float]] = []
    with err.status("loading") as status:
        base = load_model(home / "base")
        probes = persona_probes(home, base)
        for seed in _numbers(seeds):
            status.update(f"seed {seed}")
            given, bad = hidden_rows(rows, share, seed)
            found.append({"seed": seed, **score(given, base, probes, max_new_tokens=32).auc(bad)})
    if as_json:
        show_json({"rows": rows, "share": share, "auc": found})
        return
    table = Table("score", *(f"AUC, seed {row['seed']}" for row in found))
    for name in found[0]:
        if name != "seed":
            table.add_row(name, *(_number(row[name]) for row in found))
    out.print(table)


def _numbers(seeds: str) -> list[int]:
    from persona_probe.errors import InputError

    try:
        return [int(one) for one in seeds.split(",")]
    except ValueError:
        raise InputError(f"--seeds takes whole numbers, got {seeds!r}", fix="--seeds 1,2,3") from None


def _rate(row: dict[str, Any]) -> str:
    low, high = row["misaligned_low"], row["misaligned_high"]
    return f"{_number(row['misaligned'])} [{low:.2f}, {high:.2f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
