"""Encoding: the same numbers as sae-lens, in less work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_probe.errors import InputError, MismatchError
from persona_probe.sae import encode as module
from persona_probe.sae.encode import decode, encode, encode_dense, encode_latents
from persona_probe.sae.load import load_sae
from tests.sae.sae_lens_peers import D_SAE, READABLE, batchtopk, dictionary, inputs, peer


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("kind", READABLE)
def test_encode_and_decode_are_sae_lenss(kind: str, centred: bool, tmp_path: Path) -> None:
    sae = peer(kind, apply_b_dec_to_input=centred)
    sae.save_model(tmp_path)
    ours = load_sae(tmp_path)
    x = inputs()
    theirs = sae.encode(x)
    torch.testing.assert_close(encode_dense(ours, x), theirs)
    assert ((encode_dense(ours, x) > 0) == (theirs > 0)).all()
    torch.testing.assert_close(decode(ours, encode_dense(ours, x)), sae.decode(theirs))
    torch.testing.assert_close(decode(ours, encode(ours, x)), sae(x))


def test_a_batchtopk_dictionary_is_read_as_it_was_saved_for_inference(tmp_path: Path) -> None:
    sae = batchtopk()
    sae.save_inference_model(tmp_path)
    ours = load_sae(tmp_path)
    x = inputs()
    _, pre = sae.encode_with_hidden_pre(x)
    torch.testing.assert_close(encode_dense(ours, x), pre * (pre > 1.5))
    assert ours.activation == "jumprelu"
    torch.testing.assert_close(ours.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_a_threshold_cuts_off_and_does_not_subtract() -> None:
    ours = dictionary("jumprelu")
    assert ours.threshold is not None
    x = inputs()
    x_in = x - ours.b_dec
    for token in range(3):
        for latent in range(D_SAE):
            pre = float(x_in[token] @ ours.W_enc[:, latent] + ours.b_enc[latent])
            expected = pre if pre > float(ours.threshold[latent]) else 0.0
            assert float(encode_dense(ours, x)[token, latent]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", READABLE)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_selected_latents_equal_the_dense_ones(kind: str, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, D_SAE - 1), min_size=1, max_size=6))
    ours, x = dictionary(kind), inputs(data.draw(st.integers(1, 9)))
    torch.testing.assert_close(encode_latents(ours, x, ids), encode_dense(ours, x)[:, ids])


def test_leading_axes_are_kept() -> None:
    ours, x = dictionary("topk"), inputs(24).reshape(2, 3, 4, -1)
    dense = encode_dense(ours, x)
    assert dense.shape == (2, 3, 4, D_SAE)
    assert (encode_latents(ours, x, [7, 3]) == dense[..., [7, 3]]).all()
    assert decode(ours, dense).shape == x.shape


@pytest.mark.parametrize("kind", READABLE)
@pytest.mark.parametrize("chunk", [1, 7, 50, None])
def test_sparse_codes_are_the_non_zeros_in_order(kind: str, chunk: int | None) -> None:
    ours, x = dictionary(kind), inputs()
    codes = encode(ours, x, chunk_tokens=chunk)
    torch.testing.assert_close(codes.dense(), encode_dense(ours, x))
    assert (codes.value > 0).all()
    order = codes.token_index * D_SAE + codes.latent_index
    assert (order.diff() > 0).all()


@pytest.mark.parametrize("kind", READABLE)
@pytest.mark.parametrize("tokens", [3, 8, 50])
def test_the_blocks_that_an_encoder_is_read_in_make_no_difference(
    kind: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, x = dictionary(kind), inputs(tokens)
    if ours.threshold is not None:
        ours = replace(ours, threshold=torch.linspace(0.1, 1.0, D_SAE))
    monkeypatch.setattr(module, "BLOCK_LATENTS", 16)  # of 40: the last block is a smaller one
    monkeypatch.setattr(module, "BLOCK_TOKENS", 8)
    codes = encode(ours, x)
    torch.testing.assert_close(codes.dense(), encode_dense(ours, x))
    assert ((codes.token_index * D_SAE + codes.latent_index).diff() > 0).all() and len(codes.value)


def test_no_tokens_have_no_codes() -> None:
    codes = encode(dictionary("standard"), inputs(0))
    assert len(codes.value) == 0 and codes.dense().shape == (0, D_SAE)
    assert decode(dictionary("standard"), codes).shape == (0, 12)


def test_only_the_latents_asked_for_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all but top-k, the dense encoder is not even called."""

    def refuse(*_: object) -> None:
        raise AssertionError("encoded everything")

    x = inputs()
    dictionaries = {kind: dictionary(kind) for kind in READABLE}
    monkeypatch.setattr(module, "encode_dense", refuse)
    for kind in ("standard", "jumprelu", "gated"):
        assert encode_latents(dictionaries[kind], x, [1]).shape == (len(x), 1)
    with pytest.raises(AssertionError, match="everything"):
        encode_latents(dictionaries["topk"], x, [1])


@pytest.mark.parametrize("kind", READABLE)
def test_gradients_flow_through_what_fires(kind: str) -> None:
    ours, x = dictionary(kind), inputs(4).requires_grad_()
    dense = encode_dense(ours, x)
    dense.sum().backward()
    expected = (dense.detach() > 0).float() @ ours.W_enc.T
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)


def test_wrong_widths_and_indices_are_refused() -> None:
    ours = dictionary("standard")
    with pytest.raises(MismatchError, match="width 12"):
        encode_dense(ours, inputs(width=11))
    with pytest.raises(InputError, match="no latent 40"):
        encode_latents(ours, inputs(), [3, 40])
    with pytest.raises(InputError, match="no latent -1"):
        encode_latents(ours, inputs(), [-1])
