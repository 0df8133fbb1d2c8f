"""Latent scaling against least squares, and on latents planted in one model alone."""

from __future__ import annotations

from dataclasses import replace

import polars as pl
import pytest
import torch

from persona_probe.diffing.scaling import fitted, latent_scaling, relative_decoder_norms
from persona_probe.errors import InputError, MismatchError
from persona_probe.model import LanguageModel, ModelPair
from persona_probe.model.chat import Rendered
from tests.diffing import reference
from tests.diffing.conftest import random_dictionary

SAE = random_dictionary()


def test_betas_are_those_of_least_squares(pair: ModelPair, texts: list[Rendered]) -> None:
    rows = latent_scaling(pair, SAE, texts, range(20))
    h = [
        torch.cat(
            [reference.activations(m, t, 1)[reference.counted(t, m.special_ids)] for t in texts]
        ).double()
        for m in (pair.base, pair.tuned)
    ]
    codes = [
        torch.tensor([reference.latents_of(SAE, token) for token in each], dtype=torch.float64) for each in h
    ]
    decoder, bias = SAE.W_dec.double(), SAE.b_dec.double()
    for row in rows.iter_rows(named=True):
        j = row["index"]
        f = codes[1][:, j]
        assert row["tokens"] == int((f > 0).sum())
        if not row["tokens"]:
            assert row["error_base"] is None and row["tuned_only"] is None
            continue
        design = (f[:, None] * decoder[j]).reshape(-1, 1)
        for name, activation, code in (("base", h[0], codes[0]), ("tuned", h[1], codes[1])):
            others = code.clone()
            others[:, j] = 0
            beside = others @ decoder
            for target, y in (("error", activation - bias - beside), ("reconstruction", beside)):
                beta = float(torch.linalg.lstsq(design, y.reshape(-1, 1)).solution)
                assert row[f"{target}_{name}"] == pytest.approx(beta, rel=1e-3, abs=1e-4)


def test_one_model_twice_has_nu_one(base: LanguageModel, texts: list[Rendered]) -> None:
    rows = latent_scaling(ModelPair(base, base), SAE, texts, range(20)).filter(pl.col("tokens") > 0)
    assert len(rows) and (rows["nu_error"] == 1).all() and not rows["tuned_only"].any()


def test_a_latent_that_one_model_alone_has() -> None:
    """Orthogonal latents: 0 in both models, 1 in the tuned one, 2 in the base's error only."""
    eye = torch.eye(4)
    sae = replace(
        SAE, W_enc=eye, b_enc=torch.zeros(4), W_dec=eye, b_dec=torch.zeros(4), threshold=None,
        activation="relu",
    )  # fmt: skip
    tuned = torch.rand(50, 4, generator=torch.Generator().manual_seed(0)) + 0.5
    base = tuned * torch.tensor([1.0, 0.0, -1.0, 1.0])
    _, sums = fitted(sae, [base, tuned], torch.tensor([0, 1, 2]))
    nu = sums[0, 0] / sums[1, 0]
    torch.testing.assert_close(nu, torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64))


def test_relative_norms_and_what_is_refused(pair: ModelPair, texts: list[Rendered]) -> None:
    one = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    other = torch.tensor([[5.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert relative_decoder_norms(one, other).tolist() == [0.5, 1.0, 0.0]
    with pytest.raises(MismatchError, match="one shape"):
        relative_decoder_norms(one, other[:2])
    with pytest.raises(InputError, match="no latent to scale"):
        latent_scaling(pair, SAE, texts, [])
    with pytest.raises(InputError, match="no latent 20"):
        latent_scaling(pair, SAE, texts, [20])
