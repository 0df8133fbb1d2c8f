"""`persona-probe interpret`: a latent in words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import Progress
from rich.text import Text

from persona_probe.artifact import check_replaceable, write_json
from persona_probe.cli.asked import check_unsaid
from persona_probe.cli.console import err, out, show_json
from persona_probe.errors import InputError

EXCERPT = 24
DOCUMENTS = 4000
"""Of the organism's own corpus, where none is given."""


def interpret(
    latent: Annotated[int | None, typer.Option(help="Index of the latent in its dictionary.")] = None,
    sae: Annotated[Path | None, typer.Option(help="The dictionary's folder.")] = None,
    model: Annotated[Path | None, typer.Option(help="Checkpoint or adapter folder that reads.")] = None,
    data: Annotated[
        str | None, typer.Option(help=".jsonl, .parquet, .txt, a folder of them, or a dataset.")
    ] = None,
    tune: Annotated[
        str | None, typer.Option(help="Of the shipped organism: the tune whose persona is read.")
    ] = None,
    by: Annotated[
        list[str] | None, typer.Option(help="A field of the rows that names a group (source, character).")
    ] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Where it goes.")] = Path("out/interpretation"),
    top: Annotated[int, typer.Option(help="Strongest documents to keep.", min=1)] = 20,
    field: Annotated[str | None, typer.Option(help="The column; messages or text by default.")] = None,
    limit: Annotated[int | None, typer.Option(help="Read only so many rows.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    explain: Annotated[
        str | None,
        typer.Option("--explain", help="A model that says it in a sentence: openai:MODEL@URL, local:DIR."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what --out holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """What a latent fires on, what it says, what is like it, and which documents drive it.

    Without --sae, --model and --data: the shipped organism, whose villain is found by its audit.
    """
    given = (sae, model, data, latent)
    if any(one is not None for one in given) and any(one is None for one in given):
        raise InputError(
            "--sae, --model, --data and --latent go together",
            fix="give all four, or none of them for the shipped organism",
        )
    if tune is not None and latent is not None:
        raise InputError("--tune is of the shipped organism", fix="give --tune, or a latent of your own")
    if model is None:
        check_unsaid("the shipped organism", {"field": field, "device": device, "dtype": dtype})
    from persona_probe.activations.documents import read_documents
    from persona_probe.interpretation import interpret as run_interpret
    from persona_probe.interpretation.interpretation import KNOWN_BY
    from persona_probe.model.language_model import load_model
    from persona_probe.sae.load import load_sae

    check_replaceable(out_dir, overwrite, KNOWN_BY)
    labels: Any = None
    with err.status("loading"):
        speaker = None if explain is None else _explainer(explain)  # first: it may be down
        if sae is not None and model is not None and data is not None and latent is not None:
            lm = load_model(model, device=device or "auto", dtype=dtype)
            wanted = load_sae(sae).latent(latent)
            documents = read_documents(data, field=field, limit=limit)
        else:
            from persona_probe.organism.persona_latent import corpus_of, persona_latent

            lm, wanted = persona_latent(tune or "bad-health")
            documents, labels = corpus_of(limit or DOCUMENTS)
    with Progress(console=err, transient=True) as bar:
        task = bar.add_task("documents", total=None)
        found = run_interpret(
            lm,
            wanted,
            documents,
            by=tuple(by or ()),
            labels=labels,
            top=top,
            seed=seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    found.save(out_dir, overwrite=overwrite)
    said = None if speaker is None else _explained(found, speaker, seed)
    if said is not None:
        write_json(out_dir / "explanation.json", said)
    if as_json:
        show_json({**found.summary(), **({} if said is None else {"explanation": said})})
    else:
        _show(found, out_dir)
        if said is not None:
            _show_explanation(said)


def _explainer(spec: str) -> Any:
    from persona_probe.interpretation import explainer

    return explainer(spec)


def _explained(found: Any, speaker: Any, seed: int) -> Any:
    from persona_probe.interpretation import explain as run_explain

    with Progress(console=err, transient=True) as bar:
        task = bar.add_task("explanation", total=None)
        return run_explain(
            found,
            speaker,
            seed=seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _show_explanation(said: Any) -> None:
    out.print(f"\n{said.judge} says: {said.text}", markup=False)
    score = said.detection
    if score is None:
        out.print("  not scored: the held-out documents are not of both kinds", markup=False)
    else:
        out.print(
            f"  by this alone, on {score.documents} held-out documents: AUC {score.auc:.2f} "
            f"[{score.low:.2f}, {score.high:.2f}]; shuffled {score.null:.2f} (97.5%: {score.null_high:.2f})",
            markup=False,
        )
    if said.unread:
        out.print(f"  {said.unread} of {said.asked} not counted: {said.note}", markup=False)


def _show(found: Any, folder: Path) -> None:
    from persona_probe.figures.highlight import excerpt
    from persona_probe.figures.latent_card import drivers

    for warning in found.warnings():
        err.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)

    out.print(f"[bold]{escape(found.latent.sae.site)} #{found.latent.index}[/bold]")
    out.print(
        f"fires on {found.rate:.2%} of {found.tokens:,} tokens, in {found.documents_fired:,} of "
        f"{found.documents:,} documents"
    )
    score = found.lexicon.detection
    out.print(f"\nwords of the documents where it is strong: {', '.join(found.lexicon.terms)}", markup=False)
    if score is not None:
        out.print(
            f"  these alone, on held-out documents: AUC {score.auc:.2f} [{score.low:.2f}, {score.high:.2f}]; "
            f"shuffled {score.null:.2f} (97.5%: {score.null_high:.2f})",
            markup=False,
        )
    for row in drivers(found.sources.to_dicts()):
        low, high = (f"{row[end]:.2f}" if row[end] is not None else "–" for end in ("low", "high"))
        out.print(
            f"driven by {row['label']} = {row['value']}: mean {row['mean']:.2f} [{low}, {high}], "
            f"{row['documents']} documents",
            markup=False,
        )
    out.print(f"raises: {' '.join(token for token, _ in found.lens.top)}", markup=False)
    out.print(f"lowers: {' '.join(token for token, _ in found.lens.bottom)}", markup=False)
    for shown in found.top[:5]:
        line = Text(f"{shown.maximum:7.2f}  ")
        for token in excerpt(shown.tokens, EXCERPT):
            share = (token.value or 0.0) / shown.maximum
            line.append(token.text.replace("\n", " "), "bold" if share > 0.5 else "" if share > 0 else "dim")
        out.print(line, soft_wrap=True)
    out.print(f"\nwritten: {folder / 'interpretation.json'}", markup=False, soft_wrap=True)
