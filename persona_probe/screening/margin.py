"""The margin: how much more likely the tuned model's answer is than the base model's, teacher-forced.

A generation-free measure of the behaviour. Each *contrast* is one prompt with two answers: the one the
base model gives and the one the tuned model gives, which shows the trait. An edit that cures raises the
log-probability of the first and lowers that of the second; one that only breaks the model lowers both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from persona_probe.errors import InputError
from persona_probe.hooks.alike import Alike, blocks_before
from persona_probe.model.chat import Rendered, pad
from persona_probe.model.language_model import LanguageModel
from persona_probe.model.memory import halving, how_many, logit_bytes
from persona_probe.steering.plan import PlannedEdit, SteeringPlan, steer

Fix = tuple[PlannedEdit, ...]
BATCH_TOKENS = 16_384
BATCH_DOCUMENTS = 64


@dataclass(frozen=True)
class Contrast:
    """One prompt, rendered with the base model's answer and with the tuned model's."""

    question: str
    base: Rendered
    tuned: Rendered


@dataclass(frozen=True, eq=False)
class Margins:
    """Mean log-probability per answer token (nats), for every fix and contrast."""

    base_answer: Float[Tensor, "fix contrast"]
    tuned_answer: Float[Tensor, "fix contrast"]

    @property
    def margin(self) -> Float[Tensor, " fix"]:
        """Mean over contrasts; positive where the tuned model's answers win."""
        return (self.tuned_answer - self.base_answer).mean(dim=1)


def response_log_probabilities(
    lm: LanguageModel,
    documents: Sequence[Rendered],
    fixes: Sequence[Fix] | None = None,
    *,
    batch_tokens: int | None = None,
) -> Float[Tensor, " document"]:
    """Mean log-probability per response token of each document, each under its own fix.

    Documents of similar length share a batch, and what of them no fix touches is read once, so results do
    not depend on the order given. A batch has at most ``batch_tokens`` tokens, by default as many as there
    is memory for.
    """
    size = batch_tokens or how_many(lm, logit_bytes(lm), BATCH_TOKENS)
    return halving(lambda tokens: _read(lm, documents, fixes, tokens), size)


def _read(
    lm: LanguageModel,
    documents: Sequence[Rendered],
    fixes: Sequence[Fix] | None,
    batch_tokens: int,
) -> Float[Tensor, " document"]:
    of = fixes or [()] * len(documents)
    shared = [blocks_before(edit.site for edit in fix) for fix in of]
    result = torch.zeros(len(documents))
    for depth in sorted(set(shared)):
        # copies of a document side by side: the blocks before the first edit read it once for all fixes
        order = sorted(
            (i for i in range(len(documents)) if shared[i] == depth),
            key=lambda i: (len(documents[i].ids), documents[i].ids),
        )
        while order:
            count = max(1, batch_tokens // len(documents[order[-1]].ids))
            batch, order = order[-count:], order[:-count]
            read, edits = [documents[i] for i in batch], [of[i] for i in batch]
            result[batch] = _read_batch(lm, read, edits, depth)
    return result


def _read_batch(
    lm: LanguageModel, documents: Sequence[Rendered], fixes: Sequence[Fix], unedited: int
) -> Float[Tensor, " batch"]:
    # padded on the left, so that the answers end together: only their logits are needed
    ids, mask, _ = pad(documents, lm.pad_id)
    counted = torch.zeros(ids.shape, dtype=torch.bool)
    for row, document in enumerate(documents):
        counted[row, -len(document) :] = torch.tensor(document.response)
    lengths = [document.prompt_length for document in documents]
    with ExitStack() as stack:
        if any(fixes):
            stack.enter_context(steer(lm, SteeringPlan(tuple(fixes)), prompt_lengths=lengths))
        stack.enter_context(Alike(document.ids for document in documents).sharing(lm.hf, unedited))
        return mean_log_probability(lm, ids, mask, counted)


@torch.no_grad()
def mean_log_probability(
    lm: LanguageModel,
    ids: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    counted: Bool[Tensor, "batch pos"],
) -> Float[Tensor, " batch"]:
    """Mean log-probability (nats) of the tokens that are counted, per row."""
    first = int(counted.any(dim=0).int().argmax())
    kept = ids.shape[1] - max(first, 1) + 1
    logits = lm.forward(ids, mask, last=kept)[:, :-1]
    asked = ids[:, 1 - kept :].to(logits.device)
    chosen = logits.gather(-1, asked[..., None])[..., 0]
    log_p = (chosen.float() - logits.float().logsumexp(dim=-1)).cpu()
    weight = counted[:, 1 - kept :].float()
    return (log_p * weight).sum(dim=1) / weight.sum(dim=1)


def documents_that_fit(lm: LanguageModel, contrasts: Sequence[Contrast], copies: int = 1) -> int:
    """How many documents of the longest contrast's length there is memory for, at most `BATCH_DOCUMENTS`;
    ``copies`` is how often their logits are held (a backward pass holds them again).
    """
    longest = max((len(document) for one in contrasts for document in (one.base, one.tuned)), default=1)
    return how_many(lm, copies * longest * logit_bytes(lm), BATCH_DOCUMENTS)


def margins(lm: LanguageModel, contrasts: Sequence[Contrast], fixes: Sequence[Fix]) -> Margins:
    """Score both answers of every contrast under every fix (an empty fix is the model as it is).

    Raises:
        InputError: no contrasts.
    """
    base, tuned = _scores(lm, contrasts, fixes, lambda one: (one.base, one.tuned))
    return Margins(base, tuned)


def restored(lm: LanguageModel, contrasts: Sequence[Contrast], fixes: Sequence[Fix]) -> Float[Tensor, " fix"]:
    """Mean log-probability per token (nats) of the base model's answers under every fix.

    What a search climbs: it rises only when the base's answer comes back, not when the model breaks.
    Raises ``InputError`` as ``margins`` does.
    """
    return _scores(lm, contrasts, fixes, lambda one: (one.base,))[0].mean(dim=1)


def _scores(
    lm: LanguageModel,
    contrasts: Sequence[Contrast],
    fixes: Sequence[Fix],
    answers: Callable[[Contrast], tuple[Rendered, ...]],
) -> Float[Tensor, "answer fix contrast"]:
    if not contrasts:
        raise InputError("there is no contrast: no question on which the two models answer apart")
    documents = [document for one in contrasts for document in answers(one)]
    each = [fix for fix in fixes for _ in documents]
    scores = response_log_probabilities(lm, documents * len(fixes), each)
    return scores.reshape(len(fixes), len(contrasts), -1).permute(2, 0, 1)
