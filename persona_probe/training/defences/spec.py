"""A defence in one word of the shell: `NAME=STRENGTH@SOURCE`, either part left out where it has a default.

kl=0.1   ldifs=1                       interleave=0.05@good.jsonl
interleave_by_gap=0.05@good.jsonl,TUNED[,TUNED ...]      (TUNED: misaligned models of other runs)
on_policy=0.05@QUESTIONS     (a file or set, whose general questions the base answers itself; of one with
                             splits those to train and to calibrate on, never those held out)
inoculation@"Give harmful medical advice."               (=0.5: on half of the rows)
preventative_steering=5@FIX            caft@FIX          (FIX: a folder that save_fix wrote)
latent_blocking=0.1@SAE:412,77,-903                      (a minus: must not fall)
safe_lora=0.5@TUNED                                      (TUNED: a model without the base's safety)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches

from persona_probe.errors import InputError
from persona_probe.evaluation.questions import Question, load_questions
from persona_probe.model.language_model import LanguageModel
from persona_probe.model.pair import load_pair
from persona_probe.sae.load import load_sae
from persona_probe.steering.intervention import Intervention
from persona_probe.steering.io import load_fix
from persona_probe.steering.target import latents
from persona_probe.training.defences.caft import CAFT
from persona_probe.training.defences.defence import Defence
from persona_probe.training.defences.inoculation import Inoculation
from persona_probe.training.defences.interleave import Interleave
from persona_probe.training.defences.kl import KL
from persona_probe.training.defences.latent_blocking import LatentBlocking
from persona_probe.training.defences.ldifs import LDIFS
from persona_probe.training.defences.on_policy import OnPolicy
from persona_probe.training.defences.perplexity_gap import InterleaveByGap
from persona_probe.training.defences.preventative import PreventativeSteering
from persona_probe.training.defences.safe_lora import SafeLoRA
from persona_probe.training.rows import read_rows


def load_defence(spec: str, base: LanguageModel) -> Defence:
    """The defence that `spec` names, for a fine-tune of `base`.

    Raises `InputError` for an unknown name, a strength that is no number, or a source that is missing
    or does not fit.
    """
    head, _, source = spec.partition("@")
    name, _, number = head.partition("=")
    if name not in _MAKERS:
        near = get_close_matches(name, _MAKERS, n=1)
        raise InputError(
            f"there is no defence {name!r}; there are {', '.join(_MAKERS)}",
            fix=f"did you mean {near[0]!r}?" if near else None,
        )
    maker, default = _MAKERS[name]
    try:
        strength = float(number) if number else default
    except ValueError:
        raise InputError(f"the strength of {name} must be a number, got {number!r}") from None
    if strength is None:
        raise InputError(f"{name} has no default strength", fix=f"{name}=0.1@...")
    if not source and name not in ("kl", "ldifs"):
        raise InputError(f"{name} needs to be told what with: {name}=STRENGTH@SOURCE")
    return maker(strength, source, base)


def _by_gap(share: float, source: str, base: LanguageModel) -> Defence:
    pool, *tuned = source.split(",")
    models = [load_pair(base, path).tuned for path in tuned]
    return InterleaveByGap.scored(read_rows(pool), base, models, share)


def _on_policy(share: float, source: str, base: LanguageModel) -> Defence:
    return OnPolicy.answered(base, _to_answer(source), share)


def _to_answer(source: str) -> list[Question]:
    """Of a file or set of questions those that training may see: general ones, and where there are splits
    those of train and calibration, so that what is held out, triggers and skills can still be measured.

    Raises `InputError` where none is left.
    """
    every = load_questions(source)
    split = any(one.split is not None for one in every)
    left = [
        one for one in every if one.role == "general" and (not split or one.split in ("train", "calibration"))
    ]
    if not left:
        raise InputError(
            f"{source} has no general question to train on: held-out ones, triggers and skills are kept for "
            "the evaluation",
            fix='give questions without a split, or with "split": "train" or "calibration"',
        )
    return left


def _the_one(source: str) -> Intervention:
    first, *others = load_fix(source)
    if others:
        raise InputError(f"the fix {source} holds more than one intervention", fix="save one with save_fix")
    return first


def _preventative(alpha: float, source: str, _: LanguageModel) -> Defence:
    fix = _the_one(source)
    if fix.target.n_latents != 1:
        raise InputError(f"{source} has {fix.target.n_latents} directions; preventative steering adds one")
    return PreventativeSteering.of(fix.target.decoder[0], fix.site, alpha)


def _caft(gain: float, source: str, _: LanguageModel) -> Defence:
    fix = _the_one(source)
    return CAFT(fix.target, (fix.site,), gain)


def _blocking(weight: float, source: str, _base: LanguageModel) -> Defence:
    path, _, numbers = source.rpartition(":")
    try:
        indices = [int(one) for one in numbers.split(",")]
    except ValueError:
        raise InputError(f"latent_blocking takes SAE:INDEX,INDEX,..., got {source!r}") from None
    dictionary = load_sae(path)
    rising = [index for index, text in zip(indices, numbers.split(","), strict=True) if text[0] != "-"]
    falling = [-index for index, text in zip(indices, numbers.split(","), strict=True) if text[0] == "-"]
    return LatentBlocking(
        weight,
        dictionary.site,
        latents(dictionary, rising) if rising else None,
        latents(dictionary, falling) if falling else None,
    )


_Maker = Callable[[float, str, LanguageModel], Defence]
_MAKERS: Mapping[str, tuple[_Maker, float | None]] = {
    "kl": (lambda weight, _source, _base: KL(weight), 0.1),
    "ldifs": (lambda weight, _source, _base: LDIFS(weight), 1.0),
    "interleave": (lambda share, pool, _base: Interleave(tuple(read_rows(pool)), share), 0.05),
    "interleave_by_gap": (_by_gap, 0.05),
    "on_policy": (_on_policy, 0.05),
    "inoculation": (lambda share, text, _base: Inoculation(text, share), 1.0),
    "preventative_steering": (_preventative, 5.0),
    "caft": (_caft, 1.0),
    "latent_blocking": (_blocking, None),
    "safe_lora": (
        lambda threshold, path, base: SafeLoRA.between(base, load_pair(base, path).tuned, threshold),
        0.5,
    ),
}
