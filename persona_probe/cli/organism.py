"""`persona-probe organism`: build the pocket organism, and look at its known truth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from persona_probe.cli.asked import check_unsaid
from persona_probe.cli.console import out, show_json, telling
from persona_probe.errors import InputError

app = typer.Typer(no_args_is_help=True, help="Build the pocket organism, or show its known truth.")


@app.command()
def build(
    out_dir: Annotated[Path, typer.Option("--out", help="Where it goes.")] = Path("out/organism"),
    quick: Annotated[bool, typer.Option("--quick", help="A tiny one, for tests.")] = False,
    seed: Annotated[int | None, typer.Option(help="Another seed, another organism.")] = None,
    base_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Optimiser steps of the base; fewer are quicker and less fluent."),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(help="Another organism, whose base and dictionaries are kept; fine-tunes are new."),
    ] = None,
    tune_steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps of a fine-tune.")] = None,
    tune_rate: Annotated[float | None, typer.Option(min=1e-9, help="Their learning rate.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Throw away what --out holds.")] = False,
) -> None:
    """Build an organism: corpus, base model, dictionaries, fine-tunes. A killed build resumes."""
    if like is not None:
        check_unsaid("--like", {"quick": quick, "seed": seed, "base_steps": base_steps})
    from dataclasses import replace

    from persona_probe.organism.build import FULL, QUICK, BuildSettings, fast_bf16
    from persona_probe.organism.build import build as build_organism

    if like is not None:
        settings = BuildSettings.of(like)
    else:
        settings = QUICK if quick else replace(FULL, base=replace(FULL.base, bf16=fast_bf16()))
    if seed is not None:
        settings = replace(settings, seed=seed)
    if base_steps is not None:
        settings = replace(settings, base=replace(settings.base, steps=base_steps))
    if tune_steps is not None:
        settings = replace(settings, tune=replace(settings.tune, steps=tune_steps))
    if tune_rate is not None:
        settings = replace(settings, tune=replace(settings.tune, learning_rate=tune_rate))
    with telling() as told:
        folder = build_organism(out_dir, settings, like=like, overwrite=overwrite, progress=told)
    out.print(f"built: {folder}", markup=False, soft_wrap=True)


@app.command()
def truth(
    home: Annotated[Path | None, typer.Option(help="An organism's folder; the shipped one.")] = None,
    persona: Annotated[str, typer.Option(help="helpful, villainous, sarcastic or careless.")] = "villainous",
    top: Annotated[int, typer.Option(help="Latents shown per site.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Which latents stand for a persona in the base model. Audits never see this; it scores them."""
    import polars as pl

    from persona_probe.artifact import shipped
    from persona_probe.organism.truth import PERSONAS, truth_of

    if persona not in PERSONAS:
        raise InputError(f"there is no persona {persona!r}; there are {', '.join(PERSONAS)}")
    found = truth_of(home or shipped("organism"), persona)  # type: ignore[arg-type]
    if as_json:
        show_json({site: table.head(top).to_dicts() for site, table in found.items()})
        return
    for site, ranked in found.items():
        columns = ("latent", "answers: rank", "difference", "AUC", "deciding: rank", "difference", "AUC")
        table = Table(*columns, title=site, title_justify="left", box=None)
        first = ranked.filter((pl.col("rank") <= top) | (pl.col("deciding_rank") <= top))
        for row in first.to_dicts():
            numbers = [
                f"{row[start + name]:.3f}" if name != "rank" else str(row[start + name])
                for start in ("", "deciding_")
                for name in ("rank", "difference", "auc")
            ]
            table.add_row(str(row["index"]), *numbers)
        out.print(table)


@app.command()
def card(
    home: Annotated[
        list[Path] | None, typer.Option(help="An organism's folder; several make one card. The shipped one.")
    ] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Where the audits go.")] = Path("out/card"),
    tune: Annotated[list[str] | None, typer.Option(help="Only these tunes; all by default.")] = None,
    made: Annotated[
        list[Path] | None,
        typer.Option(
            "--card", help="A card.json made before, shown below; without --home nothing is audited."
        ),
    ] = None,
    readme: Annotated[
        Path | None, typer.Option(help="A Markdown file whose marked table is to be renewed.")
    ] = None,
) -> None:
    """Audit every tune of one or more organisms and write their card: card.json and README.md.

    Audits that are finished are read back, so a killed card goes on where it was.
    """
    from persona_probe.artifact import shipped, write_text
    from persona_probe.auditing.card import audits_of, read_card
    from persona_probe.auditing.card import card as audit_all
    from persona_probe.auditing.card_summary import check_marked, spliced
    from persona_probe.auditing.card_text import card_text

    homes = home or ([] if made else [shipped("organism")])
    if len({one.resolve().name for one in homes}) < len(homes):
        raise InputError(
            "two of the organisms' folders have the same name", fix="their audits go to --out by that name"
        )
    before = [read_card(path) for path in made or []]
    if readme is not None:
        check_marked(readme)  # not after hours of audits
    for one in homes:
        audits_of(one, tune or ())
    cards: list[dict[str, Any]] = []
    with telling() as told:
        for one in homes:
            whose = f"{one.name}: " if len(homes) > 1 else ""
            cards.append(
                audit_all(
                    one,
                    out_dir / one.resolve().name if len(homes) > 1 else out_dir,
                    tunes=tune or (),
                    progress=lambda text, whose=whose: told(whose + text),
                )
            )
    cards += before
    write_text(out_dir / "README.md", card_text(cards))
    if readme is not None:
        write_text(readme, spliced(readme.read_text(encoding="utf-8"), cards))
    out.print(f"card: {out_dir / 'README.md'}", markup=False, soft_wrap=True)
