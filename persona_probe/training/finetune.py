"""Fine-tune a base on rows of data, defended or not, into a folder that can be taken up again.

    tune = finetune("base", "bad-health.jsonl", "runs/bad-health", settings=TuneSettings(steps=240))
    tune.load()                       # a LanguageModel, on the same base
    timeline("base", tune.checkpoints, sae, rendered)

    finetune("base", "questions.jsonl", "runs/rl", "grpo", reward="openai:gpt-4o", warmup="100-rows.jsonl")

The folder holds `settings.json` first, `checkpoints/checkpoint-*` as training goes, `tuned/` (an
adapter, or for rank "full" a whole checkpoint), `training.json` with the losses, and `manifest.json`
last. A run that was killed is taken up at its newest checkpoint and ends in the same weights; one
with other settings, data, base or defences is refused.

Methods: "sft" learns the answers of the rows (see `sft`), "grpo" draws its own and learns from their
rewards (see `grpo`; its folder also holds `answers.jsonl`, every answer with its reward).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

import polars as pl
from peft import PeftModel
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from persona_probe.artifact import RunFolder, StrPath, atomic_folder, digest_of, read_json, write_json
from persona_probe.errors import InputError, MissingExtraError
from persona_probe.evaluation.judges import Judge
from persona_probe.evaluation.questions import Question
from persona_probe.model.language_model import LanguageModel, load_model
from persona_probe.model.loading import adapter_digest, quietly
from persona_probe.training.defences.defence import Defence
from persona_probe.training.grpo import Asking, reinforce
from persona_probe.training.monitor import Alarm, Monitor
from persona_probe.training.placement import check_device
from persona_probe.training.prompts import Prompt, prompts_of
from persona_probe.training.rewards import Reward, load_reward
from persona_probe.training.rows import Row, Tokenised, read_rows, tokenise
from persona_probe.training.settings import GrpoSettings, TuneSettings
from persona_probe.training.sft import fit
from persona_probe.training.trainable import trainable

CHECKPOINTS, TUNED, RECORD, JUDGED = "checkpoints", "tuned", "training.json", "judge.jsonl"
METHODS = ("sft", "grpo")
Progress = Callable[[int, int, float | None], None]
"""Told the step, the steps in all, and the loss where it was logged."""


@dataclass(frozen=True)
class FineTune:
    """A finished fine-tune."""

    path: Path
    record: dict[str, Any] = field(repr=False)
    """The content of `training.json`."""

    @property
    def tuned(self) -> Path:
        """The adapter, or the whole checkpoint, that training ended in."""
        return self.path / TUNED

    @property
    def checkpoints(self) -> Path:
        """The trainer's folder, as `timeline` reads it."""
        return self.path / CHECKPOINTS

    @property
    def table(self) -> pl.DataFrame:
        """What was logged: step, loss, learning rate, and the penalty of each defence."""
        return pl.DataFrame(self.record["log"], infer_schema_length=None)

    @property
    def curve(self) -> pl.DataFrame:
        """Of reinforcement learning, the mean reward from before any warm-up on: `stage`, `updates` made so
        far (negative before GRPO), `reward`, `answers`, and where it was measured apart its `standard_error`.
        """
        return pl.DataFrame(self.record.get("curve", []), infer_schema_length=None)

    def load(self, base: LanguageModel | None = None, **options: Any) -> LanguageModel:
        """The tuned model; on the weights of `base` where one is given (and an adapter was trained)."""
        if base is not None and (self.tuned / "adapter_config.json").is_file():
            return base.without_adapter().with_adapter(self.tuned)
        return load_model(self.tuned, **options)

    def _repr_html_(self) -> str:
        steps = f"{self.record['steps']} steps"
        if "curve" in self.record:
            first, last = (_figure(self.record["curve"][i]["reward"]) for i in (0, -1))
            said = f"{self.record['rows']} prompts, {steps}, reward {first} to {last}"
        else:
            loss = _figure(self.record["log"][-1]["loss"] if self.record["log"] else None)
            said = f"{self.record['rows']} rows, {steps}, last loss {loss}"
        return f"<p>{said}; <code>{escape(str(self.tuned))}</code></p>"


def _figure(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


def finetune(
    base: str | Path | LanguageModel,
    data: StrPath | Sequence[Row] | Sequence[Question] | Sequence[Prompt],
    out: StrPath,
    method: str = "sft",
    defences: Sequence[Defence] = (),
    settings: TuneSettings | None = None,
    *,
    reward: str | Judge | Reward | Callable[..., Any] | None = None,
    grpo: GrpoSettings | None = None,
    warmup: StrPath | Sequence[Row] = (),
    adapter: StrPath | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    report_to: Sequence[str] = (),
    overwrite: bool = False,
    device: str = "auto",
    dtype: str | None = None,
    progress: Progress | None = None,
) -> FineTune:
    """Train `base` on `data` into `out`; what is there is gone on with.

    Args:
        base: a checkpoint folder, a hub id, or a model in memory (which is not touched).
        data: a JSON Lines file (see `rows`), or rows. For "grpo": prompts (see `prompts`), which may be a
            set of questions by name.
        method: "sft" or "grpo".
        defences: applied in this order; one of strength 0 changes nothing.
        reward: for "grpo", what an answer is worth: a spec, a judge, or a function (see `rewards`).
        grpo: for "grpo", how answers are drawn and rewarded.
        warmup: for "grpo", rows for a supervised warm-up, undefended.
        adapter: go on training this adapter of `base`, as re-alignment does.
        callbacks: transformers' own, such as `Monitor`.
        report_to: where transformers logs to as well: tensorboard, trackio, wandb.
        progress: told every step.

    Raises:
        InputError: rows that cannot be learnt from (naming the line), settings out of range, a model on a
            GPU other than the first, or `out` holding a run with other settings.
        MismatchError: an adapter, or a defence's directions, of another model.
        NonFiniteError: the loss or a gradient is not finite; names the step and the last checkpoint.
        BusyError: another process is writing to `out`.
        MissingExtraError: what `report_to` needs is not installed.
    """
    settings = settings or TuneSettings()
    _check_loggers(report_to)
    task = _task(method, data, reward, grpo, warmup, out)
    lm = base if isinstance(base, LanguageModel) else load_model(base, device=device, dtype=dtype)
    check_device(lm.device)
    wanted = _identity(lm, method, task, defences, settings, adapter)
    context = _context(lm, settings)
    tell = progress or (lambda *_: None)
    with RunFolder.open(out, wanted, overwrite=overwrite) as run:
        if run.complete:
            return FineTune(run.path, read_json(run.path / RECORD))
        options: dict[str, Any] = {"defences": defences, "callbacks": callbacks, "report_to": report_to}
        if isinstance(task, Asking):
            model = trainable(lm, settings, adapter)
            steps = settings.fitting(len(task.prompts)).steps
            options["progress"] = lambda step, loss: tell(step, steps, loss)
            record = reinforce(lm, model, task, settings, run, run.path / CHECKPOINTS, context, **options)
        else:
            model, record = _supervised(lm, task, settings, run.path, adapter, tell, options)
        finished = {one.name: dict(one.finish(model)) for one in _active(defences)}
        _save(model, lm, run.path / TUNED)
        record |= {
            "stopped": next((str(alarm) for alarm in map(_stopped, callbacks) if alarm), None),
            "finished": {name: figures for name, figures in finished.items() if figures},
        }
        write_json(run.path / RECORD, record)
        run.finish({"seed": settings.seed})
        return FineTune(run.path, read_json(run.path / RECORD))


def check_method(method: str, *, rewarded: bool) -> None:
    """Raise `InputError` for a method that there is not, and for "grpo" without a reward."""
    if method not in METHODS:
        raise InputError(f"there is no method {method!r}", fix=f"use {' or '.join(map(repr, METHODS))}")
    if method == "grpo" and not rewarded:
        raise InputError(
            "reinforcement learning needs a reward",
            fix="name one: --reward openai:MODEL@URL or python:module:function; in Python, reward= takes a "
            "function too",
        )


def _task(
    method: str,
    data: Any,
    reward: str | Judge | Reward | Callable[..., Any] | None,
    grpo: GrpoSettings | None,
    warmup: StrPath | Sequence[Row],
    out: StrPath,
) -> list[Row] | Asking:
    """What is to be learnt: rows, or prompts and what an answer is worth."""
    check_method(method, rewarded=reward is not None)
    if method == "sft" or reward is None:
        if reward is not None or grpo is not None or warmup:
            raise InputError('rewards and a warm-up belong to reinforcement learning: method="grpo"')
        return list(data) if isinstance(data, Sequence) and not isinstance(data, str) else read_rows(data)
    grpo = grpo or GrpoSettings()
    worth = load_reward(reward, grpo.trait, record=Path(out) / JUDGED)
    rows = read_rows(warmup) if isinstance(warmup, str | PathLike) else warmup
    return Asking(tuple(prompts_of(data)), worth, grpo, tuple(rows))


def examples_of(
    lm: LanguageModel, rows: Sequence[Row], defences: Sequence[Defence], settings: TuneSettings
) -> Tokenised:
    """What a supervised fine-tune reads in one pass: the rows, as defences mix and dress them, as token ids.

    Raises `InputError` for rows that cannot be learnt from, or a pool that is too small.
    """
    for one in _active(defences):
        rows = one.rows(rows, settings.seed)
    return tokenise(rows, lm.tokenizer, _context(lm, settings), settings.too_long)


def _supervised(
    lm: LanguageModel,
    rows: list[Row],
    settings: TuneSettings,
    folder: Path,
    adapter: StrPath | None,
    tell: Progress,
    options: dict[str, Any],
) -> tuple[Any, dict[str, Any]]:
    text = examples_of(lm, rows, options["defences"], settings)
    model = trainable(lm, settings, adapter)
    fitting = settings.fitting(len(text.examples))
    log = fit(
        model,
        text.examples,
        fitting,
        folder / CHECKPOINTS,
        pad_id=lm.pad_id,
        progress=lambda step, loss: tell(step, fitting.steps, loss),
        micro_batch=settings.micro_batch,
        keep=None,
        **options,
    )
    return model, {"rows": len(text.examples), "dropped": text.dropped, "steps": fitting.steps, "log": log}


def _stopped(callback: TrainerCallback) -> Alarm | None:
    return callback.stopped if isinstance(callback, Monitor) else None


def _active(defences: Sequence[Defence]) -> list[Defence]:
    return [one for one in defences if one.strength != 0]


def _identity(
    lm: LanguageModel,
    method: str,
    task: list[Row] | Asking,
    defences: Sequence[Defence],
    settings: TuneSettings,
    adapter: StrPath | None,
) -> dict[str, object]:
    """What must be the same for a run to be taken up."""
    data = task.prompts if isinstance(task, Asking) else task
    return {
        "method": method,
        "base": lm.checkpoint.weights_digest or lm.checkpoint.digest,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "adapter": None if adapter is None else adapter_digest(adapter),
        "data": digest_of([one.record() for one in data]),
        "defences": [one.record() for one in defences],
        **(task.record() if isinstance(task, Asking) else {}),
        **asdict(settings),
    }


def _check_loggers(names: Sequence[str]) -> None:
    """Raise `InputError` for one that transformers does not know, `MissingExtraError` for one to install."""
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise InputError(
                f"transformers cannot log to {name!r}", fix="report_to takes tensorboard, trackio or wandb"
            )
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except RuntimeError as error:
            raise MissingExtraError(str(error), command=f"pip install {name}") from error


def _context(lm: LanguageModel, settings: TuneSettings) -> int:
    """The longest row, in tokens. Raises `InputError` for a setting beyond what the model can read."""
    config: Any = lm.hf.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if settings.context is None:
        return int(limit or 2048)
    if limit is not None and settings.context > limit:
        raise InputError(f"context is {settings.context} tokens, and {lm.name} reads at most {limit}")
    return settings.context


def _save(model: Any, lm: LanguageModel, folder: Path) -> None:
    with atomic_folder(folder, overwrite=True) as target, quietly():
        if isinstance(model, PeftModel):
            # TRL's reference, where there is one, is another adapter of the same model
            model.save_pretrained(str(target), save_embedding_layers=False, selected_adapters=["default"])
        else:
            model.save_pretrained(str(target))
        lm.tokenizer.save_pretrained(str(target))
        (target / "README.md").unlink(missing_ok=True)  # PEFT's form to fill in
