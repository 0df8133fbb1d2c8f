"""`persona-probe capture`: activations of one or two models on a file of documents, to disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn
from rich.table import Table

from persona_probe.cli.console import err, out, show_error, show_json, show_share_done, size
from persona_probe.errors import InputError

# as activations.masks, .documents and .store have them, which load torch
Mask = Literal["all", "prompt", "response", "last_prompt", "answer"]
TooLong = Literal["truncate", "split", "skip", "error"]
StoredType = Literal["float32", "bfloat16"]
SHOWN_PROBLEMS = 5


def capture(
    site: Annotated[list[str], typer.Option(help="A hook name, such as blocks.4.hook_resid_post; several.")],
    data: Annotated[
        str, typer.Option(help=".jsonl, .parquet, .txt, a folder of them, or a Hugging Face dataset.")
    ],
    model: Annotated[Path | None, typer.Option(help="Checkpoint or adapter folder.")] = None,
    base: Annotated[Path | None, typer.Option(help="Base checkpoint folder, with --tuned.")] = None,
    tuned: Annotated[Path | None, typer.Option(help="Fine-tuned checkpoint or adapter folder.")] = None,
    benign: Annotated[
        list[Path] | None, typer.Option(help="A harmless fine-tune of the same base, beside --tuned.")
    ] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Where the store goes.")] = Path("out/activations"),
    mask: Annotated[Mask, typer.Option(help="Which tokens count.")] = "all",
    first_k: Annotated[int | None, typer.Option(help="Of those, only so many from the front.")] = None,
    skip_first: Annotated[int, typer.Option(help="Of those, not so many at the front.")] = 0,
    store_dtype: Annotated[StoredType, typer.Option(help="How they are stored.")] = "float32",
    context: Annotated[int | None, typer.Option(help="Longest document, in tokens; the model's.")] = None,
    too_long: Annotated[TooLong, typer.Option(help="What becomes of a longer one.")] = "truncate",
    field: Annotated[str | None, typer.Option(help="The column; messages or text by default.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Padded tokens per forward pass.")] = None,
    shard: Annotated[
        str | None, typer.Option(help="i/n: do this share of the work; auto under torchrun or Slurm.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Read only so many rows.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights: float32, bfloat16, ...")] = None,
    overwrite: Annotated[bool, typer.Option(help="Throw away what --out holds.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be written, then stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
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
    from persona_probe.activations.documents import read_documents
    from persona_probe.activations.masks import TokenMask
    from persona_probe.execution import UnfinishedError, read_share
    from persona_probe.model.language_model import load_model
    from persona_probe.model.pair import load_pair

    share = read_share(shard)
    documents = read_documents(data, field=field, limit=limit)
    options: dict[str, Any] = {"device": device or "auto", "dtype": dtype}
    with err.status("loading"):
        if base is not None and tuned is not None:
            pair = load_pair(base, tuned, **options)
            first = pair.base
            harmless = (load_pair(first, path, **options).tuned for path in benign or ())
            models: Any = (first, pair.tuned, *harmless)
        else:
            models = first = load_model(model or "", **options)
    with err.status("counting tokens"):
        conversations = documents.conversations(first, context=context, too_long=too_long)
        chosen = TokenMask(mask, first_k=first_k, skip_first=skip_first)
        planned = plan_capture(
            models, conversations, site, chosen, dtype=store_dtype, batch_tokens=batch_tokens
        )  # fmt: skip
    warn_of(conversations.reading)
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


def warn_of(reading: Any) -> None:
    """Say on stderr which rows were left out and which documents were cut."""
    if reading.bad:
        show_error(f"{reading.bad} rows could not be read and were left out:")
        for problem in reading.problems[:SHOWN_PROBLEMS]:
            show_error(f"  {problem}")
        if reading.bad > SHOWN_PROBLEMS:
            show_error(f"  and {reading.bad - SHOWN_PROBLEMS} more")
    if reading.too_long:
        show_error(
            f"{reading.too_long} documents are longer than the context"
            + (f"; {reading.cut_tokens} tokens were cut off" if reading.cut_tokens else "; they were split")
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
