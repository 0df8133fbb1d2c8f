from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GraniteConfig, Olmo2Config

from persona_probe.errors import InputError, UnknownSiteError
from persona_probe.hooks import KINDS, blocks_of, check_site, parse_site, resid_post, site_names
from persona_probe.hooks.sites import _LAYOUTS, Site, _adapter_layout, layout_of
from tests.model.tiny_models import FAMILIES, model_of, tiny_hf


@given(st.integers(0, 500), st.sampled_from(KINDS))
def test_a_name_is_read_and_written_back(block: int, kind: str) -> None:
    site = parse_site(f"blocks.{block}.{kind}")
    assert (site.block, site.kind, site.name) == (block, kind, f"blocks.{block}.{kind}")


def test_sites_sort_as_a_forward_pass_reaches_them() -> None:
    names = [f"blocks.{block}.{kind}" for block in (0, 1, 10) for kind in KINDS]
    assert [site.name for site in sorted(parse_site(name) for name in reversed(names))] == names
    assert resid_post(3) == "blocks.3.hook_resid_post"
    assert parse_site(resid_post(3)) == Site(3, KINDS.index("hook_resid_post"))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("blocks.2.hook_resid_pots", "blocks.2.hook_resid_post"),
        ("blocks.2.attn.hook_out", "blocks.2.hook_attn_out"),
        ("model.layers.2", "blocks.2."),
        ("blocks.2.hook_resid_post ", "blocks.2.hook_resid_post"),
        ("blocks.-1.hook_resid_post", "blocks.1.hook_resid_post"),
        ("", "blocks.0."),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UnknownSiteError) as caught:
        parse_site(name)
    assert nearest in str(caught.value)
    assert repr(name) in str(caught.value)


def test_a_block_that_the_model_does_not_have() -> None:
    with pytest.raises(UnknownSiteError, match=r"blocks 0 to 2(.|\n)*blocks\.2\.hook_mlp_out"):
        check_site(model_of("llama").hf, "blocks.3.hook_mlp_out")


@pytest.mark.parametrize("family", FAMILIES)
def test_our_table_says_what_transformer_lens_says(family: str) -> None:
    """The table is a shortcut around TransformerLens's adapters, not another opinion."""
    assert _adapter_layout(tiny_hf(family)) == _LAYOUTS[FAMILIES[family].model_type]


def test_every_family_has_every_kind_in_every_block() -> None:
    for family in FAMILIES:
        hf = model_of(family).hf
        assert len(blocks_of(hf)) == 3
        assert site_names(hf) == tuple(f"blocks.{b}.{kind}" for b in range(3) for kind in KINDS)


_SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_families_outside_the_table_are_looked_up_in_the_adapters() -> None:
    """OLMo 2 puts a norm behind each sublayer and none before: its own names mean other tensors."""
    olmo = AutoModelForCausalLM.from_config(Olmo2Config(**_SMALL, intermediate_size=16))
    layout = layout_of(olmo)
    assert layout.blocks == "model.layers"
    assert layout.attn_out == "post_attention_layernorm"
    assert layout.mlp_out == "post_feedforward_layernorm"
    assert check_site(olmo, "blocks.1.hook_resid_post").block == 1


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        # attention and MLP in parallel: there is no middle
        (GPTNeoXConfig(**_SMALL, intermediate_size=16), "hook_resid_mid"),
        # sublayers are scaled before they are added: no module's output is what is added
        (GraniteConfig(**_SMALL, intermediate_size=16, residual_multiplier=0.5), "hook_attn_out"),
    ],
)
def test_a_site_that_the_architecture_does_not_have_is_refused(config, kind: str) -> None:
    hf = AutoModelForCausalLM.from_config(config)
    assert check_site(hf, "blocks.0.hook_resid_pre").block == 0
    with pytest.raises(UnknownSiteError, match="no single tensor"):
        check_site(hf, f"blocks.0.{kind}")
    assert not any(kind in name for name in site_names(hf))


def test_what_is_no_language_model_is_refused() -> None:
    import torch

    with pytest.raises(InputError, match="Linear"):
        site_names(torch.nn.Linear(2, 2))
