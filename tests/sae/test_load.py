"""What can be loaded, and how everything else is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file

from persona_probe.errors import (
    InputError,
    MismatchError,
    MissingPathError,
    NonFiniteError,
    UnknownSiteError,
)
from persona_probe.model import load_model
from persona_probe.sae.encode import encode_dense
from persona_probe.sae.load import (
    Latent,
    check_fits,
    check_source,
    from_sae_lens,
    load_sae,
    weights_digest,
)
from tests.model.tiny_models import adapter_of, checkpoint_of, model_of
from tests.sae.sae_lens_peers import D_MODEL, D_SAE, SITE, batchtopk, dictionary, inputs, peer, randomise


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "sae"
    peer("jumprelu").save_model(folder)
    return folder


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "cfg.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes}))


def test_a_dictionary_says_what_it_is(saved: Path) -> None:
    found = load_sae(saved)
    assert (found.site, found.d_model, found.d_sae) == (SITE, D_MODEL, D_SAE)
    assert found.meta["model_name"] == "tiny"
    assert found.path == str(saved) and SITE in repr(found)
    latent = found.latent(3)
    assert latent == Latent(found, 3) and (latent.decoder == found.W_dec[3]).all()
    with pytest.raises(InputError, match="no latent 40"):
        found.latent(D_SAE)


def test_the_digest_is_of_the_content(saved: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    assert load_sae(copy).digest == load_sae(saved).digest
    peer("jumprelu", seed=1).save_model(copy)
    assert load_sae(copy).digest != load_sae(saved).digest
    assert from_sae_lens(peer("topk")).digest == from_sae_lens(peer("topk")).digest
    assert from_sae_lens(peer("topk")).digest != from_sae_lens(peer("topk", seed=1)).digest


def test_loaded_weights_are_a_copy() -> None:
    sae = peer("standard")
    found = from_sae_lens(sae)
    before = found.W_dec.clone()
    sae.W_dec.data.zero_()
    assert (found.W_dec == before).all()


def test_moving_keeps_everything_else(saved: Path) -> None:
    found = load_sae(saved)
    moved = found.to("cpu", torch.float64)
    assert moved.W_enc.dtype == torch.float64 and moved.threshold is not None
    assert (moved.site, moved.digest, moved.k) == (found.site, found.digest, found.k)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "matching_pursuit"}, "kind 'matching_pursuit'"),
        ({"architecture": "transcoder"}, "kind 'transcoder'"),
        ({"architecture": "unheard-of"}, "kind 'unheard-of'"),
        ({"normalize_activations": "layer_norm"}, "normalises its input by 'layer_norm'"),
        ({"normalize_activations": "something new"}, "normalises its input by 'something new'"),
        ({"reshape_activations": "hook_z"}, "attention heads"),
        ({"d_in": D_MODEL + 1}, "shape|open"),
    ],
)
def test_kinds_that_would_be_misread_are_refused(saved: Path, changes: dict[str, Any], message: str) -> None:
    rewrite(saved, **changes)
    with pytest.raises(InputError, match=message):
        load_sae(saved)


def test_an_unfolded_scaling_factor_is_refused_with_the_way_out(saved: Path) -> None:
    """sae-lens opens such a file and ignores the factor."""
    rewrite(saved, normalize_activations="expected_average_only_in")
    with pytest.raises(InputError, match="fold_activation_norm_scaling_factor"):
        load_sae(saved)


def test_an_unfinished_dictionary_is_refused(tmp_path: Path) -> None:
    batchtopk().save_model(tmp_path / "training")
    with pytest.raises(InputError, match="save_inference_model"):
        load_sae(tmp_path / "training")


def test_a_folder_that_is_no_dictionary_is_refused(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(MissingPathError, match=r"no cfg\.json"):
        load_sae(tmp_path)
    (saved / "cfg.json").write_text("{not json")
    with pytest.raises(InputError, match="JSON"):
        load_sae(saved)
    (saved / "cfg.json").write_text("[]")
    with pytest.raises(InputError, match="no JSON object"):
        load_sae(saved)
    (saved / "sae_weights.safetensors").unlink()
    with pytest.raises(MissingPathError, match="sae_weights"):
        load_sae(saved)


def test_damaged_weights_are_refused(saved: Path) -> None:
    weights = saved / "sae_weights.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "b_enc": torch.full((D_SAE,), torch.nan)}, weights)
    with pytest.raises(NonFiniteError, match="b_enc"):
        load_sae(saved)
    save_file({name: t for name, t in tensors.items() if name != "W_enc"}, weights)
    with pytest.raises(InputError, match="sae-lens cannot open"):
        load_sae(saved)
    weights.write_bytes(b"torn")
    with pytest.raises(InputError, match="sae-lens cannot open"):
        load_sae(saved)


def test_the_site_comes_from_the_file_or_from_the_caller(saved: Path) -> None:
    assert load_sae(saved, site=SITE).site == SITE
    with pytest.raises(MismatchError, match=r"blocks\.1\.hook_resid_post, not at blocks\.2"):
        load_sae(saved, site="blocks.2.hook_resid_post")
    metadata = json.loads((saved / "cfg.json").read_text())["metadata"]
    rewrite(saved, metadata={**metadata, "hook_name": None})
    with pytest.raises(InputError, match="does not say which activation"):
        load_sae(saved)
    assert load_sae(saved, site="blocks.2.hook_mlp_out").site == "blocks.2.hook_mlp_out"
    rewrite(saved, metadata={**metadata, "hook_name": "blocks.1.attn.hook_z"})
    with pytest.raises(UnknownSiteError):
        load_sae(saved)


def test_registry_names_are_looked_up_and_unknown_ones_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, str]] = []

    def from_pretrained(release: str, sae_id: str, **_: Any) -> Any:
        asked.append((release, sae_id))
        return peer("jumprelu")

    monkeypatch.setattr(SAE, "from_pretrained", from_pretrained)
    found = load_sae("gpt2-small-res-jb/blocks.8.hook_resid_pre")
    assert asked == [("gpt2-small-res-jb", "blocks.8.hook_resid_pre")]
    assert found.path == "gpt2-small-res-jb/blocks.8.hook_resid_pre"
    assert found.neuronpedia == "https://neuronpedia.org/gpt2-small/8-res-jb"
    assert found.latent(7).neuronpedia == "https://neuronpedia.org/gpt2-small/8-res-jb/7"
    assert dictionary("jumprelu").latent(7).neuronpedia is None
    assert load_sae(Path("gpt2-small-res-jb/blocks.8.hook_resid_pre")).digest == found.digest
    check_source("gpt2-small-res-jb/blocks.8.hook_resid_pre")
    for look in (load_sae, check_source):
        with pytest.raises(MissingPathError, match="gpt2-small-res-jb"):
            look("gpt2-smal-res-jb/blocks.8.hook_resid_pre")
        with pytest.raises(MissingPathError, match=r"blocks\.8\.hook_resid_pre"):
            look("gpt2-small-res-jb/blocks.80.hook_resid_pre")
    assert len(asked) == 2, "looking is not fetching"


def test_a_release_that_is_not_in_the_cache_says_how_to_get_it() -> None:
    """Offline (see tests/conftest.py), with sae-lens's own loader."""
    with pytest.raises(InputError) as caught:
        load_sae("gpt2-small-res-jb/blocks.8.hook_resid_pre")
    assert "neither in Hugging Face's cache nor to be had" in str(caught.value)
    assert "hf download jbloom/GPT2-Small-SAEs-Reformatted --include" in str(caught.value)


def test_a_matryoshka_dictionary_is_a_jumprelu_when_it_is_saved(tmp_path: Path) -> None:
    config = MatryoshkaBatchTopKTrainingSAEConfig(
        d_in=D_MODEL, d_sae=D_SAE, k=5, matryoshka_widths=[10, D_SAE], metadata=SAEMetadata(hook_name=SITE)
    )
    sae = MatryoshkaBatchTopKTrainingSAE(config)
    randomise(sae, 0)
    sae.topk_threshold.fill_(1.5)
    sae.save_inference_model(tmp_path / "done")
    found, x = load_sae(tmp_path / "done"), inputs()
    theirs = SAE.load_from_disk(tmp_path / "done")
    torch.testing.assert_close(encode_dense(found, x), theirs.encode(x))
    assert found.activation == "jumprelu"
    sae.save_model(tmp_path / "training")
    with pytest.raises(InputError, match="save_inference_model"):
        load_sae(tmp_path / "training")


def test_a_dictionary_of_another_width_or_site_does_not_fit() -> None:
    model = model_of("llama")
    with pytest.raises(MismatchError, match=r"width 12.*width 32"):
        check_fits(dictionary("standard"), model)
    deep = from_sae_lens(peer("standard", d_in=32, site="blocks.9.hook_resid_post"))
    with pytest.raises(UnknownSiteError, match=r"blocks\.9"):
        check_fits(deep, model)
    check_fits(from_sae_lens(peer("standard", d_in=32)), model)


def test_a_dictionary_of_other_weights_does_not_fit() -> None:
    base = model_of("llama")
    tuned = base.with_adapter(adapter_of("llama"))
    assert weights_digest(tuned) == weights_digest(base) is not None
    fits = from_sae_lens(peer("standard", d_in=32))
    fits.meta["model_digest"] = weights_digest(base)
    check_fits(fits, base)
    check_fits(fits, tuned)
    with pytest.raises(MismatchError, match="another model"):
        check_fits(fits, model_of("qwen2"))
    in_memory = load_model(model_of("qwen2").hf, tokenizer=checkpoint_of("llama"))
    assert weights_digest(in_memory) is None
    check_fits(fits, in_memory)  # there is nothing to tell it by


def test_top_k_by_decoder_norm_becomes_plain_top_k() -> None:
    sae = peer("topk by norm")
    ours = from_sae_lens(sae)
    torch.testing.assert_close(ours.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert (ours.W_enc != sae.W_enc).any() and inputs().shape[1] == ours.d_model
