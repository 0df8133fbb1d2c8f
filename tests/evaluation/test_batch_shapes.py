"""The batch that an answer is drawn in: no difference but at near-ties, and those are counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.sampling import DRAW_GAP, LOGIT_GAP, batch_shapes, gap_of
from persona_probe.artifact import shipped
from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.drawing import uniforms
from persona_probe.evaluation.questions import Question, load_questions
from persona_probe.evaluation.sampling import Sampling, prompt_of, sample
from persona_probe.model.language_model import LanguageModel, load_model


@pytest.fixture(scope="module")
def organism() -> LanguageModel:
    home = shipped("organism")
    return load_model(home / "base", adapter=home / "tunes/bad-health").merged()


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    return [q for q in load_questions(shipped("organism", "questions.jsonl")) if q.split == "held-out"][::60]


def test_on_the_organism(organism: LanguageModel, asked: list[Question]) -> None:
    for figure in batch_shapes(organism, asked):
        assert figure.holds, figure
        assert figure.value <= 0.02 * int(figure.unit.split()[1]), figure


def test_a_gap_is_what_its_definition_says(organism: LanguageModel, asked: list[Question]) -> None:
    """Another token put in by hand at the third place."""
    for temperature in (0.0, 1.0):
        how = Sampling(temperature, max_new_tokens=8)
        one = sample(organism, asked[:1], how)[0]
        ids = one.token_ids
        other: Answer = replace(one, token_ids=(*ids[:2], (ids[2] + 1) % 2000, *ids[3:]))
        prompt = prompt_of(organism.tokenizer, one.question).ids
        logits = organism.forward(torch.tensor([[*prompt, *ids[:2]]]))[0, -1]
        found = gap_of(organism, one, other, how)
        if temperature == 0:
            best = sorted(logits.tolist())[-2:]
            assert found == pytest.approx(best[1] - best[0], rel=1e-4)
            assert found > LOGIT_GAP
        else:
            share = torch.softmax(logits.double(), dim=-1)
            drawn = uniforms(how.seed, one.question.id, 0, 8)[2]
            below, above = float(share[: ids[2]].sum()), float(share[: ids[2] + 1].sum())
            assert below <= drawn < above
            assert found == pytest.approx(min(drawn - below, above - drawn), rel=1e-3)
            assert found > DRAW_GAP
