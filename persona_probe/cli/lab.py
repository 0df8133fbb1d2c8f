"""`persona-probe lab`: how misalignment gets in, how it is kept out, how it is undone, on the organism."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from persona_probe.cli.console import err, out, show_json
from persona_probe.cli.reading import progress_bar

app = typer.Typer(no_args_is_help=True, help="The training lab, on the pocket organism.")

Organism = Annotated[Path | None, typer.Option(help="An organism's folder; the shipped one.")]
Seeds = Annotated[str, typer.Option(help="Comma-separated.")]
Rows = Annotated[int | None, typer.Option(help="Of each fine-tune.")]
Html = Annotated[Path | None, typer.Option(help="Write the Pareto figure here.")]
Overwrite = Annotated[bool, typer.Option(help="Throw away what --out holds.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@app.callback()
def lab() -> None:
    """Fine-tunes of the organism, measured on one bench."""


@app.command()
def compare(
    defences: Annotated[
        str | None,
        typer.Option(help="NAME, NAME=STRENGTH or a sum of them with +, comma-separated; default: all."),
    ] = None,
    seeds: Seeds = "1,2,3",
    organism: Organism = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Where everything goes.")] = Path("out/lab-compare"),
    rows: Rows = None,
    html: Html = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Every defence on bad and on benign data, at one strength each, on held-out questions.

    A comparison that was stopped goes on; one that is given more defences or seeds trains only those.
    """
    wanted = defences.split(",") if defences else []
    found = _compared(wanted, _numbers(seeds), organism, out_dir, rows, "held-out", overwrite, as_json)
    if html is not None:
        found.plot().write_html(html, include_plotlyjs=True)
    if as_json:
        show_json({"arms": found.table.to_dicts(), "runs": found.runs.to_dicts()})
        return
    out.print(_table(found.table.to_dicts()))
    out.print(f"{found.path}/manifest.json", markup=False, soft_wrap=True)


@app.command()
def sweep(
    defences: Annotated[str | None, typer.Option(help="NAME, comma-separated; default: all.")] = None,
    seeds: Seeds = "101",
    organism: Organism = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Where everything goes.")] = Path("out/lab-sweep"),
    rows: Rows = None,
    html: Html = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Several strengths of each defence on calibration questions, and which one it is to have.

    Chosen is the strength whose worst shortfall is least (of those that learnt half of the task, where
    any did): misaligned above the base, task not learnt, incoherent above undefended, each in units of
    its bound.
    """
    from persona_probe.organism.defended import defence_of, swept
    from persona_probe.training.compare import chosen

    wanted = swept(defences.split(",") if defences else ())
    found = _compared(
        wanted, _numbers(seeds), organism, out_dir, rows, "calibration", overwrite, as_json, ("bad",)
    )
    listed = found.table.to_dicts()
    picked = chosen(listed, defence_of)
    if html is not None:
        found.plot().write_html(html, include_plotlyjs=True)
    if as_json:
        show_json({"arms": listed, "chosen": picked})
        return
    out.print(_table(listed, set(picked.values())))
    out.print(f"--defences {','.join(picked.values())}", markup=False, soft_wrap=True)


@app.command()
def report(
    seeds: Seeds = "1,2,3",
    only: Annotated[list[str] | None, typer.Option(help="One case; repeat. All by default.")] = None,
    organism: Organism = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Where trials and records go.")] = Path("out/lab"),
    docs: Annotated[
        Path | None, typer.Option(help="Where lab.md, lab.json and pictures go; --out by default.")
    ] = None,
    rows: Rows = None,
    tell_only: Annotated[
        bool, typer.Option("--tell-only", help="Train nothing: write the page of what is there.")
    ] = False,
    pictures: Annotated[
        bool, typer.Option("--pictures/--no-pictures", help="Draw the figures (takes Chromium).")
    ] = True,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Every case of the lab, measured and told on one page; resumes trial by trial."""
    from persona_probe.artifact import shipped
    from persona_probe.organism.bench import ROWS
    from persona_probe.organism.lab_report import records_in, write_page
    from persona_probe.organism.lab_report import report as run

    if tell_only:
        records = records_in(out_dir)
    else:
        with progress_bar(as_json) as told:
            records = run(
                organism or shipped("organism"), out_dir, _numbers(seeds), wanted=only or (),
                count=rows or ROWS, overwrite=overwrite, progress=told,
            )  # fmt: skip
    command = f"persona-probe lab report --seeds {seeds} --docs {docs or 'docs'}"
    page, data = write_page(records, docs or out_dir, command, pictures=pictures)
    if as_json:
        show_json({"cases": records})
        return
    out.print(f"{page}\n{data}", markup=False, soft_wrap=True)


def _compared(
    wanted: list[str],
    seeds: list[int],
    organism: Path | None,
    out_dir: Path,
    rows: int | None,
    split: str,
    overwrite: bool,
    quiet: bool,
    kinds: tuple[str, ...] = ("bad", "benign"),
) -> Any:
    from persona_probe.artifact import shipped
    from persona_probe.organism.bench import ROWS, Subject, bench
    from persona_probe.organism.defended import arms
    from persona_probe.training.compare import compare as run

    with err.status("loading"):
        subject = Subject(organism or shipped("organism"))
        common = bench(subject, split=split, count=rows or ROWS)
        made = arms(subject, wanted)
    with progress_bar(quiet) as told:
        return run(common, made, out_dir, seeds=seeds, kinds=kinds, overwrite=overwrite, progress=told)


def _table(rows: list[dict[str, Any]], marked: set[str] | None = None) -> Table:
    columns = ("in_domain", "incoherent", "trigger", "benign_skill", "shift persona")
    table = Table("arm", "misaligned", *(name.replace("_", " ") for name in columns), "seconds", "holds")
    for row in rows:
        name = row["arm"] + (" (chosen)" if row["arm"] in (marked or ()) else "")
        table.add_row(name, _rate(row), *(_number(row[column]) for column in columns),
                      f"{row['seconds']:.0f}", {True: "yes", False: "no"}.get(row["holds"], "-"))  # fmt: skip
    return table


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
