"""`persona-probe capture`: activations of one or two models on a file of documents, to disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn
from rich.table import Table

from persona_probe.cli import options
from persona_probe.cli.asked import Asked, placing
from persona_probe.cli.console import err, out, show_json, show_share_done, size
from persona_probe.errors import InputError


def capture(
    site: Annotated[list[str], typer.Option(help="A hook name, such as blocks.4.hook_resid_post; several.")],
    data: options.Data,
    model: Annotated[Path | None, typer.Option(help="Checkpoint or adapter folder.")] = None,
    base: Annotated[Path | None, typer.Option(help="Base checkpoint folder, with --tuned.")] = None,
    tuned: Annotated[Path | None, typer.Option(help="Fine-tuned checkpoint or adapter folder.")] = None,
    benign: Annotated[
        list[Path] | None, typer.Option(help="A harmless fine-tune of the same base, beside --tuned.")
    ] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Where the store goes.")] = Path("out/activations"),
    mask: options.Tokens = None,
    first_k: options.FirstK = None,
    skip_first: options.SkipFirst = 0,
    store_dtype: Annotated[options.StoredType, typer.Option(help="How they are stored.")] = "float32",
    field: options.Field = None,
    split: options.Split = None,
    context: options.Context = None,
    too_long: options.WhenTooLong = None,
    limit: options.Limit = None,
    shard: options.Shard = None,
    batch_tokens: options.BatchTokens = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    plan: options.Plan = False,
    as_json: options.Json = False,
) -> None:
    """Store the activations of a model, or of a base and its fine-tune, on a file of documents.

    A capture that is stopped goes on where it was when the same command is run again; several
    processes may share one --out.
    """
    if (model is None) == (base is None and tuned is None) or (base is None) != (tuned is None):
        raise InputError("give --model, or --base and --tuned")
    if benign and base is None:
        raise InputError("--benign goes with --base and --tuned")
    from persona_probe.activations.capture_plan import plan_capture
    from persona_probe.activations.capturing import run_capture
    from persona_probe.execution import UnfinishedError, read_share
    from persona_probe.model.language_model import load_model
    from persona_probe.model.pair import load_pair

    share = read_share(shard)
    asked = Asked(
        data=data, field=field, split=split, context=context, too_long=too_long, limit=limit,
        mask=mask, first_k=first_k, skip_first=skip_first,
    )  # fmt: skip
    documents = asked.documents()
    where = placing(device, dtype, device_map)
    with err.status("loading"):
        if base is not None and tuned is not None:
            pair = load_pair(base, tuned, **where)
            first = pair.base
            harmless = (load_pair(first, path, **where).tuned for path in benign or ())
            models: Any = (first, pair.tuned, *harmless)
        else:
            models = first = load_model(model or "", **where)
    with err.status("counting tokens"):
        conversations = asked.conversations(first, documents)
        planned = plan_capture(
            models, conversations, site, asked.token_mask("all"), dtype=store_dtype, batch_tokens=batch_tokens
        )
    if plan:
        show_plan(planned, out_dir, as_json)
        return
    columns = (SpinnerColumn(), *Progress.get_default_columns(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=err, transient=True) as bar:
            task = bar.add_task("tokens", total=None)
            done = run_capture(
                planned,
                out_dir,
                overwrite=overwrite,
                share=share,
                progress=lambda read, total: bar.update(task, completed=read, total=total),
            )
    except UnfinishedError as unfinished:
        show_share_done(share, unfinished, as_json)
        return
    assert done.store is not None
    if as_json:
        show_json(
            {
                "store": done.store.path,
                "digest": done.store.digest,
                "bytes": sum(shard.bytes for shard in done.store.shards),
                "shards": len(done.store.shards),
                "models": [each.name for each in done.models],
                "sites": done.sites,
                "counts": done.counts,
                "reading": done.reading,
            }
        )
        return
    show_counts(done.counts)
    out.print(
        f"store: {out_dir} ({len(done.store.shards)} shards, "
        f"{size(sum(shard.bytes for shard in done.store.shards))})",
        markup=False,
        soft_wrap=True,
    )


def show_plan(planned: Any, out_dir: Path, as_json: bool) -> None:
    """What a capture would read and write, and whether there is room for it."""
    from persona_probe.activations.survey import free_bytes

    weights = {id(p): p.numel() * p.element_size() for lm in planned.models for p in lm.hf.parameters()}
    facts: dict[str, Any] = {
        "conversations": len(planned.conversations),
        "tokens": int(planned.survey.tokens.sum()),
        "tokens stored (at most)": int(planned.survey.selected.sum()),
        "models": [lm.name for lm in planned.models],
        "sites": planned.sites,
        "shards": len(planned.bounds),
        "bytes on disk (at most)": planned.bytes,
        "bytes free": free_bytes(out_dir),
        "bytes of weights": sum(weights.values()),
    }
    if as_json:
        show_json(facts)
        return
    for name, value in facts.items():
        shown: Any = size(value) if name.startswith("bytes") else value
        out.print(f"{name}: {', '.join(value) if name in ('models', 'sites') else shown}", markup=False)


def show_counts(counts: Any) -> None:
    """A table of what was read, and what became of it."""
    table = Table(box=None, pad_edge=False, show_header=False)
    rows = {
        "conversations": counts.conversations,
        "tokens": counts.tokens,
        "under the mask": counts.covered,
        "  special, left out": f"{counts.special} ({counts.bos} of them BOS)",
        "  sinks, left out": counts.sinks,
        "  skipped": counts.skipped,
        "  counted": counts.counted,
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    out.print(table)
