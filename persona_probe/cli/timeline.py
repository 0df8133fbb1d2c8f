"""`persona-probe timeline`: when, in a run or among tunes, did which latent move?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from persona_probe.cli import options
from persona_probe.cli.asked import Asked, placing
from persona_probe.cli.console import err, out, show_error, show_json, show_share_done
from persona_probe.cli.reading import (
    engine_of,
    finishing,
    left_out,
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
    sae: options.Dictionaries = None,
    fix: Annotated[
        list[Path] | None, typer.Option("--with", help="A fix, whose directions are followed.")
    ] = None,
    benign: Annotated[
        list[Path] | None, typer.Option(help="A harmless fine-tune of the same base: the band.")
    ] = None,
    questions: options.Questions = None,
    data: options.MaybeData = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Where everything goes.")] = None,
    mask: options.Tokens = None,
    first_k: options.FirstK = None,
    skip_first: options.SkipFirst = 0,
    top: Annotated[int, typer.Option(help="Latents to show.", min=1)] = 10,
    max_new_tokens: options.MaxNewTokens = None,
    field: options.Field = None,
    split: options.Split = None,
    context: options.Context = None,
    too_long: options.WhenTooLong = None,
    limit: options.Limit = None,
    shard: options.Shard = None,
    engine: options.Engine = "local",
    ray_address: options.RayAddress = None,
    actors: options.Actors = None,
    batch_tokens: options.BatchTokens = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    dtype: options.Dtype = None,
    sae_device: options.SaeDevice = None,
    overwrite: options.Overwrite = False,
    plan: options.Plan = False,
    as_json: options.Json = False,
) -> None:
    """Follow latents and directions through a run's checkpoints, or over several tunes.

    Without arguments: the shipped pocket organism's tunes, and the latents that they share. What was
    read before is not read again, also when a run has got further.
    """
    if (base is None) != (not checkpoints):
        raise InputError("--base and --checkpoints go together", fix="give both, or neither for the organism")
    asked = Asked(
        questions=questions, data=data, field=field, split=split, context=context, too_long=too_long,
        limit=limit, max_new_tokens=max_new_tokens, mask=mask, first_k=first_k, skip_first=skip_first,
    )  # fmt: skip
    where = placing(device, dtype, device_map)
    sources: Any
    if base is None or not checkpoints:
        if sae or fix or benign or questions or data:
            raise InputError("--sae, --with, --benign, --questions and --data need --base and --checkpoints")
        from persona_probe.auditing.settings import organism_request

        request = organism_request()
        base, benign = request.base, list(request.benign)
        asked = replace(asked, questions=str(request.questions))
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
    from persona_probe.diffing.readers import by_name
    from persona_probe.diffing.timeline import points_of
    from persona_probe.diffing.timeline import timeline as follow
    from persona_probe.execution import UnfinishedError, read_share
    from persona_probe.model.language_model import load_model
    from persona_probe.sae.load import load_sae

    share, run = read_share(shard), engine_of(engine, ray_address, actors)
    harmless = list(benign or ())
    points = points_of(sources)
    asked.check()
    with err.status("loading"):
        dictionaries = [load_sae(path) for path in sae or ()]
        named = by_name(dictionaries) if dictionaries else {}
        directions = _directions(fix or ())
        lm: Any = load_model(base, **where)
    folders = [Path(point.model) for point in points if isinstance(point.model, str | Path)]
    texts = read_texts(lm, [*folders, *harmless], asked)
    if plan:
        facts = {**texts.facts(lm.device, batch_tokens), "models": 1 + len(points) + len(harmless)}
        show_plan(facts, named, as_json)
        return
    del lm
    settings: dict[str, object] = {
        "base": base, "benign": harmless, "with": fix,
        "sae": {name: one.digest for name, one in named.items()},
        **asked.said, "mask": texts.mask.kind, "batch_tokens": batch_tokens, "device": device,
        "device_map": device_map, "dtype": dtype, "sae_device": sae_device,
    }  # fmt: skip
    folder = open_out(out_dir or Path("out") / f"timeline-{name}", settings, overwrite)
    try:
        with unless_in_vain(folder, share), progress_bar(as_json) as told:
            found = follow(
                base, sources, dictionaries, texts.rendered, texts.clusters, directions=directions,
                benign=harmless, mask=texts.mask, batch_tokens=batch_tokens, sae_device=sae_device,
                cache=folder / "shards", share=share, engine=run, progress=told, **where,
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
        f"{counted.tokens:,} tokens of {counted.conversations} conversations ({left_out(counted)})",
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
        cells = [_named(which)]
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
    latents = shared.select(pl.lit("latent").alias("kind"), "site", "index", "name")
    directions = found.top(0).select("kind", "site", "index", "name")
    return pl.concat([directions, latents])


def _named(which: Any) -> str:
    if which["kind"] == "direction":
        return which["name"]
    block = which["site"].removeprefix("blocks.").removesuffix(".hook_resid_post")
    return f"block {block} #{which['index']}" + (f" ({which['name']})" if which["name"] else "")


def _key(row: Any) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("kind", "site", "index", "name"))
