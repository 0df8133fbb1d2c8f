from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import Olmo2Config, Olmo2ForCausalLM

from persona_probe.errors import InputError, NotFiredError, UnknownSiteError
from persona_probe.hooks import capture_at, edit_at, site_names
from persona_probe.model import LanguageModel
from tests.model.tiny_models import model_of

IDS = torch.tensor([[5, 9, 40, 7], [6, 8, 4, 100]])
PRE, MID, POST = (f"blocks.1.hook_resid_{part}" for part in ("pre", "mid", "post"))


@pytest.fixture
def lm() -> LanguageModel:
    return model_of("llama")


def hooks_on(lm: LanguageModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.hf.modules())


def test_the_pass_ends_behind_the_deepest_site(lm: LanguageModel) -> None:
    reached: list[int] = []
    handles = [
        block.register_forward_pre_hook(lambda *_, n=n: reached.append(n))
        for n, block in enumerate(lm.hf.model.layers)
    ]
    with capture_at(lm.hf, [POST, "blocks.0.hook_mlp_out"]) as captured:
        assert captured.run(lambda: lm.hf(IDS)) is None
        assert reached == [0, 1]
        assert captured.firings == {"blocks.0.hook_mlp_out": 1, POST: 1}
        early = captured[POST]
        # called directly, the model runs to the end
        assert lm.hf(IDS).logits.shape == (2, 4, 320)
        assert reached == [0, 1, 0, 1, 2]
        assert torch.equal(captured[POST], early)
    with capture_at(lm.hf, [POST], stop_after_deepest=False) as captured:
        assert captured.run(lambda: lm.hf(IDS)).logits.shape == (2, 4, 320)
    for handle in handles:
        handle.remove()


def test_a_model_without_hooks_is_left_behind(lm: LanguageModel) -> None:
    before = hooks_on(lm)
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        capture_at(lm.hf, site_names(lm.hf)),
        edit_at(lm.hf, dict.fromkeys(site_names(lm.hf), lambda x: x + 1)),
    ):
        assert hooks_on(lm) > before
        raise RuntimeError("on purpose")
    with pytest.raises(UnknownSiteError), edit_at(lm.hf, {POST: lambda x: x, "nonsense": None}):
        pass
    with pytest.raises(UnknownSiteError), capture_at(lm.hf, [POST, "blocks.9.hook_resid_post"]):
        pass
    assert hooks_on(lm) == before


def test_what_was_not_read_is_an_error_not_an_empty_answer(lm: LanguageModel) -> None:
    with capture_at(lm.hf, [POST]) as captured:
        with pytest.raises(NotFiredError, match="no forward pass"):
            captured.run(lambda: None)
        with pytest.raises(NotFiredError):
            captured[POST]
        captured.run(lambda: lm.hf(IDS))
        with pytest.raises(NotFiredError):  # the last run counts, not the one before
            captured.run(lambda: None)
            captured[POST]
        with pytest.raises(InputError, match="not asked for"):
            captured[PRE]
    with pytest.raises(InputError, match="no site"), capture_at(lm.hf, []):
        pass


def test_an_edit_of_nothing_is_bit_identical(lm: LanguageModel) -> None:
    plain = lm.forward(IDS)
    for edit in (lambda x: x, lambda x: x.clone()):
        with edit_at(lm.hf, dict.fromkeys(site_names(lm.hf), edit)) as firings:
            assert torch.equal(lm.forward(IDS), plain)
        assert set(firings.values()) == {1}
    assert torch.equal(lm.forward(IDS), plain)


def test_only_the_edited_row_changes(lm: LanguageModel) -> None:
    plain = lm.forward(IDS)

    def second_row(x: Tensor) -> Tensor:
        return torch.cat([x[:1], x[1:] + 1])

    for name in site_names(lm.hf):
        with edit_at(lm.hf, {name: second_row}):
            edited = lm.forward(IDS)
        assert torch.equal(edited[0], plain[0]), name
        assert not torch.allclose(edited[1], plain[1], atol=1e-3), name


def test_a_capture_inside_an_edit_sees_it(lm: LanguageModel) -> None:
    for name in site_names(lm.hf):
        with edit_at(lm.hf, {name: lambda x: x * 2}), capture_at(lm.hf, [name]) as captured:
            captured.run(lambda: lm.hf(IDS))
        with capture_at(lm.hf, [name]) as plain:
            plain.run(lambda: lm.hf(IDS))
        torch.testing.assert_close(captured[name], plain[name] * 2, atol=1e-5, rtol=1e-5)


def test_edits_entered_later_act_on_what_earlier_ones_left(lm: LanguageModel) -> None:
    seen: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    with edit_at(lm.hf, {MID: look}), edit_at(lm.hf, {PRE: lambda x: x + 3}):
        lm.forward(IDS)
    with edit_at(lm.hf, {PRE: lambda x: x + 3}), capture_at(lm.hf, [MID]) as captured:
        captured.run(lambda: lm.hf(IDS))
    assert torch.equal(seen[0], captured[MID])

    with edit_at(lm.hf, {POST: lambda x: x + 3}), edit_at(lm.hf, {POST: lambda x: x * 2}):
        twice = lm.forward(IDS)
    with edit_at(lm.hf, {POST: lambda x: (x + 3) * 2}):
        assert torch.equal(twice, lm.forward(IDS))


def test_gradients_pass_through_captures_and_edits(lm: LanguageModel) -> None:
    """Against the finite difference of a loss at a later site in an edit's own parameter."""
    strength = torch.tensor(0.7, dtype=torch.float32, requires_grad=True)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))

    def loss(amount: Tensor) -> Tensor:
        with (
            edit_at(lm.hf, {MID: lambda x: x + amount * direction}),
            capture_at(lm.hf, ["blocks.2.hook_resid_post"]) as captured,
        ):
            captured.run(lambda: lm.hf(IDS))
            return captured["blocks.2.hook_resid_post"].square().mean()

    (gradient,) = torch.autograd.grad(loss(strength), strength)
    with torch.no_grad():
        numeric = (loss(strength + 1e-2) - loss(strength - 1e-2)) / 2e-2
    torch.testing.assert_close(gradient, numeric, rtol=1e-2, atol=1e-3)


def test_the_middle_of_a_block_whose_norms_stand_behind_its_sublayers() -> None:
    """OLMo 2, the block by hand: m = x + norm(attn(x)), and m + norm(mlp(m)) leaves it."""
    torch.manual_seed(0)
    config = Olmo2Config(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    hf = Olmo2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    block = hf.model.layers[1]

    def rotate(x: Tensor) -> Tensor:
        return x.flip(-1) * 0.5 + 1

    with torch.no_grad(), capture_at(hf, [PRE, MID, POST]) as plain:
        plain.run(lambda: hf(IDS))
        x, rotary = plain[PRE], hf.model.rotary_emb(plain[PRE], torch.arange(4)[None])
        attended = block.self_attn(hidden_states=x, position_embeddings=rotary, attention_mask=None)[0]
        middle = x + block.post_attention_layernorm(attended)
        torch.testing.assert_close(plain[MID], middle)
        wanted = rotate(middle)
        wanted = wanted + block.post_feedforward_layernorm(block.mlp(wanted))
    # an edit of what enters the block, though entered later, is in the middle that is edited
    for before in ({}, {PRE: lambda x: x.clone()}):
        with torch.no_grad(), edit_at(hf, {MID: rotate}), edit_at(hf, before):
            with capture_at(hf, [POST]) as edited:
                edited.run(lambda: hf(IDS))
        torch.testing.assert_close(edited[POST], wanted, atol=1e-5, rtol=1e-5)


def test_an_edit_of_another_shape_is_refused(lm: LanguageModel) -> None:
    with (
        edit_at(lm.hf, {POST: lambda x: x[:, :1]}),
        pytest.raises(InputError, match=r"\(2, 1, 32\) for \(2, 4, 32\)"),
    ):
        lm.forward(IDS)


def test_the_result_of_an_edit_has_the_streams_type() -> None:
    from persona_probe.model import load_model
    from tests.model.tiny_models import checkpoint_of

    lm = load_model(checkpoint_of("gemma2"), dtype="bfloat16")
    with (
        edit_at(lm.hf, {POST: lambda x: x + torch.ones(32)}),
        capture_at(lm.hf, [POST]) as captured,
    ):
        captured.run(lambda: lm.hf(IDS))
    assert captured[POST].dtype == torch.bfloat16
