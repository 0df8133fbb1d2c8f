"""The answers that a policy in training is rewarded for.

They are drawn by the loop that every evaluation is drawn by (`evaluation.decoding`), not by TRL's
`generate`: a prompt is read once for all its answers, rows that have ended are dropped, and prompt and
stop tokens are those of an evaluation to the token. Every answer has random numbers of its own, fixed by
(seed, its place in the run), so a run that was killed draws the same ones again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from persona_probe.errors import InputError
from persona_probe.evaluation.answers import Answer, opens_thought, read_answer
from persona_probe.evaluation.decoding import continue_prompts
from persona_probe.evaluation.drawing import draw, uniforms
from persona_probe.evaluation.sampling import prompt_of
from persona_probe.model.language_model import LanguageModel
from persona_probe.training.prompts import Prompt
from persona_probe.training.settings import GrpoSettings


@dataclass(frozen=True, eq=False)
class Rollouts:
    """Prompts as token ids, and how answers to them are drawn."""

    lm: LanguageModel
    """The base: its tokenizer and stop tokens."""
    prompts: tuple[Prompt, ...] = field(repr=False)
    """In the order in which they are asked, once per asking."""
    ids: tuple[tuple[int, ...], ...] = field(repr=False)
    """Of every prompt."""
    settings: GrpoSettings
    seed: int

    @classmethod
    def of(
        cls, lm: LanguageModel, prompts: Sequence[Prompt], settings: GrpoSettings, seed: int, context: int
    ) -> Rollouts:
        """Raises `InputError`, naming the prompt, where prompt and answer are longer than `context`."""
        rendered: dict[int, tuple[int, ...]] = {}
        for prompt in prompts:
            if id(prompt) in rendered:
                continue
            ids = prompt_of(lm.tokenizer, prompt.question).ids
            if len(ids) + settings.max_new_tokens > context:
                raise InputError(
                    f"prompt {prompt.question.id!r}: {len(ids)} tokens, with an answer of up to "
                    f"{settings.max_new_tokens}, and the context has room for {context}",
                    fix="shorten the prompt, or lower max_new_tokens",
                )
            rendered[id(prompt)] = ids
        return cls(lm, tuple(prompts), tuple(rendered[id(one)] for one in prompts), settings, seed)

    def draw(self, model: PreTrainedModel | PeftModel, places: Sequence[int]) -> list[Answer]:
        """One answer per place in `prompts`; a place that comes again gets its next sample.

        `model` is read in evaluation mode and left as it was. Raises `NonFiniteError`.
        """
        # past PEFT's wrapper, whose `forward` hides that only the last position's logits can be asked for
        policy = cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model
        asked = list(dict.fromkeys(places))
        number = {place: i for i, place in enumerate(asked)}
        samples = [list(places[:i]).count(place) for i, place in enumerate(places)]
        limit = self.settings.max_new_tokens
        table = torch.from_numpy(
            np.stack(
                [
                    uniforms(self.seed, f"place {place}", sample, limit)
                    for place, sample in zip(places, samples, strict=True)
                ]
            )
        ).to(next(model.parameters()).device)

        def pick(logits: Tensor, row: Tensor, step: int) -> Tensor:
            return draw(logits, table[row, step], temperature=self.settings.temperature)

        training = model.training
        model.eval()
        try:
            written = continue_prompts(
                policy,
                [self.ids[place] for place in asked],
                [number[place] for place in places],
                pick,
                max_new_tokens=limit,
                stop_ids=self.lm.eos_ids,
                pad_id=self.lm.pad_id,
                regrouped=lambda _: None,
            )
        finally:
            model.train(training)
        tokenizer = self.lm.tokenizer
        thinking = {place: opens_thought(tokenizer, self.ids[place]) for place in asked}
        return [
            read_answer(tokenizer, self.prompts[place].question, sample, one, thinking=thinking[place])
            for place, sample, one in zip(places, samples, written, strict=True)
        ]
