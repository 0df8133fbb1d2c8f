"""sparsify's files, against its formula written out token by token, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from persona_probe.errors import InputError, MismatchError, NonFiniteError
from persona_probe.sae.encode import decode, encode, encode_dense, encode_latents
from persona_probe.sae.load import check_fits, load_sae
from tests.model.tiny_models import model_of

D_MODEL, D_SAE, K = 32, 80, 4
WHOLE = {
    "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": D_SAE, "k": K,
    "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D_MODEL,
}  # fmt: skip


def write(folder: Path, config: dict[str, Any] | None = None, **changed: Tensor | None) -> Path:
    """A folder as `SparseCoder.save_to_disk` writes it; every weight matters."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "encoder.weight": (D_SAE, D_MODEL),
        "encoder.bias": (D_SAE,),
        "W_dec": (D_SAE, D_MODEL),
        "b_dec": (D_MODEL,),
    }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors = {**tensors, **{name.replace("__", "."): tensor for name, tensor in changed.items()}}
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(WHOLE if config is None else config))
    return folder


def slowly(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction by sparsify's formula, latent by latent."""
    weights = load_file(folder / "sae.safetensors")
    latents = torch.zeros(len(x), D_SAE)
    out = weights["b_dec"].expand(len(x), -1).clone()
    for token in range(len(x)):
        centred = x[token] - weights["b_dec"]
        pre = [
            max(0.0, float(weights["encoder.weight"][i] @ centred + weights["encoder.bias"][i]))
            for i in range(D_SAE)
        ]
        for i in sorted(range(D_SAE), key=lambda i: -pre[i])[:K]:
            latents[token, i] = pre[i]
            out[token] += pre[i] * weights["W_dec"][i]
    return latents, out


def test_it_computes_sparsifys_formula(tmp_path: Path) -> None:
    folder = write(tmp_path / "layers.1")
    x = 2 * torch.randn(25, D_MODEL, generator=torch.Generator().manual_seed(1))
    latents, out = slowly(folder, x)
    found = load_sae(folder)
    torch.testing.assert_close(encode_dense(found, x), latents, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(encode(found, x).dense(), latents, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(encode_latents(found, x, [5, 3]), latents[:, [5, 3]], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(decode(found, encode(found, x)), out, atol=1e-4, rtol=1e-5)
    assert (found.site, found.k, found.d_sae) == ("blocks.1.hook_resid_post", K, D_SAE)
    assert found.meta["format"] == "sparsify"
    check_fits(found, model_of("llama"))


def test_fewer_than_k_may_fire(tmp_path: Path) -> None:
    found = load_sae(write(tmp_path / "layers.0", encoder__bias=torch.full((D_SAE,), -1e6)))
    assert len(encode(found, torch.randn(5, D_MODEL)).value) == 0


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("layers.2", "blocks.2.hook_resid_post"),
        ("model.layers.11", "blocks.11.hook_resid_post"),
        ("gpt_neox.layers.3", "blocks.3.hook_resid_post"),
        ("h.4", "blocks.4.hook_resid_post"),
        ("layers.2.mlp", "blocks.2.hook_mlp_out"),
        ("layers.2.self_attn", "blocks.2.hook_attn_out"),
        ("layers.7/seed1", "blocks.7.hook_resid_post"),
    ],
)
def test_the_folder_names_the_site(name: str, site: str, tmp_path: Path) -> None:
    folder = write(tmp_path / name)
    assert load_sae(folder).site == load_sae(folder, site=site).site == site
    with pytest.raises(MismatchError, match=f"trained at {site}"):
        load_sae(folder, site="blocks.5.hook_resid_pre")


def test_a_folder_of_another_name_needs_its_site(tmp_path: Path) -> None:
    for name in ("mine", "embed_tokens", "layers.2.mlp.up_proj"):
        folder = write(tmp_path / name)
        with pytest.raises(InputError, match="no hookpoint with a site"):
            load_sae(folder)
        assert load_sae(folder, site="blocks.2.hook_mlp_out").site == "blocks.2.hook_mlp_out"


def test_a_module_whose_output_is_not_what_is_added_is_refused(tmp_path: Path) -> None:
    """Gemma 2 normalises the MLP's output before it joins the residual stream."""
    found = load_sae(write(tmp_path / "layers.1.mlp"))
    check_fits(found, model_of("llama"))
    with pytest.raises(MismatchError, match="not what is added to the residual stream"):
        check_fits(found, model_of("gemma2"))


def test_the_runs_own_facts_are_kept(tmp_path: Path) -> None:
    folder = write(tmp_path / "run" / "layers.1")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": "org/base", "dataset": "text"}))
    assert load_sae(folder).meta["model_name"] == "org/base"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transcode": True}, "a transcoder"),
        ({"skip_connection": True}, "skip connection"),
        ({"embed_skip": True}, "corrected by the embeddings"),
        ({"gram_lookup": True}, "n-grams"),
        ({"signed": True}, "signed latents"),
        ({"activation": "groupmax"}, "activation 'groupmax'"),
        ({"num_latents": D_SAE + 1}, "shape"),
        ({"k": None}, "does not say"),
    ],
)
def test_other_kinds_are_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "layers.1", {**WHOLE, **change})
    with pytest.raises(InputError, match=message):
        load_sae(folder)


def test_what_older_versions_wrote_is_read(tmp_path: Path) -> None:
    """No activation and no transcode; latents by expansion factor; multi-top-k is a loss, not a rule."""
    old = {"expansion_factor": 2.5, "k": K, "d_in": D_MODEL, "signed": False, "multi_topk": True}
    old["expansion_factor"] = D_SAE // D_MODEL
    short = {name: torch.randn(64, D_MODEL) for name in ("encoder__weight", "W_dec")}
    assert load_sae(write(tmp_path / "layers.1", old, encoder__bias=torch.zeros(64), **short)).d_sae == 64


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "layers.1", W_dec=None)
    with pytest.raises(InputError, match="lacks W_dec"):
        load_sae(folder)
    write(folder, W_skip=torch.zeros(D_MODEL, D_MODEL))
    with pytest.raises(InputError, match="has also W_skip"):
        load_sae(folder)
    write(folder, b_dec=torch.full((D_MODEL,), torch.nan))
    with pytest.raises(NonFiniteError, match="b_dec"):
        load_sae(folder)
    (folder / "sae.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="cannot be read"):
        load_sae(folder)
    (folder / "cfg.json").write_text("[]")
    with pytest.raises(InputError, match="no JSON object"):
        load_sae(folder)
