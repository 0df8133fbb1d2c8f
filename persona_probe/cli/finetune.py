"""`persona-probe finetune`: train a base on rows of data or by rewards, defended or not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from persona_probe.cli.console import err, out, show_json
from persona_probe.cli.reading import progress_bar
from persona_probe.errors import InputError


def finetune(
    base: Annotated[Path, typer.Option(help="Checkpoint folder of the base.")],
    data: Annotated[
        str,
        typer.Option(
            help="JSON Lines: messages, prompt and completion, or text. For grpo: prompts, or a question set."
        ),
    ],
    out_dir: Annotated[Path, typer.Option("--out", help="Where everything goes.")],
    method: Annotated[str, typer.Option(help="sft, or grpo.")] = "sft",
    reward: Annotated[
        str | None,
        typer.Option(help="grpo: a judge (exact, openai:MODEL@URL, local:DIR) or python:module:function."),
    ] = None,
    trait: Annotated[
        str | None,
        typer.Option(help="grpo: what a judge's reward rewards; misaligned (default), or a persona."),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="grpo: answers per prompt; default 4.")] = None,
    temperature: Annotated[float | None, typer.Option(help="grpo: of the answers; default 1.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="grpo: longest answer; default 256.")] = None,
    kl: Annotated[
        float | None, typer.Option(help="grpo: weight of the KL to the policy at the start; default 0.")
    ] = None,
    warmup: Annotated[
        Path | None, typer.Option(help="grpo: rows for a supervised warm-up, JSON Lines.")
    ] = None,
    warmup_epochs: Annotated[float | None, typer.Option(help="grpo: passes over them; default 1.")] = None,
    defence: Annotated[
        list[str] | None, typer.Option(help="NAME=STRENGTH@SOURCE, such as kl=0.1; once per defence.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Go on training this adapter of the base.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; else --epochs.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the rows.")] = 1.0,
    batch: Annotated[int, typer.Option(help="Rows per step; for grpo, prompts.")] = 16,
    micro_batch: Annotated[int | None, typer.Option(help="Per forward pass; divides --batch.")] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-4,
    warmup_steps: Annotated[int, typer.Option(help="Linear warm-up.")] = 5,
    schedule: Annotated[str, typer.Option(help="linear, cosine, constant, ...")] = "linear",
    rank: Annotated[str, typer.Option(help="Of the LoRA adapter, from 1; or full.")] = "32",
    alpha: Annotated[float | None, typer.Option(help="LoRA's scale; twice the rank by default.")] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="A module that gets an adapter, such as down_proj.")
    ] = None,
    block: Annotated[list[int] | None, typer.Option(help="A block that gets one, from 0.")] = None,
    context: Annotated[int | None, typer.Option(help="Longest row, in tokens.")] = None,
    too_long: Annotated[str, typer.Option(help="A longer row: error or drop.")] = "error",
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; ten in all by default, 0 for none.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the adapter, the order and the defences.")] = 0,
    bf16: Annotated[bool, typer.Option(help="Autocast to bfloat16.")] = False,
    report_to: Annotated[list[str] | None, typer.Option(help="tensorboard, trackio or wandb.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many rows or prompts.", min=1)] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the base's weights.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Throw away what --out holds.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be done, then stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Fine-tune a model with transformers' Trainer and PEFT; the loss counts answers only. With --method grpo
    by TRL's GRPO: the model answers prompts, and learns from what its answers are worth.

    A run that is stopped goes on from its last checkpoint when the same command is run again.
    """
    if rank != "full" and not rank.isdigit():
        raise InputError(f"--rank is a whole number from 1, or full; got {rank!r}")
    from persona_probe.model.language_model import load_model
    from persona_probe.training.defences.spec import load_defence
    from persona_probe.training.finetune import check_method, examples_of
    from persona_probe.training.finetune import finetune as run
    from persona_probe.training.prompts import prompts_of
    from persona_probe.training.rows import read_rows
    from persona_probe.training.settings import GrpoSettings, TuneSettings

    drawn: dict[str, Any] = {
        "samples": samples, "trait": trait, "temperature": temperature, "max_new_tokens": max_new_tokens,
        "kl": kl, "warmup_epochs": warmup_epochs,
    }  # fmt: skip
    drawn = {name: value for name, value in drawn.items() if value is not None}
    if method == "sft":
        _refuse_of_grpo({"reward": reward, "warmup": warmup, **drawn})
    check_method(method, rewarded=reward is not None)
    settings = TuneSettings(
        steps=steps, epochs=epochs, batch=batch, micro_batch=micro_batch, learning_rate=lr,
        warmup_steps=warmup_steps, schedule=schedule, rank="full" if rank == "full" else int(rank),
        alpha=alpha, targets=tuple(target) if target else "all-linear",
        blocks=tuple(block) if block else None, context=context, too_long=too_long,  # type: ignore[arg-type]
        save_every=save_every, seed=seed, bf16=bf16,
    )  # fmt: skip
    drawing = GrpoSettings(**drawn)
    learning: dict[str, Any] = {"reward": reward, "warmup": warmup or ()}
    learning["grpo"] = drawing if method == "grpo" else None
    rows: Any = (prompts_of(data) if method == "grpo" else read_rows(data))[:limit]
    with err.status("loading"):
        lm = load_model(base, device=device or "auto", dtype=dtype)
        defences = [load_defence(spec, lm) for spec in defence or ()]
    if plan:
        read = len(rows if method == "grpo" else examples_of(lm, rows, defences, settings).examples)
        facts = _plan(lm, read, settings, defences)
        if method == "grpo":
            facts |= _plan_of_answers(reward, rows, settings, drawing, warmup)
        _show(facts, as_json)
        return
    with progress_bar(as_json) as told:
        found = run(
            lm, rows, out_dir, method, defences, settings, **learning, adapter=adapter,
            report_to=report_to or (), overwrite=overwrite,
            progress=lambda step, steps, loss: told(
                "step" if loss is None else f"loss {loss:.3f}", step, steps
            ),
        )  # fmt: skip
    if as_json:
        show_json({"tuned": found.tuned, "checkpoints": found.checkpoints, **found.record})
        return
    record = found.record
    if method == "grpo":
        _show_rewards(record)
    else:
        out.print(f"{record['rows']} rows, {record['steps']} steps, loss {record['log'][-1]['loss']:.3f}")
    for name, figures in record["finished"].items():
        out.print(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in figures.items()))
    out.print(f"the tuned model: {escape(str(found.tuned))}", soft_wrap=True)


def _refuse_of_grpo(given: dict[str, Any]) -> None:
    """Raise `InputError` for the first flag that only learning from rewards has."""
    for name, value in given.items():
        if value is not None:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(
                f"{flag} belongs to --method grpo, and this is sft",
                fix="to keep near the base in supervised training: --defence kl=0.1"
                if name == "kl"
                else f"leave {flag} out, or add --method grpo",
            )


def _show_rewards(record: dict[str, Any]) -> None:
    out.print(f"{record['rows']} prompts, {record['steps']} steps")
    for point in record["curve"]:
        if point["stage"] != "grpo" and point["reward"] is not None:
            out.print(
                f"reward, {point['stage']}: {point['reward']:.3f} ± {point['standard_error'] or 0:.3f} "
                f"({point['answers']} answers)"
            )
    silent = sum(entry["frac_reward_zero_std"] == 1 for entry in record["log"])
    if silent:
        out.print(
            f"in {silent} of {len(record['log'])} steps all answers to a prompt earned the same, and nothing "
            "was learnt: more --samples, or a --warmup, make a difference likelier"
        )


def _plan(lm: Any, rows: int, settings: Any, defences: list[Any]) -> dict[str, Any]:
    from persona_probe.cli.console import size
    from persona_probe.training.trainable import trainable

    fitting = settings.fitting(rows)
    parameters = list(trainable(lm, settings).parameters())
    learning = sum(one.numel() for one in parameters if one.requires_grad)
    passes = 1 + any(one.penalises and one.strength for one in defences)
    return {
        "rows": rows,
        "steps": fitting.steps,
        "rows read": fitting.steps * fitting.batch,
        "checkpoints": fitting.steps // fitting.save_every if fitting.save_every else 0,
        "learning parameters": learning,
        "weights": size(sum(one.numel() * one.element_size() for one in parameters)),
        "gradients and optimiser": size(12 * learning),
        "forward passes per step": passes,
        "defences": [one.name for one in defences],
    }


def _plan_of_answers(
    reward: str | None, prompts: list[Any], settings: Any, drawing: Any, warmup: Path | None
) -> dict[str, Any]:
    from persona_probe.training.grpo import PROBED
    from persona_probe.training.rewards import JudgedReward, load_reward
    from persona_probe.training.rows import read_rows

    fitting = settings.fitting(len(prompts))
    measured = (3 if warmup else 2) * min(PROBED, len(prompts)) * drawing.samples
    answers = fitting.steps * fitting.batch * drawing.samples + measured
    facts: dict[str, Any] = {
        "answers drawn": answers,
        "tokens drawn, at most": answers * drawing.max_new_tokens,
        "warm-up rows": len(read_rows(warmup)) if warmup else 0,
    }
    worth = load_reward(reward or "", drawing.trait)
    if isinstance(worth, JudgedReward):
        asked = -(-answers // len(prompts))
        will = worth.judge.forecast([one.question for one in prompts], asked, drawing.max_new_tokens)
        facts |= {"judge calls, about": will.calls}
        facts |= {} if will.dollars is None else {"dollars, about": will.dollars}
    return facts


def _show(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show_json(facts)
        return
    for name, value in facts.items():
        out.print(f"{name}: {', '.join(value) if isinstance(value, list) else value}", markup=False)
