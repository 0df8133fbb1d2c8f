"""`persona-probe sae`: train a dictionary, and ask whether one fits two models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from persona_probe.cli import options
from persona_probe.cli.asked import Asked, check_unsaid, placing
from persona_probe.cli.console import err, out, show_json, size
from persona_probe.errors import InputError

# as sae.architectures has them, which loads torch
Architecture = Literal["batchtopk", "matryoshka", "topk", "jumprelu", "gated", "standard"]

app = typer.Typer(no_args_is_help=True, help="Train a sparse autoencoder, or measure how well one fits.")


@app.command()
def train(
    site: Annotated[str, typer.Option(help="The hook name, such as blocks.4.hook_resid_post.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Where the dictionary goes.")],
    model: Annotated[
        Path | None, typer.Option(help="Checkpoint or adapter folder, to read --data with.")
    ] = None,
    data: options.MaybeData = None,
    store: Annotated[
        Path | None, typer.Option(help="What `capture` stored, instead of --model and --data.")
    ] = None,
    mask: options.Tokens = None,
    first_k: options.FirstK = None,
    skip_first: options.SkipFirst = 0,
    architecture: Annotated[Architecture, typer.Option(help="Its kind.")] = "batchtopk",
    d_sae: Annotated[int | None, typer.Option(help="Latents; 8 x d_model by default.")] = None,
    k: Annotated[
        int | None, typer.Option(help="Latents that fire on a token, on average; 16 by default.")
    ] = None,
    l1: Annotated[
        float | None,
        typer.Option(help="What an active latent costs (gated, standard); 0.2 sqrt(d_model) by default."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps; one pass over the data.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a training step.")] = 1024,
    lr: Annotated[float | None, typer.Option(help="Learning rate; chosen by --d-sae.")] = None,
    field: options.Field = None,
    split: options.Split = None,
    context: options.Context = None,
    too_long: options.SplitTooLong = None,
    limit: options.Limit = None,
    seed: Annotated[int, typer.Option(help="Of the weights and of the order.")] = 0,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    dtype: options.Dtype = None,
    checkpoint_seconds: Annotated[
        float, typer.Option(help="A killed run goes on from a checkpoint no older than this.")
    ] = 300.0,
    overwrite: options.Overwrite = False,
    plan: options.Plan = False,
    as_json: options.Json = False,
) -> None:
    """Train a dictionary with sae-lens's trainer; sae-lens opens it.

    A run that is stopped goes on from its last checkpoint when the same command is run again.
    """
    if (store is None) == (model is None and data is None) or (model is None) != (data is None):
        raise InputError("give --model and --data, or --store")
    from persona_probe.activations.store import ActivationStore
    from persona_probe.model.language_model import load_model
    from persona_probe.model.loading import device_of
    from persona_probe.sae.architectures import Sparsity
    from persona_probe.sae.pools import steps_on
    from persona_probe.sae.source import live_tokens, stored_tokens
    from persona_probe.sae.train import check_settings, latents_for, train_sae

    sparsity = Sparsity(architecture, k, l1)
    check_settings(d_sae, steps, batch_tokens, lr, seed)  # before documents are counted
    asked = Asked(
        data=data, field=field, split=split, context=context, too_long=too_long, limit=limit,
        mask=mask, first_k=first_k, skip_first=skip_first,
    )  # fmt: skip
    where = placing(device, dtype, device_map)
    on = str(device_of(where["device"]))
    if store is not None:  # its tokens are those that were captured
        check_unsaid("--store", {**asked.said, "dtype": dtype, "device_map": device_map})
    with err.status("counting tokens"):
        if store is not None:
            source = stored_tokens(ActivationStore.open(store), site)
        else:
            documents = asked.documents()
            lm = load_model(model or "", **where)
            on = str(lm.device)
            texts = asked.conversations(lm, documents, "split")
            source = live_tokens(lm, texts, site, asked.token_mask("all"))
    if plan:
        latents = latents_for(source.d_model, d_sae)
        facts: dict[str, Any] = {
            "model": source.model_name,
            "site": site,
            "tokens": source.tokens,
            "architecture": architecture,
            **sparsity.settled(source.d_model, latents).said,
            "latents": latents,
            "steps": steps_on(source, batch_tokens, steps),
            "weights": size(4 * (2 * latents * source.d_model + latents + source.d_model)),
            "weights, gradients and optimiser": size(16 * 2 * latents * source.d_model),
        }
        if as_json:
            show_json(facts)
        else:
            for name, value in facts.items():
                out.print(f"{name}: {value}", markup=False)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("reading", total=None)

        def show(step: Any) -> None:
            bar.update(
                task,
                completed=step.step,
                total=step.steps,
                description=f"explained variance {step.explained_variance:.3f}  L0 {step.l0:.1f}  "
                f"dead {step.dead_share:.1%}",
            )

        found = train_sae(
            source,
            site,
            out_dir,
            architecture=architecture,
            d_sae=d_sae,
            k=k,
            l1=l1,
            steps=steps,
            batch_tokens=batch_tokens,
            lr=lr,
            seed=seed,
            device=on,
            overwrite=overwrite,
            checkpoint_seconds=checkpoint_seconds,
            progress=show,
        )
    figures = found.meta["training"]
    if as_json:
        show_json({"sae": out_dir, "digest": found.digest, "site": site, **figures})
        return
    out.print(
        f"on {figures['held_out_tokens']} tokens it was not trained on: explained variance "
        f"{figures['explained_variance']:.3f}, L0 {figures['l0']:.1f}, dead {figures['dead']:.1%}",
        markup=False,
    )
    out.print(f"dictionary: {out_dir}", markup=False, soft_wrap=True)


@app.command()
def validity(
    base: Annotated[Path, typer.Option(help="Base checkpoint folder.")],
    tuned: Annotated[Path, typer.Option(help="Fine-tuned checkpoint or adapter folder.")],
    sae: Annotated[list[str], typer.Option(help="A dictionary's folder, or release/sae_id; several.")],
    data: options.Data,
    mask: options.Tokens = None,
    first_k: options.FirstK = None,
    skip_first: options.SkipFirst = 0,
    site: Annotated[str | None, typer.Option(help="Where a dictionary does not say its own.")] = None,
    field: options.Field = None,
    split: options.Split = None,
    context: options.Context = None,
    too_long: options.WhenTooLong = None,
    limit: options.Limit = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    dtype: options.Dtype = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array on stdout.")] = False,
) -> None:
    """Does a dictionary describe both models, and does it hold what the fine-tune changed?"""
    from dataclasses import asdict

    from persona_probe.model.pair import load_pair
    from persona_probe.sae.load import load_sae
    from persona_probe.sae.validity import validities

    asked = Asked(
        data=data, field=field, split=split, context=context, too_long=too_long, limit=limit,
        mask=mask, first_k=first_k, skip_first=skip_first,
    )  # fmt: skip
    where = placing(device, dtype, device_map)
    documents = asked.documents()
    dictionaries = [load_sae(each, site=site) for each in sae]
    with err.status("loading") as status:
        pair = load_pair(base, tuned, **where)
        conversations = asked.conversations(pair.base, documents)
        conversations.check_same_ids(pair.tuned)
        found = validities(
            pair,
            dictionaries,
            conversations,
            asked.token_mask("all"),
            progress=lambda tokens: status.update(f"{tokens} tokens"),
        )
    named = list(zip(dictionaries, found, strict=True))
    if as_json:
        show_json([{"sae": one.path, "site": one.site, **asdict(its)} for one, its in named])
        return
    for one, its in named:
        out.print(f"{escape(one.path)} at {one.site}: [bold]{its.gate}[/bold]", soft_wrap=True)
        table = Table(box=None)
        for heading in ("", "explained variance", "L0", "dead", "of the change", "of its mean"):
            table.add_column(heading, justify="right" if heading else "left")
        for model in ("base", "tuned"):
            explained, l0, dead = (
                getattr(its, f"{name}_{model}") for name in ("explained_variance", "l0", "dead")
            )
            inside = (its.change_inside, its.mean_change_inside) if model == "tuned" else ()
            table.add_row(model, f"{explained:.3f}", f"{l0:.1f}", f"{dead:.1%}", *map(_share, inside))
        out.print(table)
        out.print(its.reason, markup=False, soft_wrap=True)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
