"""The gate: closed forms on constructed dictionaries, then the same through real models."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from persona_probe.activations.masks import TokenMask
from persona_probe.activations.stream import stream
from persona_probe.diffing.levels import latent_means
from persona_probe.errors import MismatchError
from persona_probe.model import ModelPair, load_model
from persona_probe.sae.encode import decode, encode_dense
from persona_probe.sae.load import Dictionary, from_sae_lens, weights_digest
from persona_probe.sae.validity import FitSums, Limits, Validity, check_reads, validity
from tests.model.tiny_models import adapter_of, model_of, prompts_of_many_lengths, save_checkpoint
from tests.sae.sae_lens_peers import peer

SITE = "blocks.1.hook_resid_post"


def axes(d_model: int, kept: int) -> Dictionary:
    """Reads and writes the first `kept` coordinates exactly, both signs, and nothing of the others."""
    encoder = torch.zeros(d_model, 2 * kept)
    for i in range(kept):
        encoder[i, 2 * i], encoder[i, 2 * i + 1] = 1.0, -1.0
    return Dictionary(
        site=SITE, W_enc=encoder, b_enc=torch.zeros(2 * kept), W_dec=encoder.T.contiguous(),
        b_dec=torch.zeros(d_model), threshold=None, activation="relu", k=None,
        apply_b_dec_to_input=True, normalisation="none", path="axes", digest="sha256:axes",
    )  # fmt: skip


def measure(sae: Dictionary, base: Tensor, tuned: Tensor, limits: Limits | None = None) -> Validity:
    sums = FitSums(sae.d_model, sae.d_sae)
    sums.add(sae, base, tuned)
    return sums.validity(limits or Limits())


def drawn(n: int = 300, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + 5.0


def test_explained_variance_is_the_share_of_the_coordinates_kept() -> None:
    """Four of six coordinates are exact; of the other two the *mean* is missed as well."""
    base = drawn()
    found = measure(axes(6, 4), base, base + 1.0)
    for h, figure in ((base, found.explained_variance_base), (base + 1, found.explained_variance_tuned)):
        missed = h[:, 4:].double().square().sum()
        spread = (h - h.mean(dim=0)).double().square().sum()
        assert figure == pytest.approx(float(1 - missed / spread), rel=1e-9)
    centred = base - base.mean(dim=0)
    kept = float(centred[:, :4].square().sum() / centred.square().sum())
    assert measure(axes(6, 4), centred, centred + 1).explained_variance_base == pytest.approx(kept)


def test_perfect_and_useless_dictionaries() -> None:
    base = drawn()
    assert measure(axes(6, 6), base, base + 1).explained_variance_base == pytest.approx(1.0)
    centred = base - base.mean(dim=0)
    useless = axes(6, 6)
    useless.W_dec.zero_()
    assert measure(useless, centred, centred + 1).explained_variance_base == pytest.approx(0.0)


def test_the_change_inside_is_the_share_of_its_squared_norm() -> None:
    """A shift of 3 along a coordinate that is kept and 4 along one that is not: 9 of 25."""
    base, shift = drawn(), torch.tensor([3.0, 0, 0, 0, 4.0, 0])
    found = measure(axes(6, 4), base, base + shift)
    assert found.change_inside == pytest.approx(9 / 25, rel=1e-5)
    assert found.mean_change_inside == pytest.approx(9 / 25, rel=1e-5)
    spread = float((base - base.mean(dim=0)).double().square().sum())
    assert found.change_norm == pytest.approx(math.sqrt(300 * 25 / spread), rel=1e-5)


def test_noise_in_the_change_leaves_its_mean() -> None:
    """Noise outside the dictionary drowns the share token by token, and cancels in the mean."""
    noise = torch.randn(4000, 6, generator=torch.Generator().manual_seed(1))
    noise[:, :4] = 0
    noise -= noise.mean(dim=0)
    shift = torch.tensor([1.0, 0, 0, 0, 0, 0])
    base = drawn(4000)
    found = measure(axes(6, 4), base, base + shift + noise)
    expected = 4000 / (4000 + float(noise.square().sum()))
    assert found.change_inside == pytest.approx(expected, rel=1e-4)
    assert found.mean_change_inside == pytest.approx(1.0, abs=1e-6)


def test_l0_and_dead_latents_are_counted() -> None:
    base = torch.tensor([[1.0, -1.0], [2.0, 0.0], [3.0, 0.0], [4.0, -2.0]])
    found = measure(axes(2, 2), base, -base)
    assert found.l0_base == found.l0_tuned == (4 + 2) / 4
    assert found.dead_base == found.dead_tuned == 0.5
    assert found.tokens == 4


@pytest.mark.parametrize(
    ("tuned", "limits", "gate"),
    [
        (0.0, Limits(), "unchanged"),
        (torch.tensor([1.0, 0, 0, 0, 0, 0]), Limits(), "pass"),
        (torch.tensor([0.2, 0, 0, 0, 1.0, 0]), Limits(drop=2.0), "outside"),
        (torch.tensor([0.2, 0, 0, 0, 1.0, 0]), Limits(drop=2.0, inside=0.01), "pass"),
        (torch.tensor([0, 0, 0, 0, 9.0, 0]), Limits(), "drop"),
        (torch.tensor([1.0, 0, 0, 0, 0, 0]), Limits(explained_variance=0.9), "misfit"),
    ],
)
def test_the_gate_says_why_it_is_shut(tuned: Tensor | float, limits: Limits, gate: str) -> None:
    base = drawn() - 5.0
    found = measure(axes(6, 4), base, base + tuned, limits)
    assert found.gate == gate
    assert f"{found.explained_variance_base:.3f}" in found.reason
    assert (found.change_inside is None) == (gate == "unchanged")


def test_shards_add_up_to_the_whole() -> None:
    sae = from_sae_lens(peer("jumprelu", d_in=6))
    base, tuned = drawn(), drawn(seed=1)
    whole = measure(sae, base, tuned)
    parts = [FitSums(sae.d_model, sae.d_sae) for _ in range(3)]
    for part, rows in zip(parts, (slice(0, 7), slice(7, 200), slice(200, 300)), strict=True):
        part.add(sae, base[rows], tuned[rows])
    merged = parts[0].merge(parts[1]).merge(parts[2]).validity(Limits())
    assert merged.tokens == whole.tokens and merged.dead_tuned == whole.dead_tuned
    for name in ("explained_variance_tuned", "change_inside", "mean_change_inside", "l0_base"):
        assert getattr(merged, name) == pytest.approx(getattr(whole, name), rel=1e-9)


def test_through_two_models_it_is_what_their_activations_give() -> None:
    base = model_of("llama")
    tuned = base.with_adapter(adapter_of("llama"))
    sae = from_sae_lens(peer("topk", d_in=32))
    prompts, mask = prompts_of_many_lengths(), TokenMask("prompt")
    found = validity(ModelPair(base, tuned), sae, prompts, mask, batch_tokens=24)
    read: list[list[Tensor]] = [[], []]
    for chunk in stream((base, tuned), prompts, [SITE], mask):
        for i in range(2):
            read[i].append(chunk.activations[i, SITE].double())
    h = [torch.cat(parts) for parts in read]
    wide = sae.to("cpu", torch.float64)
    f = [encode_dense(wide, each) for each in h]
    explained = [
        1 - (x - decode(wide, codes)).square().sum() / (x - x.mean(0)).square().sum()
        for x, codes in zip(h, f, strict=True)
    ]
    assert found.explained_variance_base == pytest.approx(float(explained[0]), rel=1e-4)
    assert found.explained_variance_tuned == pytest.approx(float(explained[1]), rel=1e-4)
    change = h[1] - h[0]
    missed = change - (f[1] - f[0]) @ wide.W_dec
    expected = 1 - missed.square().sum() / change.square().sum()
    assert found.change_inside == pytest.approx(float(expected), rel=1e-4)
    assert found.l0_base == pytest.approx(float((f[0] > 0).sum(1).double().mean()))
    assert found.tokens == len(h[0])


def test_identical_models_are_unchanged() -> None:
    base = model_of("llama")
    sae = from_sae_lens(peer("standard", d_in=32))
    found = validity(
        ModelPair(base, base), sae, prompts_of_many_lengths(),
        limits=Limits(explained_variance=-math.inf),
    )  # fmt: skip
    assert found.gate == "unchanged" and found.change_norm == 0.0
    assert found.change_inside is None and found.mean_change_inside is None
    assert found.explained_variance_base == found.explained_variance_tuned
    assert (found.l0_base, found.dead_base) == (found.l0_tuned, found.dead_tuned)


def test_a_dictionary_of_another_width_is_refused() -> None:
    base = model_of("llama")
    with pytest.raises(MismatchError, match="width"):
        validity(ModelPair(base, base), from_sae_lens(peer("standard")), prompts_of_many_lengths())


def test_a_full_fine_tune_is_read_by_the_dictionary_of_its_base(tmp_path: Path) -> None:
    """It has other weights than the dictionary records, as every fine-tune but an adapter has."""
    base, texts = model_of("llama"), prompts_of_many_lengths()
    tuned = load_model(save_checkpoint(tmp_path / "tuned", seed=1))
    sae = from_sae_lens(peer("standard", d_in=32))
    expected, means = validity(ModelPair(base, tuned), sae, texts), latent_means(tuned, sae, texts)
    sae.meta["model_digest"] = weights_digest(base)
    assert validity(ModelPair(base, tuned), sae, texts) == expected
    assert latent_means(tuned, sae, texts).equals(means)
    with pytest.raises(MismatchError, match="another model"):
        validity(ModelPair(tuned, base), sae, texts)
    with pytest.raises(MismatchError, match=r"width 12.*width 32"):
        check_reads(from_sae_lens(peer("standard")), tuned)
