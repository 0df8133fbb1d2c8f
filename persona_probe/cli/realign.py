"""`persona-probe realign`: undo a misaligned fine-tune with few good examples, and trace the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from persona_probe.artifact import plain
from persona_probe.cli.console import out, show_json
from persona_probe.cli.reading import progress_bar


def realign(
    base: Annotated[Path, typer.Option(help="Checkpoint folder of the base.")],
    tuned: Annotated[Path, typer.Option(help="The misaligned adapter.")],
    data: Annotated[Path, typer.Option(help="Good rows, JSON Lines; of the same or another domain.")],
    questions: Annotated[str, typer.Option(help="A file of questions, or a shipped set.")],
    judge: Annotated[str, typer.Option(help="exact, python:module:function, openai:..., local:...")],
    out_dir: Annotated[Path, typer.Option("--out", help="Where everything goes.")],
    control: Annotated[
        Path | None, typer.Option(help="Other rows, for a control with answers of the same lengths.")
    ] = None,
    n: Annotated[list[int] | None, typer.Option(help="Examples after which to measure; repeat.")] = None,
    in_domain: Annotated[list[str] | None, typer.Option(help="Category counted apart.")] = None,
    latent: Annotated[list[str] | None, typer.Option(help="SAE:INDEX, a latent to trace.")] = None,
    split: Annotated[str, typer.Option(help="Of the questions, where they have splits.")] = "held-out",
    samples: Annotated[int, typer.Option(help="Answers per question.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Of each answer.")] = 48,
    batch: Annotated[int, typer.Option(help="Rows per step.")] = 4,
    lr: Annotated[float, typer.Option(help="Learning rate, constant.")] = 2e-4,
    seed: Annotated[int, typer.Option(help="Of the order and of the answers.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Only so many questions.", min=1)] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    overwrite: Annotated[bool, typer.Option(help="Throw away what --out holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Train a tuned adapter on good examples and measure it as it goes; resumes where it was stopped."""
    from dataclasses import replace

    from persona_probe.cli.flag import probes_of
    from persona_probe.evaluation.questions import load_questions
    from persona_probe.evaluation.sampling import Sampling
    from persona_probe.evaluation.selection import check_categories
    from persona_probe.model.language_model import load_model
    from persona_probe.training.measure import Measure, of_split
    from persona_probe.training.realign import N_VALUES, SETTINGS
    from persona_probe.training.realign import realign as run
    from persona_probe.training.rows import read_rows
    from persona_probe.training.watching import Watch

    rows = read_rows(data)
    n_values = tuple(n) if n else tuple(one for one in N_VALUES if one <= len(rows))
    every = load_questions(questions)
    apart = tuple(in_domain or ())
    check_categories(every, apart)
    asked = of_split(every, split)[:limit]
    lm = load_model(base, device=device or "auto", dtype=dtype)
    watch = Watch.of(lm, probes_of(latent, ()), asked[:40]) if latent else None
    sampling = Sampling(samples=samples, max_new_tokens=max_new_tokens, seed=seed)
    measure = Measure(asked, judge, apart, sampling, watch=watch)
    with progress_bar(as_json) as told:
        found = run(
            lm, tuned, rows, out_dir, measure, n_values,
            control_rows=() if control is None else read_rows(control),
            settings=replace(SETTINGS, batch=batch, learning_rate=lr, seed=seed),
            overwrite=overwrite, progress=told,
        )  # fmt: skip
    listed = found.table.to_dicts()
    if as_json:
        show_json({"curve": listed})
        return
    shifts = [name for name in found.table.columns if name.startswith("shift ")]
    table = Table("arm", "examples", "misaligned", "in domain", "incoherent", "helpful", *shifts)
    for row in listed:
        table.add_row(row["arm"], str(row["examples"]), _rate(row, "misaligned"), _rate(row, "in_domain"),
                      _rate(row, "incoherent"), _rate(row, "helpful"),
                      *(f"{row[name]:+.3f}" for name in shifts))  # fmt: skip
    out.print(table)
    first = found.first_below(0.1)
    said = "never" if first is None else f"after {first} examples"
    out.print(f"at most 10% misaligned: {said}", markup=False)


def _rate(row: dict[str, Any], name: str) -> str:
    value, low, high = (plain(row.get(key)) for key in (name, f"{name}_low", f"{name}_high"))
    return "-" if value is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"
