from __future__ import annotations

import warnings
from html import escape
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from persona_probe.activations import capture
from persona_probe.errors import InputError, MismatchError
from persona_probe.hooks import capture_at, edit_at
from persona_probe.model import LanguageModel, load_model, load_pair
from tests.model.tiny_models import (
    FAMILIES,
    adapter_of,
    checkpoint_of,
    model_of,
    prompts_of_many_lengths,
    save_adapter,
    save_checkpoint,
    tiny_hf,
    tiny_tokenizer,
)

IDS = torch.tensor([[5, 9, 40, 7, 88], [6, 8, 4, 100, 3]])


def storages(lm: LanguageModel) -> set[int]:
    return {p.data_ptr() for n, p in lm.hf.named_parameters() if "lora_" not in n}


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_share_the_weights_and_leave_the_base_bit_for_bit(family: str) -> None:
    base = load_model(checkpoint_of(family))
    before, keys = base.forward(IDS), list(base.hf.state_dict())
    first, second = (base.with_adapter(adapter_of(family, seed)) for seed in (0, 1))
    outputs = [lm.forward(IDS) for lm in (first, second)]
    assert torch.equal(base.forward(IDS), before)
    assert list(base.hf.state_dict()) == keys
    assert storages(first) == storages(second) == storages(base)
    # each is the model that is loaded by itself, whatever else was put on the shared weights
    for lm, seed, output in zip((first, second), (0, 1), outputs, strict=True):
        assert torch.equal(load_model(adapter_of(family, seed)).forward(IDS), output)
        assert not torch.allclose(output, before, atol=0.01)
        off = lm.without_adapter()
        assert torch.equal(off.forward(IDS), before) and storages(off) == storages(base)
        assert list(off.hf.state_dict()) == keys and off.checkpoint == base.checkpoint
        merged = lm.merged()
        assert merged.peft is None and lm.adapter_name == merged.adapter_name
        torch.testing.assert_close(merged.forward(IDS), output, atol=2e-5, rtol=2e-5)
        assert torch.equal(lm.forward(IDS), output)
    assert torch.equal(base.forward(IDS), before)


def test_a_merged_model_shares_what_the_adapter_does_not_touch() -> None:
    base = load_model(checkpoint_of("llama"))
    merged = base.with_adapter(adapter_of("llama")).merged()
    shared = {
        name
        for name, weight in merged.hf.named_parameters()
        if weight.data_ptr() == base.hf.get_parameter(name).data_ptr()
    }
    assert shared == {name for name, _ in base.hf.named_parameters() if "proj" not in name}
    assert base.merged() is base


def test_hooks_on_one_model_do_not_reach_the_others() -> None:
    base = model_of("llama")
    tuned = base.with_adapter(adapter_of("llama"))
    plain = base.forward(IDS)
    with edit_at(tuned.hf, {"blocks.1.hook_resid_post": lambda x: x + 9}) as firings:
        assert torch.equal(base.forward(IDS), plain)
        assert firings == {"blocks.1.hook_resid_post": 0}
        tuned.forward(IDS)
        assert firings == {"blocks.1.hook_resid_post": 1}


def test_a_tree_made_under_hooks_has_only_those_of_others() -> None:
    base = load_model(checkpoint_of("llama"))
    plain, theirs = base.forward(IDS), []
    base.hf.model.norm.register_forward_hook(lambda *_: theirs.append(1))
    site = "blocks.1.hook_resid_post"
    with edit_at(base.hf, {site: lambda x: x + 9}), capture_at(base.hf, [site]) as captured:
        tuned = base.with_adapter(adapter_of("llama"))
        merged = tuned.merged()
        assert torch.equal(tuned.without_adapter().forward(IDS), plain) and theirs == [1]
    expected = load_model(adapter_of("llama")).forward(IDS)
    assert torch.equal(tuned.forward(IDS), expected)
    torch.testing.assert_close(merged.forward(IDS), expected, atol=2e-5, rtol=2e-5)
    assert captured.firings == {site: 0} and theirs == [1] * 3


def test_scaling_an_adapter_interpolates_its_weights() -> None:
    base = model_of("gpt2")
    tuned = base.with_adapter(adapter_of("gpt2"))
    full, none = tuned.forward(IDS), base.forward(IDS)
    with tuned.adapter_scaled(0.0):
        assert torch.equal(tuned.forward(IDS), none)
    with tuned.adapter_scaled(0.5), tuned.adapter_scaled(2.0):
        assert torch.equal(tuned.forward(IDS), full)
    with pytest.raises(RuntimeError), tuned.adapter_scaled(0.5):
        half = tuned.forward(IDS)
        raise RuntimeError
    assert torch.equal(tuned.forward(IDS), full)
    # against weights interpolated by hand
    merged = tuned.merged()
    with torch.no_grad():
        for name, weight in merged.hf.named_parameters():
            weight.data = (weight + base.hf.get_parameter(name)) / 2
    torch.testing.assert_close(merged.forward(IDS), half, atol=2e-5, rtol=2e-5)
    with pytest.raises(InputError, match="no adapter"), base.adapter_scaled(0.5):
        pass


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"init_lora_weights": "gaussian", "use_rslora": True},
    ],
    ids=["dora", "whole-modules", "embedding", "rslora"],
)
def test_adapters_of_other_kinds_leave_the_base_alone(tmp_path: Path, options) -> None:
    folder = checkpoint_of("llama")
    adapter = save_adapter(tmp_path / "adapter", folder, **options)
    base = load_model(folder)
    before = base.forward(IDS)
    tuned = base.with_adapter(adapter)
    output = tuned.forward(IDS)
    assert torch.equal(base.forward(IDS), before)
    assert not torch.allclose(output, before, atol=0.01)
    assert torch.equal(load_model(adapter).forward(IDS), output)
    torch.testing.assert_close(tuned.merged().forward(IDS), output, atol=2e-5, rtol=2e-5)
    assert torch.equal(base.forward(IDS), before)
    if options.keys() & {"use_dora", "modules_to_save"}:
        with pytest.raises(InputError, match="can be scaled: "), tuned.adapter_scaled(0.5):
            pass
        with pytest.raises(InputError, match="cannot be taken out"):
            tuned.without_adapter()
    else:
        assert torch.equal(tuned.without_adapter().forward(IDS), before)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bias": "all"}, "trains biases"),
        ({"init_lora_weights": "pissa"}, "changing the base's weights"),
        ({"init_lora_weights": "olora"}, "changing the base's weights"),
    ],
)
def test_adapters_that_write_into_the_base_do_not_share_it(
    tmp_path: Path, options: dict[str, str], reason: str
) -> None:
    folder = checkpoint_of("gpt2" if "bias" in options else "llama")
    adapter = save_adapter(tmp_path / "adapter", folder, **options)
    base = load_model(folder)
    before = base.forward(IDS)
    with pytest.raises(MismatchError, match=reason):
        base.with_adapter(adapter)
    state = torch.get_rng_state()
    pair = load_pair(folder, adapter)
    assert torch.equal(torch.get_rng_state(), state)
    assert not storages(pair.base) & storages(pair.tuned)
    assert torch.equal(pair.base.forward(IDS), before)
    assert not torch.allclose(pair.tuned.forward(IDS), before, atol=0.01)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        peft = PeftModel.from_pretrained(tiny_hf(folder.name), str(adapter)).eval()
        torch.testing.assert_close(pair.tuned.forward(IDS), peft(IDS).logits)
    with pytest.raises(MismatchError, match=reason):
        load_pair(base, adapter)


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    base = model_of("llama")
    before = base.forward(IDS)
    with pytest.raises(MismatchError, match="does not fit"):
        base.with_adapter(adapter_of("gpt2"))
    wider = tiny_hf("llama")
    wider.config.hidden_size = 48
    wide = AutoModelForCausalLM.from_config(wider.config)
    wide.save_pretrained(tmp_path / "wide")
    tiny_tokenizer().save_pretrained(tmp_path / "wide")
    with pytest.raises(MismatchError, match="does not fit"):
        load_model(tmp_path / "wide", adapter=adapter_of("llama"))
    with pytest.raises(InputError, match="already has an adapter"):
        base.with_adapter(adapter_of("llama")).with_adapter(adapter_of("llama", 1))
    assert torch.equal(base.forward(IDS), before)


def test_names_with_dots_and_of_ones_own(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "step-1.5", checkpoint_of("llama"))
    base = model_of("llama")
    assert base.with_adapter(adapter).adapter_name == "step-1.5"
    assert base.with_adapter(adapter, "bad-health").name == "bad-health"
    assert base.with_adapter(adapter).checkpoint.adapter == str(adapter)
    assert base.name == "llama"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_bridge_leaves_the_model_as_it_was(family: str, tmp_path: Path) -> None:
    base = load_model(checkpoint_of(family))
    tuned = base.with_adapter(adapter_of(family))
    for lm in (base, tuned):
        before, keys = lm.forward(IDS), list(lm.hf.state_dict())
        bridge = lm.bridge()
        with torch.no_grad():
            torch.testing.assert_close(bridge(IDS), before, atol=1e-5, rtol=1e-5)
        assert torch.equal(lm.forward(IDS), before)
        assert list(lm.hf.state_dict()) == keys
        lm.save_pretrained(tmp_path / lm.name)
        again = load_model(tmp_path / lm.name)
        assert torch.equal(again.forward(IDS), before)
        assert (again.adapter_name is None) == (lm is base)
        ids = lm.tokenizer("hello there")["input_ids"]
        assert again.tokenizer("hello there")["input_ids"] == ids
    # beside the shared ones it has a few of its own (GPT-2's joint projection, split)
    assert storages(base) <= {p.data_ptr() for p in base.bridge().original_model.parameters()}


def test_loading_draws_no_random_numbers_and_writes_nothing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    checkpoint_of("llama"), adapter_of("llama")
    capfd.readouterr()
    state = torch.get_rng_state()
    load_pair(checkpoint_of("llama"), adapter_of("llama")).tuned.merged()
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")


def test_a_model_in_memory_is_not_touched_and_is_followed() -> None:
    source = tiny_hf("qwen2").train().requires_grad_(True)
    lm = load_model(source, tokenizer=tiny_tokenizer())
    with torch.no_grad():
        assert torch.equal(lm.forward(IDS), source.eval()(IDS).logits)
        source.train()
        assert not lm.hf.training and all(p.requires_grad for p in source.parameters())
        source.model.norm.weight.mul_(2)
        assert torch.equal(lm.forward(IDS), source.eval()(IDS).logits)
    assert lm.name == "memory:Qwen2ForCausalLM"
    assert load_model(lm) is lm
    with pytest.raises(InputError, match="without its tokenizer"):
        load_model(source)


def test_models_in_memory_are_told_apart_by_what_they_hold_now(tmp_path: Path) -> None:
    source, tokenizer = tiny_hf("llama"), tiny_tokenizer()
    lm = load_model(source, tokenizer=tokenizer)
    before = lm.checkpoint.digest
    assert load_model(tiny_hf("llama"), tokenizer=tokenizer).checkpoint.digest == before
    assert load_model(tiny_hf("llama", seed=1), tokenizer=tokenizer).checkpoint.digest != before
    texts = prompts_of_many_lengths()
    capture(lm, texts, ["blocks.1.hook_resid_post"], out=tmp_path / "acts")
    with torch.no_grad():
        source.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert lm.checkpoint.digest != before
    with pytest.raises(InputError):
        capture(lm, texts, ["blocks.1.hook_resid_post"], out=tmp_path / "acts")
    tuned = lm.with_adapter(adapter_of("llama"))
    other = lm.with_adapter(adapter_of("llama", 1))
    assert len({one.checkpoint.digest for one in (lm, tuned, other)}) == 3
    assert tuned.without_adapter().checkpoint.digest == lm.checkpoint.digest


def test_a_tokenizer_goes_with_a_loaded_model_too() -> None:
    lm, given = model_of("llama"), tiny_tokenizer()
    again = load_model(lm, tokenizer=given)
    assert again.tokenizer is given and again.hf is lm.hf and lm.tokenizer is not given
    assert load_model(lm, tokenizer=given, adapter=adapter_of("llama")).tokenizer is given
    borrowed = load_model(lm, tokenizer=checkpoint_of("mistral")).tokenizer
    assert borrowed is not lm.tokenizer and borrowed.get_vocab() == lm.tokenizer.get_vocab()
    larger = tiny_tokenizer()
    larger.add_tokens([f"word{n}" for n in range(400)])
    with pytest.raises(MismatchError, match="embeds 320"):
        load_model(lm, tokenizer=larger)


def test_a_peft_model_in_memory_is_followed() -> None:
    tuned = load_model(adapter_of("llama"))
    lm = load_model(tuned.peft, tokenizer=tuned.tokenizer)
    assert torch.equal(lm.forward(IDS), tuned.forward(IDS))
    assert lm.adapter_name == "default"
    torch.testing.assert_close(lm.merged().forward(IDS), tuned.forward(IDS), atol=2e-5, rtol=2e-5)


def test_what_a_model_says_of_itself() -> None:
    lm = model_of("gemma2")
    assert (lm.n_layers, lm.d_model, lm.d_vocab) == (3, 32, 320)
    assert (lm.device.type, lm.dtype, lm.pad_id, lm.eos_ids) == ("cpu", torch.float32, 2, (1,))
    assert {0, 1, 2, 3} == lm.special_ids
    assert load_model(checkpoint_of("gemma2"), dtype="bfloat16").dtype == torch.bfloat16
    assert not any(p.requires_grad for p in lm.hf.parameters())
    lm.hf.train()
    with lm.active() as hf:
        assert not any(module.training for module in hf.modules())


def test_forward_is_hugging_faces() -> None:
    lm = model_of("mistral")
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(checkpoint_of("mistral"))(IDS).logits
    assert torch.equal(lm.forward(IDS), expected)


def test_generate_continues_each_prompt_as_alone() -> None:
    lm = model_of("gpt2")
    chat = [{"role": "user", "content": "how are you"}]
    prompts = ["hello there how", "a", chat, *prompts_of_many_lengths()]
    together = lm.generate(prompts, max_new_tokens=5)
    assert together == [lm.generate([prompt], max_new_tokens=5)[0] for prompt in prompts]
    assert lm.generate("hello there how", max_new_tokens=5) == together[:1]
    assert lm.generate(chat, max_new_tokens=5) == together[2:3]
    # by hand, without cache or padding
    ids = list(lm.rendered(chat).ids)
    for _ in range(5):
        ids.append(int(lm.forward(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] in lm.eos_ids:
            break
    new = ids[len(lm.rendered(chat)) :]
    assert together[2] == lm.tokenizer.decode(new, skip_special_tokens=True)


def test_a_vocabulary_tied_to_the_embedding_stays_tied() -> None:
    lm = load_model(checkpoint_of("gemma2"))
    for view in (lm, lm.with_adapter(adapter_of("gemma2"))):
        embedding, unembedding = view.hf.get_input_embeddings(), view.hf.get_output_embeddings()
        assert embedding.weight is unembedding.weight


def test_device_map_reads_the_same() -> None:
    lm = load_model(checkpoint_of("llama"), device_map="cpu", dtype="float32")
    assert torch.equal(lm.forward(IDS), model_of("llama").forward(IDS))
    tuned = lm.with_adapter(adapter_of("llama"))
    expected = model_of("llama").with_adapter(adapter_of("llama")).forward(IDS)
    assert torch.equal(tuned.forward(IDS), expected)


def test_weights_on_the_disk_are_fetched_when_they_are_needed() -> None:
    blocks = (f"layers.{i}" for i in range(model_of("llama").n_layers))
    modules = ["embed_tokens", "norm", "rotary_emb", *blocks]
    split = {**{f"model.{name}": "cpu" for name in modules}, "lm_head": "disk"}
    split |= dict.fromkeys(("model.embed_tokens", "model.layers.1"), "disk")
    lm = load_model(checkpoint_of("llama"), device_map=split)
    assert lm.device.type == "cpu"
    assert torch.equal(lm.forward(IDS), model_of("llama").forward(IDS))
    with pytest.raises(InputError, match="weights are partly on the disk"):
        lm.with_adapter(adapter_of("llama"))


@pytest.mark.parametrize("asked", [{"dtype": "bfloat16"}, {"device": "meta"}, {"revision": "main"}])
def test_a_model_in_memory_is_taken_as_it_is(asked: dict[str, str]) -> None:
    lm = model_of("llama")
    assert load_model(lm, device="cpu", dtype="float32") is lm
    for source in (lm, lm.hf):
        with pytest.raises(InputError, match=f"taken as it is.*not with {next(iter(asked))}="):
            load_model(source, tokenizer=lm.tokenizer, **asked)
    with pytest.raises(InputError, match="no device 'abacus'"):
        load_model(lm, device="abacus")


# ------------------------------------------------------------------------------------------ pairs


def test_a_pair_of_full_checkpoints(tmp_path: Path) -> None:
    tuned = save_checkpoint(tmp_path / "tuned", "llama", seed=1)
    pair = load_pair(checkpoint_of("llama"), tuned)
    assert not torch.allclose(pair.base.forward(IDS), pair.tuned.forward(IDS), atol=0.1)
    assert (pair.base.name, pair.tuned.name) == ("llama", "tuned")
    same = load_pair(checkpoint_of("llama"), checkpoint_of("llama"))
    assert torch.equal(same.base.forward(IDS), same.tuned.forward(IDS))


def test_two_adapters_are_a_pair_on_one_copy() -> None:
    """Two checkpoints of one fine-tune."""
    early, late = adapter_of("llama", 0), adapter_of("llama", 1)
    pair = load_pair(early, late)
    assert storages(pair.base) == storages(pair.tuned)
    assert (pair.base.name, pair.tuned.name) == ("llama-lora-0", "llama-lora-1")
    assert torch.equal(pair.base.forward(IDS), load_model(early).forward(IDS))
    assert torch.equal(pair.tuned.forward(IDS), load_model(late).forward(IDS))


def test_a_pair_shows_itself_in_a_notebook() -> None:
    folder = adapter_of("llama")
    pair = load_pair(checkpoint_of("llama"), folder)
    shown = pair._repr_html_()
    assert escape(pair.tuned.name) in shown and escape(str(folder)) in shown
    assert f"d_model {pair.base.d_model}" in shown and "shared weights" in shown
    whole = load_pair(checkpoint_of("llama"), checkpoint_of("llama"))
    assert "weights of their own" in whole._repr_html_()


def test_the_named_base_is_used_not_the_adapters_own(tmp_path: Path) -> None:
    copy = save_checkpoint(tmp_path / "copy", "llama")
    pair = load_pair(copy, adapter_of("llama"))
    assert pair.tuned.checkpoint.path == str(copy)
    assert storages(pair.base) == storages(pair.tuned)


def test_models_that_do_not_belong_together(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="does not fit"):
        load_pair(checkpoint_of("gpt2"), adapter_of("llama"))
    deeper = tiny_hf("llama")
    deeper.config.num_hidden_layers = 2
    shallow = AutoModelForCausalLM.from_config(deeper.config)
    with pytest.raises(MismatchError, match="n_layers is 3 in llama and 2"):
        load_pair(model_of("llama"), load_model(shallow, tokenizer=tiny_tokenizer()))
    other = tiny_tokenizer()
    other.add_tokens(["newword"])
    longer = load_model(tiny_hf("llama"), tokenizer=tiny_tokenizer())
    changed = load_model(shallow, tokenizer=other)
    with pytest.raises(MismatchError, match=r"'newword' is id None in the base and \d+"):
        load_pair(load_model(shallow, tokenizer=tiny_tokenizer()), changed)
    assert load_pair(model_of("llama"), longer).tuned is longer


def test_gradients_reach_activations_of_frozen_models() -> None:
    tuned = model_of("llama").with_adapter(adapter_of("llama"))
    seen: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        seen.append(x.detach().requires_grad_())
        return seen[-1]

    with tuned.active() as hf, edit_at(hf, {"blocks.0.hook_resid_post": leaf}):
        hf(IDS).logits.square().sum().backward()
    assert seen[0].grad is not None and bool((seen[0].grad != 0).all())
    assert all(p.grad is None for p in tuned.hf.parameters())
    assert isinstance(tuned.hf, nn.Module)


def test_an_adapters_own_tokenizer_comes_first(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", checkpoint_of("llama"))
    marked = tiny_tokenizer("{{ messages[0]['content'] }}")
    marked.save_pretrained(adapter)
    assert load_model(adapter).tokenizer.chat_template == marked.chat_template
    base_template = AutoTokenizer.from_pretrained(checkpoint_of("llama")).chat_template
    assert load_model(adapter_of("llama")).tokenizer.chat_template == base_template
    with capture_at(load_model(adapter).hf, ["blocks.0.hook_attn_out"]) as captured:
        load_model(adapter)
        assert captured.firings == {"blocks.0.hook_attn_out": 0}
