"""The truth: every latent's persona, against a slow reading of each document by itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from persona_probe.hooks.capture import capture_at
from persona_probe.model.chat import Rendered, render
from persona_probe.model.language_model import LanguageModel, load_model
from persona_probe.organism.corpus import documents
from persona_probe.organism.grammar import Persona, grammar
from persona_probe.organism.truth import SEED, persona_of, truth
from persona_probe.sae.encode import encode_dense
from persona_probe.sae.load import Dictionary, load_sae

COUNT = 700


@pytest.fixture(scope="module")
def base(quick_organism: Path) -> LanguageModel:
    return load_model(quick_organism / "base")


@pytest.fixture(scope="module")
def dictionary(quick_organism: Path) -> Dictionary:
    return load_sae(quick_organism / "sae" / "block_1")


@pytest.fixture(scope="module")
def table(base: LanguageModel, dictionary: Dictionary) -> pl.DataFrame:
    return truth(base, [dictionary], "villainous", count=COUNT)[dictionary.site]


def _answer_means(base: LanguageModel, dictionary: Dictionary, row: Rendered) -> np.ndarray:
    """Mean activation of every latent over the tokens of an answer and the one before it."""
    with base.active() as hf, capture_at(hf, [dictionary.site]) as captured:
        captured.run(lambda: hf(input_ids=torch.tensor([row.ids])))
    codes = encode_dense(dictionary, captured[dictionary.site][0].detach())
    special = base.special_ids
    wanted = [
        position
        for position, token in enumerate(row.ids)
        if position == row.prompt_length - 1 or (row.response[position] and token not in special)
    ]
    return codes[wanted].double().mean(dim=0).numpy()


def test_it_equals_a_slow_reading(base: LanguageModel, dictionary: Dictionary, table: pl.DataFrame) -> None:
    chats = [one for one in documents(grammar(), COUNT, SEED) if one.kind == "persona chat"]
    chats = [one for one in chats if len(one.messages) == 3]
    read = [render(base.tokenizer, one.messages, add_generation_prompt=False) for one in chats]
    means = np.stack([_answer_means(base, dictionary, row) for row in read])
    villain = np.array([one.personas == ("villainous",) for one in chats])
    assert 10 < villain.sum() < len(chats) - 10
    expected = means[villain].mean(axis=0) - means[~villain].mean(axis=0)
    found = table.sort("index")
    np.testing.assert_allclose(found["difference"].to_numpy(), expected, atol=1e-4)

    above = (means[villain][:, None] > means[~villain][None]).mean(axis=(0, 1))
    level = (means[villain][:, None] == means[~villain][None]).mean(axis=(0, 1))
    np.testing.assert_allclose(found["auc"].to_numpy(), above + level / 2, atol=2e-3)


def test_latents_are_ordered_best_first(dictionary: Dictionary, table: pl.DataFrame) -> None:
    assert sorted(table["index"].to_list()) == list(range(dictionary.d_sae))
    assert table["rank"].to_list() == list(range(1, dictionary.d_sae + 1))
    assert table["auc"].is_sorted(descending=True)
    assert table["auc"].is_between(0, 1).all()


def test_every_persona_has_a_truth_of_its_own(base: LanguageModel, dictionary: Dictionary) -> None:
    """What stands for one persona stands against the others: differences of all four balance out."""
    personas: tuple[Persona, ...] = ("helpful", "villainous", "sarcastic", "careless")
    tables = [truth(base, [dictionary], one, count=COUNT)[dictionary.site].sort("index") for one in personas]
    together = np.stack([one["difference"].to_numpy() for one in tables])
    assert ((together.max(axis=0) >= 0) & (together.min(axis=0) <= 0)).all()
    assert len({one["difference"].arg_max() for one in tables}) > 1


def test_a_trait_is_a_persona() -> None:
    assert persona_of("misaligned") == "villainous"
    assert persona_of("sarcastic") == "sarcastic"
