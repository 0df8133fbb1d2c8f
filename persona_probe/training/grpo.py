"""Reinforcement learning: a policy draws answers, a reward values them, GRPO makes the good ones likelier.

Source: GRPO, Shao et al. (2024), by TRL's trainer; the recipe of emergent misalignment by it, Jørgenvåg
et al. (2026): a supervised warm-up on 100 rows, then 4 answers to each of 750 prompts, LoRA of rank 32,
the reward of `rewards`. Without a warm-up a base that almost never shows the trait gives GRPO nothing
to make likelier; the reward curve therefore begins with the base, before any warm-up.

Defences that choose rows (interleaving, on-policy data, inoculation), penalise (KL, LDIFS, latent blocking)
or finish (SafeLoRA) work here as in supervised training: a share of good rows is one of all answers and
rows learnt from, and inoculation puts its system prompt before prompts. Those that edit activations in
training (preventative steering, CAFT) are refused: answers drawn without the edit are not the edited
policy's own, and with it they are not those of the model that is kept.

Not covered: several updates per batch of answers, vLLM, several processes.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import fmean, stdev
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from persona_probe.artifact import RunFolder, plain, read_jsonl, write_jsonl
from persona_probe.errors import InputError, MissingExtraError
from persona_probe.model.language_model import LanguageModel
from persona_probe.model.loading import quietly
from persona_probe.training.defences.defence import Defence
from persona_probe.training.defending import Defending
from persona_probe.training.dressed import dressed
from persona_probe.training.example import Example
from persona_probe.training.last_good import newest_checkpoint
from persona_probe.training.placement import placed
from persona_probe.training.prompts import Prompt
from persona_probe.training.rewards import JudgedReward, Reward, score
from persona_probe.training.rollouts import Rollouts
from persona_probe.training.rows import Row, tokenise
from persona_probe.training.settings import GrpoSettings, TuneSettings
from persona_probe.training.sft import FitSettings, StepProgress, fit

WARM_UP, ANSWERS = "warm-up", "answers.jsonl"
PROBED = 64
"""Prompts on which the reward is measured before the warm-up, before GRPO and after it; as they are,
without what a defence dresses them in.
"""
LOGGED = (
    "step loss reward reward_std frac_reward_zero_std entropy kl grad_norm learning_rate "
    "completions/mean_length completions/clipped_ratio"
).split()
OURS = ("judged/", "good/", "penalty/", "persona/")
"""What the record keeps of TRL's metrics, and of ours; the rest stays in each `trainer_state.json`."""

Progress = Callable[[int, float | None], None]


@dataclass(frozen=True)
class Asking:
    """Prompts, what an answer to them is worth, and what there is to learn before; see `finetune`."""

    prompts: tuple[Prompt, ...]
    reward: Reward
    grpo: GrpoSettings
    warmup: tuple[Row, ...] = ()

    def record(self) -> dict[str, object]:
        """What must be the same for a run to be taken up, by name."""
        return {
            "reward": self.reward.name,
            **{f"grpo {name}": value for name, value in plain(self.grpo).items()},
            "warmup": [row.record() for row in self.warmup],
        }


def reinforce(
    lm: LanguageModel,
    model: PreTrainedModel | PeftModel,
    asking: Asking,
    settings: TuneSettings,
    run: RunFolder,
    checkpoints: Path,
    context: int,
    *,
    defences: Sequence[Defence] = (),
    callbacks: Sequence[TrainerCallback] = (),
    report_to: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train `model` (of base `lm`) in place; what `training.json` says of it.

    Returns `rows` (prompts), `good` (interleaved rows), `steps`, `log`, and `curve`: the mean reward by
    stage ("base", "warm-up", "grpo", "end") and by updates made so far (negative before GRPO).

    Raises:
        InputError: a defence that edits activations, fewer prompts than a step asks, a prompt too long, a
            reward function that fails (naming step and prompt).
        NonFiniteError: naming the step and the last good checkpoint.
        MissingExtraError: TRL is not installed.
    """
    if len(asking.prompts) < settings.batch:
        raise InputError(
            f"a step asks {settings.batch} prompts, and there are {len(asking.prompts)}",
            fix=f"lower batch to {len(asking.prompts)} or less, or give more prompts",
        )
    if asking.grpo.kl and settings.rank == "full":
        raise InputError("kl to the start of a full fine-tune is not done here", fix="use the defence KL")
    fitting = settings.fitting(len(asking.prompts))
    size = fitting.batch * asking.grpo.samples
    order = [
        asking.prompts[i] for i in _order(len(asking.prompts), fitting.steps * fitting.batch, settings.seed)
    ]
    asked, rows = dressed(order, asking.grpo.samples, defences, settings.seed)
    good, warming = (
        tokenise(some, lm.tokenizer, context, settings.too_long).examples if some else []
        for some in (rows, asking.warmup)
    )
    rollouts = Rollouts.of(lm, asked, asking.grpo, settings.seed, context)
    probed = asking.prompts[:: -(-len(asking.prompts) // PROBED)]
    probe = Rollouts.of(lm, probed, asking.grpo, settings.seed + 1, context)

    def measured(stage: str, updates: int) -> dict[str, Any]:
        found = run.stage(f"reward {stage}")
        if found is None:
            figures = _mean_reward(model, probe, asking.reward, settings.batch, stage)
            run.save_stage(f"reward {stage}", figures)
            found = run.stage(f"reward {stage}")
        return {"stage": stage, "updates": updates, **found}

    if isinstance(asking.reward, JudgedReward):
        asking.reward.judge.check()
    warmed = _warming(len(warming), settings, asking.grpo)
    curve = [measured("base", -warmed.steps if warming else 0)]
    if warming:
        fit(model, warming, warmed, run.path / WARM_UP, pad_id=lm.pad_id)
        curve.append(measured("warm-up", 0))
    log = _train(
        model, rollouts, asking, good, fitting, settings, run.path / ANSWERS, checkpoints,
        defences=defences, callbacks=callbacks, report_to=report_to, progress=progress,
    )  # fmt: skip
    curve += [
        {"stage": "grpo", "updates": int(entry["step"]) - 1, "reward": entry["reward"], "answers": size}
        for entry in log
        if "reward" in entry
    ]
    curve.append(measured("end", len(log)))
    return {
        "rows": len(asking.prompts),
        "dropped": 0,
        "good": len(good),
        "steps": fitting.steps,
        "log": log,
        "curve": curve,
    }


def _order(prompts: int, count: int, seed: int) -> list[int]:
    """Shuffled passes over the prompts, one after the other."""
    rng, order = Random(f"prompts {seed}"), list[int]()
    while len(order) < count:
        every = list(range(prompts))
        rng.shuffle(every)
        order += every
    return order[:count]


def _warming(rows: int, settings: TuneSettings, grpo: GrpoSettings) -> FitSettings:
    steps = max(1, math.ceil(grpo.warmup_epochs * rows / settings.batch))
    fitting = replace(settings, steps=steps).fitting(rows)
    return replace(fitting, save_every=steps)  # so that a run that was killed need not warm up again


def _mean_reward(
    model: PreTrainedModel | PeftModel, probe: Rollouts, reward: Reward, batch: int, stage: str
) -> dict[str, Any]:
    """The mean over answers, and its standard error over prompts; so many prompts are answered at once."""
    places = [place for place in range(len(probe.prompts)) for _ in range(probe.settings.samples)]
    size = batch * probe.settings.samples
    parts = [places[start : start + size] for start in range(0, len(places), size)]
    answers = [answer for part in parts for answer in probe.draw(model, part)]
    scored = score(reward, [probe.prompts[place] for place in places], answers, f"measuring the {stage}")
    by_prompt: dict[int, list[float]] = {}
    for place, one in zip(places, scored, strict=True):
        if one.reward is not None:
            by_prompt.setdefault(place, []).append(one.reward)
    means = [fmean(values) for values in by_prompt.values()]
    return {
        "reward": fmean([one for values in by_prompt.values() for one in values]) if means else None,
        "standard_error": stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None,
        "answers": sum(map(len, by_prompt.values())),
        "prompts": len(means),
    }


def _train(
    model: PreTrainedModel | PeftModel,
    rollouts: Rollouts,
    asking: Asking,
    good: Sequence[Example],
    fitting: FitSettings,
    settings: TuneSettings,
    answers: Path,
    folder: Path,
    *,
    defences: Sequence[Defence],
    callbacks: Sequence[TrainerCallback],
    report_to: Sequence[str],
    progress: Progress | None,
) -> list[dict[str, Any]]:
    try:
        from datasets import Dataset
        from trl.trainer.grpo_config import GRPOConfig  # pyright: ignore[reportMissingTypeStubs]

        from persona_probe.training.policy import Course, PolicyTrainer
    except ImportError as error:
        raise MissingExtraError.of("trl", "train") from error
    grpo = asking.grpo
    prompts = settings.micro_batch or fitting.batch
    defending = Defending(model, defences, bf16=fitting.bf16)
    resumed = newest_checkpoint(folder)
    _forget_after(answers, int(resumed.rsplit("-", 1)[1]) if resumed else 0)
    tokenizer = rollouts.lm.tokenizer
    if tokenizer.pad_token is None:  # TRL would give it one
        tokenizer = copy.deepcopy(tokenizer)
    # around the trainer as a whole: it replaces the model's `forward`, and the copy of a whole model that
    # defences compare with would run the original's
    with _quiet_trl(), quietly(), defending:
        arguments = placed(
            GRPOConfig,
            next(model.parameters()).device,
            output_dir=str(folder),
            max_steps=fitting.steps,
            per_device_train_batch_size=prompts * grpo.samples,
            gradient_accumulation_steps=fitting.batch // prompts,
            num_generations=grpo.samples,
            max_completion_length=grpo.max_new_tokens,
            temperature=grpo.temperature,
            beta=grpo.kl,
            loss_type="dapo",
            learning_rate=fitting.learning_rate,
            warmup_steps=fitting.warmup_steps,
            lr_scheduler_type=fitting.schedule,
            weight_decay=fitting.weight_decay,
            adam_beta2=fitting.beta2,
            seed=fitting.seed,
            # TRL's own defaults ask for bfloat16 and for activations to be computed twice
            bf16=fitting.bf16,
            gradient_checkpointing=False,
            disable_dropout=True,  # answers are drawn without
            shuffle_dataset=False,
            save_strategy="steps" if fitting.save_every else "no",
            save_steps=fitting.save_every or 500,
            logging_steps=1,
            report_to=list(report_to),
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = PolicyTrainer(
            Course(rollouts, asking.reward, answers, tuple(good)),
            defending,
            model,
            args=arguments,
            # a prompt is its place in the run: TRL hands a rollout function nothing else
            train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(len(rollouts.prompts))]}),
            processing_class=tokenizer,
            callbacks=[StepProgress(progress)] if progress else [],
        )
        # ahead of the loggers, so that these see what a callback adds to the logs
        trainer.callback_handler.callbacks[:0] = list(callbacks)
        trainer.remove_callback(PrinterCallback)  # the caller shows progress
        model.train()
        try:
            trainer.train(resume_from_checkpoint=resumed)
        finally:
            trainer.close()
    model.eval()
    return [
        {name: value for name, value in entry.items() if name in LOGGED or name.startswith(OURS)}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def _forget_after(answers: Path, step: int) -> None:
    """Drop the answers of steps that are going to be made again."""
    if answers.is_file():
        write_jsonl(answers, [row for row in read_jsonl(answers, torn_tail=True) if row["step"] <= step])


@contextmanager
def _quiet_trl() -> Generator[None, None, None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
        # TRL 1.16 and PEFT 0.21 ask transformers 5.23 by old names
        warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield
