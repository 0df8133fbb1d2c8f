"""`persona-probe timeline`: when, in a run or among tunes, did which latent move?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from persona_probe.cli.capture import TooLong
from persona_probe.cli.console import err, out, show_error, show_json, show_share_done
from persona_probe.cli.reading import (
    engine_of,
    finishing,
    open_out,
    progress_bar,
    read_texts,
    show_plan,
    unless_in_vain,
)
from persona_probe.errors import InputError

SHOWN_POINTS = 8


def timeline(
    base: Annotated[Path | None, typer.Option(help="Base checkpoint folder.")] = None,
    checkpoints: Annotated[
        list[Path] | None,
        typer.Option(help="A Trainer's output folder; or several checkpoints or adapters, by name."),
    ] = None,
    sae: Annotated[
        list[str] | None, typer.Option(help="A dictionary: a folder, or release/sae_id; once per site.")
    ] = None,
    fix: Annotated[
        list[Path] | None, typer.Option("--with", help="A fix, whose directions are followed.")
    ] = None,
    benign: Annotated[
        list[Path] | None, typer.Option(help="A harmless fine-tune of the same base: the band.")
    ] = None,
    questions: Annotated[
        str | None, typer.Option(help="Questions (a file or a set); the base's greedy answers are read.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Documents, read as they are: .jsonl, .parquet, .txt, a folder.")
    ] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Where everything goes.")] = None,
    mask: Annotated[
        str | None, typer.Option(help="Which tokens count: all, prompt, response, last_prompt, answer.")
    ] = None,
    top: Annotated[int, typer.Option(help="Latents to show.", min=1)] = 10,
    max_new_tokens: Annotated[int, typer.Option(help="Of the base's answers to --questions.")] = 48,
    shard: Annotated[
        str | None, typer.Option(help="i/n: do this share of the work; auto under torchrun or Slurm.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray.")] = "local",
    ray_address: Annotated[
        str | None, typer.Option(help="host:port of a running Ray cluster, or auto; else one here.")
    ] = None,
    actors: Annotated[int | None, typer.Option(help="Ray actors, a copy of the model each.", min=1)] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Padded tokens per forward pass.")] = None,
    too_long: Annotated[
        TooLong, typer.Option(help="What becomes of documents longer than the context.")
    ] = "truncate",
    limit: Annotated[int | None, typer.Option(help="Only so many questions or documents.", min=1)] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    overwrite: Annotated[bool, typer.Option(help="Throw away the results that --out holds.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be read, then stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Follow latents and directions through a run's checkpoints, or over several tunes.

    Without arguments: the shipped pocket organism's tunes, and the latents that they share. What was
    read before is not read again, also when a run has got further.
    """
    if (base is None) != (not checkpoints):
        raise InputError("--base and --checkpoints go together", fix="give both, or neither for the organism")
    sources: Any
    if base is None or not checkpoints:
        if sae or fix or benign or questions or data:
            raise InputError("--sae, --with, --benign, --questions and --data need --base and --checkpoints")
        from persona_probe.auditing.settings import organism_request

        request = organism_request()
        base, benign, questions = request.base, list(request.benign), str(request.questions)
        sae = [str(path) for path in request.sae]
        tunes = sorted(request.tuned.parent.iterdir())
        sources = {path.name: path for path in tunes if path.is_dir() and path not in benign}
        name = "organism"
    elif len(checkpoints) == 1:
        sources, name = checkpoints[0], checkpoints[0].resolve().name
    else:
        sources, name = {path.resolve().name: path for path in checkpoints}, "tunes"
        if len(sources) < len(checkpoints):
            raise InputError("two of --checkpoints have the same name", fix="rename one of the folders")
    if not (sae or fix):
        raise InputError("nothing to follow", fix="give --sae, or --with a fix whose directions are followed")
    from persona_probe.diffing.timeline import points_of
    from persona_probe.diffing.timeline import timeline as follow
    from persona_probe.execution import UnfinishedError, read_share
    from persona_probe.model.language_model import load_model
    from persona_probe.sae.load import load_sae

    share, run = read_share(shard), engine_of(engine, ray_address, actors)
    harmless = list(benign or ())
    points = points_of(sources)
    with err.status("loading"):
        dictionaries = [load_sae(path) for path in sae or ()]
        directions = _directions(fix or ())
        lm: Any = load_model(base, device=device or "auto", dtype=dtype)
    texts = read_texts(
        lm,
        [*(Path(point.model) for point in points if isinstance(point.model, str | Path)), *harmless],
        questions,
        data,
        limit=limit,
        max_new_tokens=max_new_tokens,
        mask=mask,
        too_long=too_long,
    )
    if plan:
        facts = {**texts.facts(lm.device, batch_tokens), "models": 1 + len(points) + len(harmless)}
        show_plan(facts, dictionaries, as_json)
        return
    del lm
    settings: dict[str, object] = {
        "base": base, "benign": harmless, "sae": [one.digest for one in dictionaries], "with": fix,
        "questions": questions, "data": data, "too_long": too_long, "mask": texts.mask.kind, "limit": limit,
        "max_new_tokens": max_new_tokens, "batch_tokens": batch_tokens, "device": device, "dtype": dtype,
    }  # fmt: skip
    folder = open_out(out_dir or Path("out") / f"timeline-{name}", settings, overwrite)
    try:
        with unless_in_vain(folder, share), progress_bar(as_json) as told:
            found = follow(
                base, sources, dictionaries, texts.rendered, texts.clusters, directions=directions,
                benign=harmless, mask=texts.mask, batch_tokens=batch_tokens, device=device or "auto",
                dtype=dtype, cache=folder / "shards", share=share, engine=run, progress=told,
            )  # type: ignore[arg-type]  # fmt: skip
    except UnfinishedError as unfinished:
        show_share_done(share, unfinished, as_json)
        return
    with finishing(folder):
        found.save(folder / "timeline", overwrite=True)
    if as_json:
        tables = {"top": found.top(top), "first": found.first().head(top) if harmless else None}
        tables["shared"] = None if found.points[0].step is not None else found.shared()
        show_json({key: None if table is None else table.to_dicts() for key, table in tables.items()})
    else:
        _show(found, top)
        out.print(f"{folder / 'timeline' / 'timeline.html'}", markup=False, soft_wrap=True)
    for missing in found.missing:
        show_error(f"missing: {missing}")


def _directions(fixes: Any) -> dict[str, Any]:
    """Every direction of every fix, by a name of its own."""
    from persona_probe.diffing.trajectory import Probe
    from persona_probe.steering.io import load_fix

    found: dict[str, Any] = {}
    for path in fixes:
        for number, edit in enumerate(load_fix(path)):
            for row, vector in enumerate(edit.target.decoder):
                which = f" {edit.target.indices[row]}" if edit.target.indices is not None else ""
                name = f"{edit.target.label or path.name}{which}"
                found[name if name not in found else f"{name} ({number}.{row})"] = Probe(edit.site, vector)
    return found


def _show(found: Any, n: int) -> None:
    run = found.points[0].step is not None
    step = max(1, -(-len(found.points) // SHOWN_POINTS)) if run else 1
    shown = [*found.points[::-1][::step]][::-1]
    out.print(
        f"[bold]{escape(found.base)}[/bold] → {len(found.points)} {'checkpoints' if run else 'tunes'}; "
        f"benign band: {escape(', '.join(found.benign)) or 'none (give --benign)'}"
    )
    counted = found.counted
    out.print(
        f"{counted.tokens:,} tokens of {counted.conversations} conversations (left out: {counted.special:,} "
        f"special tokens, {counted.sinks:,} sinks)",
        markup=False,
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("Δ from the base", no_wrap=True)
    for point in shown:
        table.add_column(escape(("step " if run else "") + point.name), justify="right", overflow="fold")
    if found.benign:
        table.add_column("benign band", justify="right", no_wrap=True)
        table.add_column("first outside" if run else "outside", justify="right")
    first = {_key(row): row for row in found.first().iter_rows(named=True)} if found.benign else {}
    rows = found.table.partition_by("kind", "site", "index", "name", as_dict=True, maintain_order=True)
    for which in _chosen(found, n, run).iter_rows(named=True):
        its = {row["point"]: row for row in rows[_key(which)].iter_rows(named=True)}
        block = which["site"].removeprefix("blocks.").removesuffix(".hook_resid_post")
        cells = [which["name"] or f"block {block} #{which['index']}"]
        cells += [
            f"{its[point.name]['delta']:+.2g}{'*' if its[point.name]['outside'] else ''}" for point in shown
        ]
        if found.benign:
            row = next(iter(its.values()))
            began = first[_key(which)]
            cells.append(f"[{row['benign_low']:+.2g}, {row['benign_high']:+.2g}]")
            cells.append((began["first"] or "never") if run else f"{began['points_outside']}")
        table.add_row(*map(escape, cells))
    losses = [point.loss for point in shown]
    if any(loss is not None for loss in losses):
        table.add_row("loss", *("–" if loss is None else f"{loss:.3g}" for loss in losses))
    out.print(table)
    if found.benign:
        out.print("* the whole interval lies outside the benign band", markup=False)


def _chosen(found: Any, n: int, run: bool) -> Any:
    """Rows to show: of a run the latents furthest at its end, of tunes those that most of them share."""
    import polars as pl

    if run:
        return found.top(n)
    shared = found.shared().head(n)
    latents = shared.select(
        pl.lit("latent").alias("kind"), "site", "index", pl.lit(None, dtype=pl.String).alias("name")
    )
    directions = found.top(0).select("kind", "site", "index", "name")
    return pl.concat([directions, latents])


def _key(row: Any) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("kind", "site", "index", "name"))
