"""A persona vector from contrastive system prompts (Chen et al. 2025).

The model answers each question once asked to show the trait and once asked for its opposite; where a
judge says that it did as asked, the answers are kept, and the direction between the two is taken at
every layer, over response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from persona_probe.activations.masks import TokenMask
from persona_probe.errors import InputError
from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.judges import Judge, load_judge
from persona_probe.evaluation.metrics import COHERENT, check_judge, outcome
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.sampling import Sampling, sample, transcripts
from persona_probe.model.chat import Rendered
from persona_probe.model.language_model import LanguageModel
from persona_probe.steering.layers import LayerDirections, Method, directions_by_layer
from persona_probe.steering.persona_vectors import Trait


@dataclass(frozen=True, eq=False)
class PersonaContrast:
    """The directions, and what they were made of."""

    directions: LayerDirections
    having: tuple[Answer, ...]
    """Answers that show the trait, kept."""
    lacking: tuple[Answer, ...]
    drawn: int
    """Answers that were drawn on each side."""


def contrast(
    lm: LanguageModel,
    trait: Trait,
    *,
    questions: Sequence[Question] | None = None,
    judge: Judge | str | None = None,
    counts_as: str = "misaligned",
    sampling: Sampling | None = None,
    sites: Sequence[str] | None = None,
    methods: Sequence[Method] = ("means",),
    mask: TokenMask | None = None,
    **options: Any,
) -> PersonaContrast:
    """Directions of `trait` at every layer, from answers under its pairs of system prompts.

    With a judge, kept are the coherent answers that show the trait where it was asked for, and the
    coherent ones that do not where its opposite was (`counts_as` names it to the judge); without,
    all of them. `questions` are asked instead of the trait's own. `mask` says which
    tokens are averaged: the response (published), or the last prompt token, where it is decided who
    speaks and the words of the answers do not come in. `options` go to `sample`. Raises
    `InputError` where nothing is kept on one side, and what `directions_by_layer` raises.
    """
    asked = load_judge(judge) if isinstance(judge, str) else judge
    settings = sampling or Sampling()
    prompts = list(questions) if questions is not None else questions_of(trait)
    if asked is not None:
        check_judge(asked, prompts, counts_as)
    kept: tuple[list[Answer], list[Answer]] = ([], [])
    texts: tuple[list[Rendered], list[Rendered]] = ([], [])
    drawn = 0
    for pair in trait.instructions:
        for side, instruction in enumerate(pair):
            answers = sample(lm, prompts, settings, system=instruction, **options)
            drawn += len(answers) if side == 0 else 0
            if asked is not None:
                judged = zip(answers, asked.judge(answers), strict=True)
                seen = [(answer, outcome(answer, judgement, counts_as)) for answer, judgement in judged]
                answers = [
                    a for a, what in seen if what in COHERENT and (what == "misaligned") == (side == 0)
                ]
            answers = [answer for answer in answers if answer.text]
            kept[side].extend(answers)
            texts[side].extend(transcripts(lm, answers, system=instruction, sampling=settings))
    having, lacking = kept
    if not having or not lacking:
        raise InputError(
            f"of {drawn} answers on each side, {len(having)} show the trait {trait.name!r} when asked to "
            f"and {len(lacking)} do not when asked not to: there is nothing to compare",
            fix="other instructions, a larger model, or no judge",
        )
    directions = directions_by_layer(
        lm,
        *texts,
        ([one.question.question for one in having], [one.question.question for one in lacking]),
        sites=sites,
        methods=methods,
        mask=mask,
    )
    return PersonaContrast(directions, tuple(having), tuple(lacking), drawn)


def questions_of(trait: Trait) -> list[Question]:
    """The trait's own questions, each a cluster of its own."""
    return [
        Question(f"{trait.name}-{number}", trait.name, ({"role": "user", "content": text},))
        for number, text in enumerate(trait.questions)
    ]
