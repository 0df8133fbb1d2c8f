"""`persona-probe diff`: which latents a fine-tune moved, and whether a benign one would have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.markup import escape
from rich.table import Table

from persona_probe.cli import options
from persona_probe.cli.asked import Asked, check_unsaid, placing
from persona_probe.cli.console import err, out, show_error, show_json, show_share_done, size
from persona_probe.cli.reading import (
    PASSES,
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


def diff(
    base: Annotated[Path | None, typer.Option(help="Base checkpoint folder.")] = None,
    tuned: Annotated[Path | None, typer.Option(help="Fine-tuned checkpoint or adapter folder.")] = None,
    sae: options.Dictionaries = None,
    benign: Annotated[
        list[Path] | None, typer.Option(help="A harmless fine-tune of the same base; two or more test.")
    ] = None,
    questions: options.Questions = None,
    data: options.MaybeData = None,
    store: Annotated[
        Path | None, typer.Option(help="What `capture` stored of a pair, instead of --base and --tuned.")
    ] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Where everything goes.")] = None,
    tune: Annotated[
        str, typer.Option(help="Without --base and --tuned: which tune of the shipped organism.")
    ] = "bad-health",
    mask: options.Tokens = None,
    first_k: options.FirstK = None,
    skip_first: options.SkipFirst = 0,
    top: Annotated[int, typer.Option(help="Rows to show for each site.", min=1)] = 10,
    max_new_tokens: options.MaxNewTokens = None,
    field: options.Field = None,
    split: options.Split = None,
    context: options.Context = None,
    too_long: options.WhenTooLong = None,
    limit: options.Limit = None,
    one_by_one: Annotated[
        bool | None,
        typer.Option(
            "--one-by-one/--together",
            help="Read models one after the other; by default where they do not fit in memory together.",
        ),
    ] = None,
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
    """Rank the latents of a dictionary by how far a fine-tune moved them.

    Without arguments: the shipped pocket organism, tuned on bad health advice, against its benign
    tunes. Models that do not fit in memory together are read one after the other; with --store, none is
    loaded. A diff that was stopped goes on where it was; several processes may share one --out.
    """
    asked = Asked(
        questions=questions, data=data, field=field, split=split, context=context, too_long=too_long,
        limit=limit, max_new_tokens=max_new_tokens, mask=mask, first_k=first_k, skip_first=skip_first,
    )  # fmt: skip
    where = placing(device, dtype, device_map)
    if store is not None:  # it has its own models, data and mask
        others = {"batch_tokens": batch_tokens, "dtype": dtype, "device": device, "device_map": device_map}
        models = {"base": base, "tuned": tuned, "benign": benign, "one_by_one": one_by_one}
        check_unsaid("--store", {**models, **asked.said, **others})
    if (base is None) != (tuned is None):
        raise InputError("--base and --tuned go together", fix="give both, or neither for the organism")
    if store is None and (base is None or tuned is None):
        if sae or benign or questions or data:
            raise InputError("--sae, --benign, --questions and --data need --base and --tuned")
        from persona_probe.auditing.settings import organism_request

        request = organism_request(tune)
        base, tuned, benign = request.base, request.tuned, list(request.benign)
        sae, asked = [str(path) for path in request.sae], replace(asked, questions=str(request.questions))
    if not sae:
        raise InputError("--sae is missing", fix="a dictionary's folder, or release/sae_id of sae-lens")
    if store is None:
        asked.check()
    from persona_probe.diffing.readers import by_name
    from persona_probe.execution import UnfinishedError, read_share
    from persona_probe.model.language_model import load_model
    from persona_probe.model.loading import device_of
    from persona_probe.sae.load import load_sae

    if sae_device is not None:
        device_of(sae_device)
    share, run = read_share(shard), engine_of(engine, ray_address, actors)
    with err.status("loading"):
        dictionaries = [load_sae(path) for path in sae]
        named = by_name(dictionaries)
    how: dict[str, Any] = {"sae_device": sae_device, "share": share, "engine": run}
    if store is not None:
        job = _of_store(store, dictionaries, how)
    else:
        assert base is not None and tuned is not None
        with err.status("loading"):
            lm = load_model(base, **where)
        texts = read_texts(lm, [tuned, *(benign or ())], asked)
        read_in = str(lm.dtype).removeprefix("torch.")  # the others too, whoever loads them
        how |= {"batch_tokens": batch_tokens, "dtype": read_in, "device_map": device_map}
        job = _of_pair([lm], base, tuned, list(benign or ()), dictionaries, texts, how, one_by_one)
        job.settings.update({**asked.said, "mask": texts.mask.kind, "device": device})
        del lm
    if plan:
        show_plan(job.facts, named, as_json)
        return
    job.settings.update(sae={name: one.digest for name, one in named.items()}, sae_device=sae_device)
    folder = open_out(out_dir or Path("out") / f"diff-{job.name}", job.settings, overwrite)
    try:
        with unless_in_vain(folder, share), progress_bar(as_json) as told:
            found = job.run(folder, told)
    except UnfinishedError as unfinished:
        show_share_done(share, unfinished, as_json)
        return
    with finishing(folder):
        for name, one in found.items():
            one.save(folder / name, overwrite=True)
    if as_json:
        show_json({name: {**d.summary(), "top": d.top(top).to_dicts()} for name, d in found.items()})
    else:
        for name, one in found.items():
            show_diff(one, name, top)
            out.print(f"{folder / name / 'volcano.html'}\n", markup=False, soft_wrap=True)
    for missing in next(iter(found.values())).missing:
        show_error(f"missing: {missing}")


class _Job(NamedTuple):
    """A diff that is ready to run."""

    name: str
    settings: dict[str, object]
    """What decides the result: a folder of results holds one of them."""
    facts: dict[str, Any]
    """For --plan."""
    run: Callable[[Path, Any], Any]
    """With the folder of results, and what is told how far it is."""


def _of_store(path: Path, dictionaries: Any, how: dict[str, Any]) -> _Job:
    import torch

    from persona_probe.activations.store import ActivationStore
    from persona_probe.diffing.job import store_by_shards
    from persona_probe.diffing.shards import cut, shard_tokens
    from persona_probe.diffing.stored import StoredConversations, check_store
    from persona_probe.execution import Results

    store = ActivationStore.open(path)
    check_store(store, dictionaries)
    conversations = StoredConversations(store)
    facts = {
        "conversations": len(conversations),
        "tokens": len(store),
        "shards": len(cut(conversations, None, shard_tokens(torch.device("cpu")))),
        "models": len(store.models),
        "bytes of the store": sum(shard.bytes for shard in store.shards),
    }

    def run(folder: Path, told: Any) -> Any:
        return store_by_shards(store, dictionaries, Results(folder / "shards"), progress=told, **how)

    return _Job(path.resolve().name, {"store": store.digest}, facts, run)


def _of_pair(
    holder: list[Any], base: Path, tuned: Path, benign: list[Path], dictionaries: Any, texts: Any,
    how: dict[str, Any], one_by_one: bool | None,
) -> _Job:  # fmt: skip
    """`holder` has the base, and is emptied when it runs: where models are read one after the other, the
    base is let go.
    """
    from persona_probe.diffing.job import diff_by_shards
    from persona_probe.diffing.room import room_beside, settle
    from persona_probe.execution import Results, run_local
    from persona_probe.sae.load import check_fits

    device = holder[0].device
    for one in dictionaries:
        check_fits(one, holder[0])
    room = room_beside(holder[0], [tuned, *benign])
    here = how["engine"] is run_local
    # how much the machines of a cluster have free is not known here
    together = not one_by_one if one_by_one is not None else room.together or not here
    facts = {
        **texts.facts(device, how["batch_tokens"]),
        "models": 2 + len(benign),
        "read": "together" if together else "one after the other",
        "bytes of the base's weights": room.base,
        "bytes of weights beside it": room.needed,
        "bytes free": room.free,
    }

    def run(folder: Path, told: Any) -> Any:
        beside = settle(folder / PASSES, together, fixed=one_by_one is not None)
        if not beside and one_by_one is None:
            why = (
                "as this run began"
                if together
                else f"beside the base they need {size(room.needed)}, and {size(room.free or 0)} are free"
            )
            show_error(f"models are read one after the other, to the same figures ({why})")
        root = holder[0] if here and beside else base
        holder.clear()
        return diff_by_shards(
            root, tuned, dictionaries, texts.rendered, texts.clusters, Results(folder / "shards"),
            benign=benign, together=beside, answers=texts.answers, mask=texts.mask,
            device=device, progress=told, **how,
        )  # fmt: skip

    settings: dict[str, object] = {
        "base": base, "tuned": tuned, "benign": benign,
        **{name: how[name] for name in ("batch_tokens", "dtype", "device_map")},
    }  # fmt: skip
    return _Job(tuned.resolve().name, settings, facts, run)


def show_diff(found: Any, name: str, n: int) -> None:
    """The latents that moved furthest, and how much that is worth; `name` is the dictionary's."""
    names = found.models
    out.print(f"[bold]{escape(names[0])} → {escape(names[1])}[/bold] at {escape(name)}")
    said = (
        f"tested against {len(found.benign)} benign tunes"
        if found.tested
        else "described, not tested: give two or more --benign"
    )
    out.print(
        f"{found.tokens:,} tokens of {found.conversations} conversations, {found.clusters} questions "
        f"({left_out(found)}); "
        f"answers: {found.answers}; {said}\ndictionary: {found.validity.gate} ({found.validity.reason})",
        markup=False,
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("latent")
    headings = ["Δ", "[95%]", "mean", "fires"]
    headings += (["benign Δ (furthest)"] if found.benign else []) + (["q"] if found.tested else ["z"])
    for heading in headings:
        table.add_column(escape(heading), justify="right", no_wrap=True)
    for row in found.top(n).iter_rows(named=True):
        last = row["q_value"] if found.tested else row["z"]
        cells = [
            f"#{row['index']}",
            f"{row['delta']:+.3g}",
            "–" if row["low"] is None else f"[{row['low']:+.2g}, {row['high']:+.2g}]",
            f"{row['mean_base']:.3g} → {row['mean_tuned']:.3g}",
            f"{100 * row['fires_base']:.2g}% → {100 * row['fires_tuned']:.2g}%",
        ]
        if found.benign:
            cells.append(f"{row['benign_mean']:+.2g} ({row['benign_max']:+.2g})")
        cells.append("–" if last is None else f"{last:.2g}")
        sure = found.tested and last is not None and last < 0.05
        table.add_row(*map(escape, cells), style="bold" if sure else None)
    out.print(table)
