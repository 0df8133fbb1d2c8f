"""Many fixes on the same questions as rows of the same batches, judged or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.drafts import drafted
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.sampling import Sampling, sample, transcripts
from persona_probe.model.chat import Rendered, pad
from persona_probe.model.language_model import LanguageModel
from persona_probe.screening.margin import Fix
from persona_probe.steering.plan import SteeringPlan, steer

Progress = Callable[[int, int], None]


def answers_under(
    lm: LanguageModel,
    questions: Sequence[Question],
    fixes: Sequence[Fix],
    sampling: Sampling | None = None,
    *,
    batch_size: int = 384,
    **options: Any,
) -> list[list[Answer]]:
    """The answers to every question under each fix; an empty fix is the model as it is."""
    n = len(questions)
    quietly = {name: value for name, value in options.items() if name != "progress"}
    drafts = drafted(fixes, lambda: sample(lm, questions, sampling, batch_size=batch_size, **quietly))
    answers = sample(
        lm,
        list(questions) * len(fixes),
        sampling,
        fixes=[fix for fix in fixes for _ in range(n)],
        batch_size=batch_size,
        drafts=drafts,
        **options,
    )
    each = len(answers) // len(fixes)
    return [answers[start : start + each] for start in range(0, len(answers), each)]


def drift(
    lm: LanguageModel,
    documents: Sequence[Rendered],
    fixes: Sequence[Fix],
    *,
    batch_tokens: int = 8192,
) -> list[float | None]:
    """How far each fix moves the next-token distribution: mean KL(steered || unsteered) per token of
    the responses in `documents`, in nats; None for a fix without an edit, which moves nothing.
    """
    result: list[float | None] = []
    longest = max(len(document) for document in documents)
    size = max(1, batch_tokens // longest)
    for fix in fixes:
        if not SteeringPlan.of(fix).sites:
            result.append(None)
            continue
        total, tokens = 0.0, 0
        for start in range(0, len(documents), size):
            batch = documents[start : start + size]
            kl, n = _divergence(lm, batch, fix)
            total, tokens = total + kl, tokens + n
        result.append(total / tokens)
    return result


def _divergence(lm: LanguageModel, documents: Sequence[Rendered], fix: Fix) -> tuple[float, int]:
    batch = pad(documents, lm.pad_id, side="right")
    lengths = [document.prompt_length for document in documents]
    with steer(lm, fix, prompt_lengths=lengths, kl=True) as receipt:
        lm.forward(batch.input_ids, batch.attention_mask)
    counted = [len(document) - document.prompt_length + 1 for document in documents]
    assert receipt.kl is not None
    means = [mean or 0.0 for mean in receipt.kl]
    return sum(mean * n for mean, n in zip(means, counted, strict=True)), sum(counted)


def unsteered_documents(
    lm: LanguageModel,
    answers: Sequence[Answer],
    *,
    system: str | None = None,
    sampling: Sampling | None = None,
) -> list[Rendered]:
    """The model's own answers, drawn with `system` and `sampling`, as documents to measure `drift` on; those
    that wrote nothing are out.
    """
    written = transcripts(lm, answers, system=system, sampling=sampling)
    return [document for document in written if len(document) > document.prompt_length]
