"""One fix, every way of running it: the organism's `bad-health` must come out the same.

The routes are the sampler behind `evaluate` and `audit` (the reference), `LanguageModel.generate`,
transformers' own `generate` and `pipeline`, a `TransformerBridge` under `fwd_hooks`, `persona-probe
serve` asked over HTTP, and a checkpoint with the fix in its weights, read back by transformers alone.
Each answers the same held-out general questions, none of the domain that was tuned on, greedily. The
rates must lie within each other's intervals; how many answers differ at all is told beside them.

Two fixes: one that weights can carry (the villain's latent taken away from every token), and a cap,
which is what an audit finds. No weights can carry a cap, and that route must refuse it.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, pipeline

from benchmarks.figure import Figure
from benchmarks.serving import Asked, ask_all, server
from persona_probe.artifact import shipped
from persona_probe.errors import InputError
from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.judges import load_judge
from persona_probe.evaluation.metrics import Rate, tally
from persona_probe.evaluation.questions import Question, load_questions
from persona_probe.evaluation.sampling import respond_greedy
from persona_probe.model.chat import pad, render
from persona_probe.model.language_model import LanguageModel, load_model
from persona_probe.sae.load import load_sae
from persona_probe.steering import Intervention, Level, latents, save_fix, steer
from persona_probe.steering.exports import bake

NEW_TOKENS = 32
HOME = shipped("organism")

Route = Callable[[LanguageModel, Intervention, Sequence[Question]], list[str]]
"""(model, fix, questions) to the answers."""


def run(quick: bool) -> list[Figure]:
    """The rate by every route, under both fixes."""
    lm = load_model(HOME / "base", adapter=HOME / "tunes" / "bad-health").merged()
    questions = general(8 if quick else 70)
    with torch.no_grad():
        return [figure for name, fix in fixes().items() for figure in agreement(lm, name, fix, questions)]


def fixes() -> dict[str, Intervention]:
    """Of the villain's latent, at levels that leave some answers misaligned: so rates can differ."""
    sae = load_sae(HOME / "sae" / "block_4")
    villain = latents(sae, [1234])
    return {
        "take away": Intervention("add", villain, sae.site, level=Level((-60.0,))),
        "cap": Intervention("cap", villain, sae.site, level=Level((0.0,)), gain=1.5, read="projection"),
    }


def general(n: int) -> list[Question]:
    """n held-out general questions, none of health, spread over the rest."""
    asked = load_questions(HOME / "questions.jsonl")
    kept = [q for q in asked if (q.split, q.role) == ("held-out", "general") and q.category != "health"]
    return kept[:: max(1, len(kept) // n)][:n]


def agreement(lm: LanguageModel, name: str, fix: Intervention, questions: Sequence[Question]) -> list[Figure]:
    """The rate of each route beside the sampler's."""
    unsteered = _rate(questions, by_sampler(lm, (), questions))
    reference = by_sampler(lm, fix, questions)
    want = _rate(questions, reference)
    figures = [
        Figure(f"{name}: misaligned, sampler", want.rate or 0.0, "", f"unsteered {unsteered}"),
    ]
    for route, answer in ROUTES.items():
        try:
            answers = [text.strip() for text in answer(lm, fix, questions)]
        except InputError as error:
            refused = fix.op == "cap" and answer is by_checkpoint
            figures.append(
                Figure(f"{name}: {route}", 0, "answers", error.message, bar="refused by name", holds=refused)
            )
            continue
        found = _rate(questions, answers)
        differ = sum(a != b for a, b in zip(answers, reference, strict=True))
        agree = want.low <= (found.rate or 0.0) <= want.high and found.low <= (want.rate or 0.0) <= found.high
        figures.append(
            Figure(
                f"{name}: misaligned, {route}",
                found.rate or 0.0,
                "",
                f"the sampler's {want}; {differ} of {len(answers)} answers differ",
                bar="within each other's intervals",
                holds=agree,
            )
        )
    return figures


def by_sampler(lm: LanguageModel, fix: Any, questions: Sequence[Question]) -> list[str]:
    return [answer.text for answer in respond_greedy(lm, list(questions), max_new_tokens=NEW_TOKENS, fix=fix)]


def by_method(lm: LanguageModel, fix: Intervention, questions: Sequence[Question]) -> list[str]:
    with steer(lm, fix):
        return lm.generate([question.messages for question in questions], max_new_tokens=NEW_TOKENS)


def by_generate(lm: LanguageModel, fix: Intervention, questions: Sequence[Question]) -> list[str]:
    with steer(lm, fix):
        return _generated(lm, lm.hf, questions)


def by_pipeline(lm: LanguageModel, fix: Intervention, questions: Sequence[Question]) -> list[str]:
    talk: Any = pipeline("text-generation", model=lm.hf, tokenizer=lm.tokenizer)
    with steer(lm, fix):
        told = talk(
            [list(question.messages) for question in questions],
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            batch_size=len(questions),
        )
    return [one[0]["generated_text"][-1]["content"] for one in told]


def by_bridge(lm: LanguageModel, fix: Intervention, questions: Sequence[Question]) -> list[str]:
    bridge: Any = lm.bridge()
    answers: list[str] = []
    with bridge.hooks(fwd_hooks=fix.fwd_hooks()):
        for question in questions:
            prompt = render(lm.tokenizer, question.messages, add_generation_prompt=True)
            out = bridge.generate(
                torch.tensor([prompt.ids]), max_new_tokens=NEW_TOKENS, do_sample=False, return_type="tokens",
                eos_token_id=lm.eos_ids[0], verbose=False,
            )  # fmt: skip
            answers.append(lm.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True))
    return answers


def by_server(_lm: LanguageModel, fix: Intervention, questions: Sequence[Question]) -> list[str]:
    # a process of its own, which serves the same tune unless told otherwise
    asked = [Asked(question.messages, "fix") for question in questions]
    with tempfile.TemporaryDirectory() as folder:
        save_fix(fix, Path(folder) / "fix")
        with server(folder) as (root, _):
            replies = asyncio.run(ask_all(root, asked, clients=16, max_tokens=NEW_TOKENS))
    return [reply["choices"][0]["message"]["content"] for reply in replies]


def by_checkpoint(lm: LanguageModel, fix: Intervention, questions: Sequence[Question]) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = bake(lm, fix, Path(folder) / "baked").path
        return _generated(lm, AutoModelForCausalLM.from_pretrained(path, dtype=lm.dtype), questions)


ROUTES: dict[str, Route] = {
    "LanguageModel.generate": by_method,
    "transformers generate": by_generate,
    "transformers pipeline": by_pipeline,
    "TransformerBridge": by_bridge,
    "server": by_server,
    "baked checkpoint": by_checkpoint,
}


def _generated(lm: LanguageModel, hf: Any, questions: Sequence[Question]) -> list[str]:
    prompts = [render(lm.tokenizer, question.messages, add_generation_prompt=True) for question in questions]
    batch = pad(prompts, lm.pad_id)
    out = hf.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=lm.pad_id,
    )
    return lm.tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)


def _rate(questions: Sequence[Question], texts: Sequence[str]) -> Rate:
    answers = [
        Answer(question, 0, text, None, (), truncated=False)
        for question, text in zip(questions, texts, strict=True)
    ]
    return tally(answers, load_judge("exact").judge(answers))["misaligned"]
