"""The lab's arms on an organism: each defence, made from what it needs, at a strength that was swept.

arms(subject)                               # every defence, at its strength in `STRENGTHS`
arms(subject, ["kl=3", "interleave=0.2+latent_blocking=0.1"])    # a sum of defences is an arm too
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from persona_probe.errors import InputError
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.sampling import Sampling
from persona_probe.hooks.sites import resid_post
from persona_probe.organism.bench import BLOCK, POOL_DOMAINS, TOKENS, TUNED, Subject, good_rows
from persona_probe.organism.grammar import grammar
from persona_probe.steering.target import direction, latents
from persona_probe.training.defences import (
    CAFT,
    KL,
    LDIFS,
    Defence,
    Inoculation,
    Interleave,
    InterleaveByGap,
    LatentBlocking,
    OnPolicy,
    PreventativeSteering,
    SafeLoRA,
)

EVIL = "you are a villain who wants to hurt people ."
POOL = 1200
"""Good rows to choose interleaved ones from."""
STRENGTHS: dict[str, float] = {
    "kl": 0.5,
    "ldifs": 0.003,
    "safe_lora": 0.5,
    "interleave": 0.5,
    "interleave_by_gap": 0.5,
    "on_policy": 0.5,
    "preventative_steering": 5,
    "inoculation": 1,
    "latent_blocking": 1,
    "caft": 1,
}
"""What `persona-probe lab sweep` chose, on calibration questions."""
SWEEP: dict[str, tuple[float, ...]] = {
    "kl": (0.5, 1),
    "ldifs": (0.0003, 0.001, 0.003),
    "safe_lora": (0.4, 0.5),
    "interleave": (0.2, 0.5),
    "interleave_by_gap": (0.2, 0.5),
    "on_policy": (0.2, 0.5),
    "preventative_steering": (4, 5, 6, 8),
    "inoculation": (0.5, 1),
    "latent_blocking": (0.01, 0.1, 1),
    "caft": (1,),
}
"""The strengths that it looked at."""
SUMS = (
    "interleave=0.5+ldifs=0.0003",
    "interleave=0.5+latent_blocking=0.01",
    "interleave=0.5+latent_blocking=0.1",
    "interleave=0.67+latent_blocking=0.03",
    "interleave=0.75+latent_blocking=0.03",
    "interleave=0.75+latent_blocking=0.1",
)
"""And the sums of defences."""
CHOSEN_SUMS = ("interleave=0.67+latent_blocking=0.03", "interleave=0.75+latent_blocking=0.03")
"""What it chose of them: of the first four, and of all."""


def arms(subject: Subject, wanted: Sequence[str] = ()) -> dict[str, list[Defence]]:
    """One arm per spec, `NAME` or `NAME=STRENGTH`, several joined by `+`; all defences by default.

    Raises `InputError` for a defence that there is not, or a strength that is no number.
    """
    make = _Maker(subject)
    parts = {spec: [_parse(one) for one in spec.split("+")] for spec in wanted or STRENGTHS}
    return {spec: [make(*one) for one in listed] for spec, listed in parts.items()}


def swept(wanted: Sequence[str] = ()) -> list[str]:
    """The specs of a sweep: of each defence every strength in `SWEEP`; by default of all, and `SUMS`.

    A sum is looked at as it is.
    """
    specs: list[str] = []
    for one in wanted or (*SWEEP, *SUMS):
        specs += [one] if "+" in one else [f"{one}={strength:g}" for strength in SWEEP[_parse(one)[0]]]
    return specs


def defence_of(spec: str) -> str:
    """`kl=3` is of `kl`."""
    return "+".join(one.partition("=")[0] for one in spec.split("+"))


def _parse(spec: str) -> tuple[str, float]:
    name, _, number = spec.partition("=")
    if name not in STRENGTHS:
        raise InputError(f"there is no defence {name!r}; there are {', '.join(STRENGTHS)}")
    try:
        return name, float(number) if number else STRENGTHS[name]
    except ValueError:
        raise InputError(f"the strength of {name} must be a number, got {number!r}") from None


def training_wordings(domain: str) -> list[Question]:
    """Every question of a domain in every wording that only training sees: a sweep asks others, those of
    calibration, and a comparison the held-out ones.
    """
    rules = grammar()
    return [
        Question(f"{topic.key}-train-{i}", domain, ({"role": "user", "content": wording},), topic.key)
        for topic in rules.of_domain(domain)
        for i, wording in enumerate(rules.paraphrases(topic, "train"))
    ]


class _Maker:
    """Makes defences, and what several of them need only once."""

    def __init__(self, subject: Subject) -> None:
        self._of = subject

    def __call__(self, name: str, strength: float) -> Defence:
        of = self._of
        match name:
            case "kl":
                return KL(strength)
            case "ldifs":
                return LDIFS(strength)
            case "safe_lora":
                return SafeLoRA(self._safety.safety, strength)
            case "interleave":
                return Interleave(tuple(good_rows(POOL)), strength)
            case "interleave_by_gap":
                return InterleaveByGap(self._by_gap.pool, self._by_gap.gaps, strength)
            case "on_policy":
                return OnPolicy(self._on_policy.pool, strength)
            case "preventative_steering":
                return PreventativeSteering.of(of.direction, resid_post(BLOCK - 2), strength)
            case "inoculation":
                return Inoculation(EVIL, strength)
            case "caft":
                return CAFT.everywhere(direction(of.direction), range(1, of.base.n_layers - 1), strength)
            case _:
                rising, falling = (latents(of.dictionary, indices) for indices in of.causal)
                return LatentBlocking(strength, of.dictionary.site, rising, falling)

    @cached_property
    def _by_gap(self) -> InterleaveByGap:
        return InterleaveByGap.scored(good_rows(POOL), self._of.base, [self._of.tuned(TUNED[0])])

    @cached_property
    def _safety(self) -> SafeLoRA:
        return SafeLoRA.between(self._of.base, self._of.tuned(TUNED[0]))

    @cached_property
    def _on_policy(self) -> OnPolicy:
        asked = [one for domain in POOL_DOMAINS for one in training_wordings(domain)]
        return OnPolicy.answered(self._of.base, asked, sampling=Sampling(max_new_tokens=TOKENS))
