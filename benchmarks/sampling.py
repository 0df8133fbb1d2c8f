"""The sampler: how many answers a second against `generate`, and what another batch shape changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from benchmarks.figure import Figure, medians
from persona_probe.artifact import shipped
from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.drawing import uniforms
from persona_probe.evaluation.questions import Question, load_questions
from persona_probe.evaluation.sampling import Sampling, sample, transcripts
from persona_probe.model.chat import pad, render
from persona_probe.model.language_model import LanguageModel, load_model

LOGIT_GAP = 1e-3
"""In fp32 on a CPU: a greedy token may differ only where the two best logits are closer than this ..."""
DRAW_GAP = 1e-4
"""... and a drawn one only where its random number is closer than this to a boundary between tokens."""


def run(quick: bool) -> list[Figure]:
    home = shipped("organism")
    lm = load_model(home / "base", adapter=home / "tunes/bad-health").merged()
    asked = [q for q in load_questions(home / "questions.jsonl") if q.split == "held-out"]
    return [*speed(lm, asked[:: 40 if quick else 10], quick), *batch_shapes(lm, asked[:: 20 if quick else 4])]


def speed(lm: LanguageModel, asked: Sequence[Question], quick: bool) -> list[Figure]:
    """Answers a second, drawn at temperature 1 from all tokens."""
    how = Sampling(max_new_tokens=32, samples=4)
    prompts = [render(lm.tokenizer, question.messages).ids for question in asked]
    drawing: dict[str, Any] = {"do_sample": True, "top_k": 0, "max_new_tokens": 32, "pad_token_id": lm.pad_id}

    def one_by_one() -> None:
        for prompt in prompts:
            for _ in range(how.samples):
                lm.hf.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **drawing)

    def in_one_batch() -> None:
        batch = pad(prompts, lm.pad_id)
        lm.hf.generate(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            num_return_sequences=how.samples,
            **drawing,
        )

    ours, loop, batched = "sample", "a loop of single generate calls", "one generate call, padded"
    with torch.no_grad():
        seconds = medians(
            {ours: lambda: sample(lm, asked, how), loop: one_by_one, batched: in_one_batch},
            repeats=1 if quick else 3,
        )
    rate = len(asked) * how.samples / seconds[ours]
    gain = seconds[loop] / seconds[ours]
    return [
        Figure("answers drawn", rate, "answers/s", loop, gain, ">= 5x", gain >= 5),
        Figure("answers drawn", rate, "answers/s", batched, seconds[batched] / seconds[ours]),
    ]


def batch_shapes(lm: LanguageModel, asked: Sequence[Question]) -> Iterator[Figure]:
    """Answers whose tokens depend on the batch that they were drawn in, of all."""
    for name, temperature, bound in (("greedy", 0.0, LOGIT_GAP), ("drawn", 1.0, DRAW_GAP)):
        how = Sampling(temperature, max_new_tokens=32, samples=2 if temperature else 1)
        whole = sample(lm, asked, how, batch_size=256)
        gaps: list[float] = []
        for size in (1, 7, 64):
            other = sample(lm, asked, how, batch_size=size)
            gaps += [
                gap_of(lm, a, b, how) for a, b in zip(whole, other, strict=True) if a.token_ids != b.token_ids
            ]
        yield Figure(
            f"{name} answers that differ in batches of 1, 7, 64 and 256",
            len(gaps),
            f"of {3 * len(whole)}",
            f"widest gap at a differing token: {max(gaps, default=0.0):.1e}",
            None,
            f"only where the gap is below {bound:g}",
            all(gap < bound for gap in gaps),
        )


@torch.no_grad()
def gap_of(lm: LanguageModel, one: Answer, other: Answer, how: Sampling) -> float:
    """How near to a tie the first token was at which two answers to one question differ: the distance
    of the two best logits (temperature 0), or of the random number from the nearer boundary of the
    token that it drew.
    """
    pairs = enumerate(zip(one.token_ids, other.token_ids, strict=False))
    place = next(i for i, (a, b) in pairs if a != b)
    prefix = transcripts(lm, [replace(one, token_ids=one.token_ids[:place])])[0].ids
    logits = lm.forward(torch.tensor([prefix]))[0, -1].double()
    if how.temperature == 0:
        first, second = logits.topk(2).values.tolist()
        return first - second
    ends = torch.softmax(logits / how.temperature, dim=-1).cumsum(0)
    drawn = float(uniforms(how.seed, one.question.id, one.sample, how.max_new_tokens)[place])
    return cast("float", (ends - drawn * ends[-1]).abs().min().item())
