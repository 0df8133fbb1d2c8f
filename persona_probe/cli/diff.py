"""`persona-probe diff`: which latents a fine-tune moved, and whether a benign one would have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from persona_probe.cli.console import err, out, show_error, show_json
from persona_probe.cli.reading import engine_of, open_out, progress_bar, read_texts
from persona_probe.errors import InputError


def diff(
    base: Annotated[Path | None, typer.Option(help="Base checkpoint folder.")] = None,
    tuned: Annotated[Path | None, typer.Option(help="Fine-tuned checkpoint or adapter folder.")] = None,
    sae: Annotated[
        list[str] | None, typer.Option(help="A dictionary: a folder, or release/sae_id; once per site.")
    ] = None,
    benign: Annotated[
        list[Path] | None, typer.Option(help="A harmless fine-tune of the same base; two or more test.")
    ] = None,
    questions: Annotated[
        str | None, typer.Option(help="Questions (a file or a set); the base's greedy answers are read.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Documents, read as they are: .jsonl, .parquet, .txt, a folder.")
    ] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Where everything goes.")] = None,
    tune: Annotated[
        str, typer.Option(help="Without --base and --tuned: which tune of the shipped organism.")
    ] = "bad-health",
    mask: Annotated[
        str | None, typer.Option(help="Which tokens count: all, prompt, response, last_prompt, answer.")
    ] = None,
    top: Annotated[int, typer.Option(help="Rows to show for each site.")] = 10,
    max_new_tokens: Annotated[int, typer.Option(help="Of the base's answers to --questions.")] = 48,
    one_by_one: Annotated[
        bool, typer.Option("--one-by-one", help="Never hold two models in memory together.")
    ] = False,
    shard: Annotated[
        str | None, typer.Option(help="i/n: do this share of the work; auto under torchrun or Slurm.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray.")] = "local",
    ray_address: Annotated[str | None, typer.Option(help="Of a running Ray cluster; else one here.")] = None,
    actors: Annotated[int | None, typer.Option(help="Ray actors, a copy of the models each.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Padded tokens per forward pass.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many questions or documents.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    overwrite: Annotated[bool, typer.Option(help="Throw away the results that --out holds.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be read, then stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Rank the latents of a dictionary by how far a fine-tune moved them.

    Without arguments: the shipped pocket organism, tuned on bad health advice, against its benign
    tunes. A diff that was stopped goes on where it was; several processes may share one --out.
    """
    if (base is None) != (tuned is None):
        raise InputError("--base and --tuned go together", fix="give both, or neither for the organism")
    if base is None or tuned is None:
        if sae or benign or questions or data:
            raise InputError("--sae, --benign, --questions and --data need --base and --tuned")
        from persona_probe.auditing.settings import organism_request

        request = organism_request(tune)
        base, tuned, benign = request.base, request.tuned, list(request.benign)
        sae, questions = [str(path) for path in request.sae], str(request.questions)
    if not sae:
        raise InputError("--sae is missing", fix="a dictionary's folder, or release/sae_id of sae-lens")
    from persona_probe.diffing.job import diff_by_shards
    from persona_probe.execution import Results, read_share
    from persona_probe.model.language_model import load_model
    from persona_probe.sae.load import load_sae

    share, run = read_share(shard), engine_of(engine, ray_address, actors)
    harmless = list(benign or ())
    with err.status("loading"):
        dictionaries = [load_sae(path) for path in sae]
        lm: Any = load_model(base, device=device or "auto", dtype=dtype)
    texts = read_texts(
        lm, [tuned, *harmless], questions, data, limit=limit, max_new_tokens=max_new_tokens, mask=mask
    )
    if plan:
        _show_plan(lm, texts, dictionaries, 2 + len(harmless), as_json)
        return
    settings: dict[str, object] = {
        "base": base, "tuned": tuned, "benign": harmless, "sae": [one.digest for one in dictionaries],
        "questions": questions, "data": data, "mask": texts.mask.kind, "limit": limit,
        "max_new_tokens": max_new_tokens, "one_by_one": one_by_one, "batch_tokens": batch_tokens,
        "device": device, "dtype": dtype,
    }  # fmt: skip
    folder = open_out(out_dir or Path("out") / f"diff-{tuned.resolve().name}", settings, overwrite)
    by_path = base if engine != "local" or one_by_one else None
    results = Results(folder / "shards")
    with progress_bar(as_json) as told:
        holder = [lm]
        del lm
        found = diff_by_shards(
            holder.pop(), tuned, dictionaries, texts.rendered, texts.clusters, results, benign=harmless,
            together=not one_by_one, by_path=by_path, answers=texts.answers,
            mask=texts.mask, batch_tokens=batch_tokens, dtype=dtype, share=share, engine=run,
            progress=told,
        )  # type: ignore[arg-type]  # fmt: skip
    if found is None:
        out.print(f"share {share} is done; the process that finishes last writes the results", markup=False)
        return
    for site, one in found.items():
        one.save(folder / site, overwrite=True)
    if as_json:
        show_json({site: {**d.summary(), "top": d.top(top).to_dicts()} for site, d in found.items()})
    else:
        for site, one in found.items():
            show_diff(one, top)
            out.print(f"{folder / site / 'volcano.html'}\n", markup=False, soft_wrap=True)
    for missing in next(iter(found.values())).missing:
        show_error(f"missing: {missing}")


def show_diff(found: Any, n: int) -> None:
    """The latents that moved furthest, and how much that is worth."""
    names = found.models
    out.print(f"[bold]{escape(names[0])} → {escape(names[1])}[/bold] at {escape(found.site)}")
    said = (
        f"tested against {len(found.benign)} benign tunes"
        if found.tested
        else "described, not tested: give two or more --benign"
    )
    out.print(
        f"{found.tokens:,} tokens of {found.conversations} conversations, {found.clusters} questions; "
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


def _show_plan(lm: Any, texts: Any, dictionaries: Any, n_models: int, as_json: bool) -> None:
    from persona_probe.diffing.shards import cut, shard_tokens

    weights = sum(p.numel() * p.element_size() for p in lm.hf.parameters())
    facts = {
        "conversations": len(texts.rendered),
        "tokens": sum(map(len, texts.rendered)),
        "shards": len(cut(texts.rendered, texts.clusters, shard_tokens(lm.device))),
        "models": n_models,
        "sites": [one.site for one in dictionaries],
        "bytes of the base's weights": weights,
        "bytes of the dictionaries": sum(8 * one.d_sae * one.d_model for one in dictionaries),
    }
    if as_json:
        show_json(facts)
        return
    for name, value in facts.items():
        out.print(f"{name}: {', '.join(value) if isinstance(value, list) else f'{value:,}'}", markup=False)
