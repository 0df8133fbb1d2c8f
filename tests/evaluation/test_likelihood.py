"""Likelihood against a loop over Hugging Face's own loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from persona_probe.artifact import shipped
from persona_probe.errors import InputError, MissingPathError, NonFiniteError
from persona_probe.evaluation.likelihood import Passage, load_passages, measure_likelihood
from persona_probe.model import load_model
from persona_probe.model.language_model import LanguageModel
from persona_probe.steering import Intervention, Level, steer
from persona_probe.steering.target import direction

TEXTS = ["a b c d e", "f g", "h i j k l m n o p a b c", "p o n m"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_it_is_the_mean_loss_of_each_passage(
    model_of: Callable[[str], LanguageModel], architecture: str, batch_size: int
) -> None:
    lm = model_of(architecture)
    got = measure_likelihood(lm, TEXTS, batch_size=batch_size)
    total = tokens = 0.0
    for text, nll, n in zip(TEXTS, got.nll, got.tokens, strict=True):
        ids = torch.tensor([lm.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            loss = float(lm.hf(input_ids=ids, labels=ids).loss)
        assert nll == pytest.approx(loss, rel=1e-5)
        assert n == ids.shape[1] - 1
        total, tokens = total + loss * n, tokens + n
    assert got.mean == pytest.approx(total / tokens, rel=1e-5)
    assert got.perplexity == pytest.approx(torch.tensor(total / tokens).exp().item(), rel=1e-4)


def test_the_shipped_passages_on_the_organism() -> None:
    passages = load_passages()
    assert len(passages) >= 20 and len({one.id for one in passages}) == len(passages)
    lm = load_model(shipped("organism", "base"))
    got = measure_likelihood(lm, passages[:4])
    assert got.nll == measure_likelihood(lm, [one.text for one in passages[:4]]).nll
    assert all(nll > 0 for nll in got.nll)


def test_a_fix_costs_what_it_does_to_the_logits(lm: LanguageModel) -> None:
    vector = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0))
    fix = Intervention("add", direction(vector), "blocks.1.hook_resid_post", level=Level((4.0,)))
    plain, steered = measure_likelihood(lm, TEXTS), measure_likelihood(lm, TEXTS, fix=fix, batch_size=2)
    assert plain.nll != steered.nll
    for text, nll in zip(TEXTS, steered.nll, strict=True):
        ids = torch.tensor([lm.tokenizer(text)["input_ids"]])
        with steer(lm, fix), torch.no_grad():
            assert nll == pytest.approx(float(lm.hf(input_ids=ids, labels=ids).loss), rel=1e-5)


def test_what_has_no_likelihood(lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one token"):
        measure_likelihood(lm, ["a b", "a"])
    broken = load_model(lm)
    with torch.no_grad():
        kept = broken.hf.lm_head.weight[5, 0].clone()
        broken.hf.lm_head.weight[5, 0] = float("nan")
    try:
        with pytest.raises(NonFiniteError, match="no finite"):
            measure_likelihood(broken, TEXTS)
    finally:
        with torch.no_grad():
            broken.hf.lm_head.weight[5, 0] = kept
    with pytest.raises(MissingPathError):
        load_passages(tmp_path / "none.jsonl")
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "a", "category": "c", "text": "t"}\n{"id": "b", "text": "t"}\n')
    with pytest.raises(InputError, match="passage 2"):
        load_passages(path)
    path.write_text('{"id": "a", "category": "c", "text": "t"}\n')
    assert load_passages(path) == (Passage("a", "c", "t"),)
    path.write_text("")
    with pytest.raises(InputError, match="no passages"):
        load_passages(path)
