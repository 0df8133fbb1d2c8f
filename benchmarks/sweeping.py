"""A sweep: many latents at many levels on the same questions, against one configuration at a time.

On the shipped organism: latents x levels x questions as rows of shared batches, and the same by Hugging
Face's own generate under `steer`, a batch of all questions for each configuration, padded on the left.
The answers of both are compared token by token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.figure import Figure, medians
from benchmarks.routes import general
from persona_probe.artifact import shipped
from persona_probe.evaluation.sampling import Sampling
from persona_probe.model.chat import pad, render
from persona_probe.model.language_model import LanguageModel, load_model
from persona_probe.sae.load import load_sae
from persona_probe.screening.sweeping import sweep
from persona_probe.steering import Intervention, Level, latents, steer

NEW_TOKENS = 32
NEAR_TIE = 1e-3
"""A differing token is let pass where the first two logits are closer than this (fp32)."""

Rows = list[list[tuple[int, ...]]]
"""By configuration and question, the tokens written."""


@torch.no_grad()
def run(quick: bool) -> list[Figure]:
    """Time, and the answers that differ."""
    base = load_model(shipped("organism") / "base")
    sae = load_sae(shipped("organism") / "sae" / "block_4")
    n_latents, levels = (8, [20.0, 40.0]) if quick else (64, [10.0, 20.0, 40.0])
    questions, ids = general(16), range(1200, 1200 + n_latents)
    edits = [
        Intervention("add", latents(sae, [index]), sae.site, level=Level((level,)))
        for index in ids
        for level in levels
    ]
    prompts = [render(base.tokenizer, question.messages).ids for question in questions]
    found: dict[str, Rows] = {}

    def together() -> None:
        how = Sampling(temperature=0, max_new_tokens=NEW_TOKENS)
        points = sweep(base, sae, levels, questions, ids=ids, sampling=how, batch_size=512).points
        found["ours"] = [[answer.token_ids for answer in point.answers] for point in points]

    def one_at_a_time() -> None:
        found["peer"] = [generated(base, edit, prompts) for edit in edits]

    peer = "one configuration at a time, by generate"
    taken = medians({"ours": together, peer: one_at_a_time}, repeats=1 if quick else 2)
    gain = taken[peer] / taken["ours"]
    name = f"sweep of {n_latents} latents x {len(levels)} levels x {len(questions)} questions"
    differing, near_ties = compared(base, edits, prompts, found["ours"], found["peer"])
    of = f"of {len(edits) * len(prompts)} ({near_ties} near-ties aside)"
    return [
        Figure(name, taken["ours"], "s", peer, gain, ">= 5x faster", gain >= 5),
        Figure("its answers that differ", differing, of, peer, bar="0", holds=not differing),
    ]


def generated(
    lm: LanguageModel, edit: Intervention, prompts: Sequence[tuple[int, ...]]
) -> list[tuple[int, ...]]:
    """What `generate` writes to each prompt, up to its end."""
    batch = pad(prompts, lm.pad_id)
    with steer(lm, edit):
        out = lm.hf.generate(  # type: ignore[operator]
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=NEW_TOKENS,
            do_sample=False, pad_token_id=lm.pad_id,
        )  # fmt: skip
    rows = out[:, batch.input_ids.shape[1] :].tolist()
    ends = [next((n for n, token in enumerate(row) if token in lm.eos_ids), len(row)) for row in rows]
    return [tuple(row[: end + 1]) for row, end in zip(rows, ends, strict=True)]


def compared(
    lm: LanguageModel,
    edits: Sequence[Intervention],
    prompts: Sequence[tuple[int, ...]],
    ours: Rows,
    peer: Rows,
) -> tuple[int, int]:
    """Answers that differ, and those among them that part at two tokens as good as equally probable."""
    differing = near_ties = 0
    for edit, mine, other in zip(edits, ours, peer, strict=True):
        for prompt, a, b in zip(prompts, mine, other, strict=True):
            if a == b:
                continue
            parted = next(n for n, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1])
            with steer(lm, edit, prompt_lengths=[len(prompt)]):
                logits = lm.forward(torch.tensor([[*prompt, *a[:parted]]]))[0, -1]
            first, second = logits.topk(2).values.tolist()
            tied = first - second < NEAR_TIE
            near_ties, differing = near_ties + tied, differing + (not tied)
    return differing, near_ties
