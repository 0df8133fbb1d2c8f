"""What the latents of an audit's fix are: read on the very answers that were judged.

No corpus is asked for: the tuned model reads its own held-out answers, which says where in them a latent
fires and, by their judgements, which of them drive it. (The base reading the same texts is no substitute: on
the organism its persona latent hardly fires there, because it is the tuned model that has the persona.)
What a latent stands for is better told by a corpus: `persona-probe interpret`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from persona_probe.auditing.inquiry import Inquiry
from persona_probe.evaluation.metrics import outcome
from persona_probe.evaluation.result import EvalResult
from persona_probe.evaluation.sampling import transcripts
from persona_probe.interpretation import interpret_all
from persona_probe.model.chat import Rendered
from persona_probe.model.language_model import LanguageModel
from persona_probe.screening.candidate import Carrier

MOST = 5
"""Latents that get a card."""
ANSWERS = 300
"""Of the tuned model that are read."""


def latent_cards(
    found: Inquiry, latents: Sequence[dict[str, Any]], doses: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """A card for each latent of the chosen fix; for the first causal latent where the fix has none.

    `latents` and `doses` are the audit's tables, from which what a latent *does* is put on its card.
    Latents that fire on none of the answers are left out.
    """
    dictionaries = {one.site: one for one in found.inputs.dictionaries}
    carriers = _carriers(found)
    if not carriers or not dictionaries:
        return []
    tuned = found.inputs.pair.tuned
    texts, labels = _answers(tuned, found.tuned)
    if not texts:
        return []
    wanted = {(one.site, one.index): one for one in carriers[:MOST]}
    read = interpret_all(
        tuned,
        [dictionaries[site].latent(index) for site, index in wanted if index is not None],
        texts,
        labels=labels,
        silent="leave out",
    )
    return [
        card.with_effect(
            _effect(found, latents, card.latent.sae.site, card.latent.index),
            [row for row in doses if row["name"] == wanted[card.latent.sae.site, card.latent.index].label],
        ).summary()
        for card in read
    ]


def _carriers(found: Inquiry) -> list[Carrier]:
    fix = found.chosen.finding.candidate.carriers if found.chosen else ()
    first = found.screen.latents[0].candidate.carriers if found.screen and found.screen.latents else ()
    return [one for one in fix if one.index is not None] or list(first)


def _answers(lm: LanguageModel, result: EvalResult) -> tuple[list[Rendered], list[dict[str, str]]]:
    """First answers to general questions, evenly over them, with what was made of them. Answers made
    elsewhere have no tokens of ours and are not read.
    """
    pairs = [
        (answer, judged)
        for answer, judged in zip(result.answers, result.judgements, strict=True)
        if answer.question.role == "general" and answer.sample == 0 and answer.token_ids
    ]
    pairs = pairs[:: -(-len(pairs) // ANSWERS) or 1]
    labels = [
        {
            "judged": outcome(answer, judged, result.trait).replace("_", " "),
            "asked about": answer.question.category or "anything",
        }
        for answer, judged in pairs
    ]
    return transcripts(lm, [answer for answer, _ in pairs]), labels


def _effect(found: Inquiry, latents: Sequence[dict[str, Any]], site: str, index: int) -> dict[str, Any]:
    for row in latents:
        if (row["site"], row["index"]) == (site, index):
            return row
    assert found.seen is not None
    return dict(found.seen.diffs[site].row(index))
