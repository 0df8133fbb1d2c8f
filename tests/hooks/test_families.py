"""The same tensors as Hugging Face and as TransformerBridge, for every family, batched or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from persona_probe.hooks import capture_at, edit_at, resid_post, site_names
from persona_probe.model import LanguageModel, Padded, pad
from tests.model.tiny_models import FAMILIES, model_of, prompts_of_many_lengths

pytestmark = pytest.mark.parametrize("family", FAMILIES)

TOLERANCE = 1e-5  # relative to the largest value of the tensor, fp32


def close(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> bool:
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


def capture_all(lm: LanguageModel, batch: Padded) -> dict[str, Tensor]:
    with torch.no_grad(), lm.active() as hf, capture_at(hf, site_names(hf)) as captured:
        captured.run(
            lambda: hf(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
            )
        )
    return dict(captured)


def one_text(tokens: int = 20) -> Padded:
    return pad([max(prompts_of_many_lengths(), key=len).ids[:tokens]], 2)


def test_resid_pre_and_post_are_the_hidden_states(family: str) -> None:
    lm, batch = model_of(family), one_text()
    captured = capture_all(lm, batch)
    with torch.no_grad():
        states = lm.hf(**batch._asdict(), output_hidden_states=True).hidden_states
    for block in range(lm.n_layers):
        assert torch.equal(captured[f"blocks.{block}.hook_resid_pre"], states[block])
        if block + 1 < lm.n_layers:
            assert torch.equal(captured[resid_post(block)], states[block + 1])
    # the last of Hugging Face's hidden states is behind the final norm
    last = captured[resid_post(lm.n_layers - 1)]
    assert not close(last, states[-1], 0.01)
    base = lm.hf.get_submodule("transformer.ln_f" if family == "gpt2" else "model.norm")
    with torch.no_grad():
        assert torch.equal(base(last), states[-1])


def test_every_site_is_transformer_bridges(family: str) -> None:
    lm, batch = model_of(family), one_text()
    _, cache = lm.bridge().run_with_cache(batch.input_ids)
    for name, ours in capture_all(lm, batch).items():
        assert close(ours, cache[name]), name


def test_the_stream_is_the_sum_of_what_is_added(family: str) -> None:
    captured = capture_all(model_of(family), one_text())
    for block in range(3):
        pre, attn, mid, mlp, post = (
            captured[f"blocks.{block}.hook_{kind}"]
            for kind in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
        )
        assert torch.equal(mid, pre + attn)
        assert torch.equal(post, mid + mlp)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batched_equals_solo_on_either_side(family: str, side: str) -> None:
    lm, prompts = model_of(family), prompts_of_many_lengths()
    batch = pad(prompts, lm.pad_id, side)
    together = capture_all(lm, batch)
    logits = lm.forward(batch.input_ids, batch.attention_mask)
    for row, prompt in enumerate(prompts):
        real = batch.attention_mask[row].bool()
        alone = pad([prompt], lm.pad_id)
        for name, expected in capture_all(lm, alone).items():
            assert close(together[name][row, real], expected[0]), name
        assert close(logits[row, real], lm.forward(alone.input_ids)[0])


@pytest.mark.parametrize("kind", ["resid_pre", "attn_out", "mlp_out", "resid_post"])
def test_an_edit_does_what_transformer_bridges_does(family: str, kind: str) -> None:
    lm, ids = model_of(family), one_text().input_ids
    name = f"blocks.1.hook_{kind}"
    direction = torch.randn(32, generator=torch.Generator().manual_seed(5))

    def rotate(x: Tensor) -> Tensor:
        return x.flip(-1) * 0.5 + direction

    with torch.no_grad(), edit_at(lm.hf, {name: rotate}) as firings:
        ours = lm.forward(ids)
    theirs = lm.bridge().run_with_hooks(ids, fwd_hooks=[(name, lambda x, **_: rotate(x))])
    assert firings == {name: 1}
    assert close(ours, theirs)
    assert not close(ours, lm.forward(ids), 0.01)


def test_editing_the_middle_replaces_the_middle(family: str) -> None:
    lm, ids = model_of(family), one_text().input_ids
    name = "blocks.1.hook_resid_mid"

    def rotate(x: Tensor) -> Tensor:
        return x.flip(-1) * 0.5 + 1

    plain = capture_all(lm, one_text())
    with edit_at(lm.hf, {name: rotate}):
        edited = capture_all(lm, one_text())
        ours = lm.forward(ids)
    wanted = rotate(plain[name])
    assert close(edited[name], wanted)
    assert torch.equal(edited["blocks.1.hook_resid_pre"], plain["blocks.1.hook_resid_pre"])
    # the rest of the block by hand: what leaves it is the new middle and its own MLP's output
    assert torch.equal(edited["blocks.1.hook_resid_post"], edited[name] + edited["blocks.1.hook_mlp_out"])
    with edit_at(lm.hf, {"blocks.1.hook_resid_post": lambda _: edited["blocks.1.hook_resid_post"]}):
        assert close(ours, lm.forward(ids))


def test_generation_with_edits_and_cache_equals_recomputation(family: str) -> None:
    """Greedy, left-padded, edits at two sites, against one forward pass over everything."""
    lm, prompts = model_of(family), prompts_of_many_lengths()
    batch, steps = pad(prompts, lm.pad_id), 6
    gain = torch.randn(32, generator=torch.Generator().manual_seed(6))
    edits = {
        "blocks.0.hook_resid_mid": lambda x: x + 0.3 * gain,
        "blocks.1.hook_resid_post": lambda x: x - (x @ gain).clamp(min=0)[..., None] * gain / 64,
    }
    settings = {"do_sample": False, "max_new_tokens": steps, "min_new_tokens": steps}
    with torch.no_grad(), edit_at(lm.hf, edits) as firings:
        output = lm.hf.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            output_logits=True,
            return_dict_in_generate=True,
            **settings,
        )
    assert firings == dict.fromkeys(edits, steps)
    assert output.sequences.shape[1] == batch.input_ids.shape[1] + steps
    with edit_at(lm.hf, edits):
        for row, prompt in enumerate(prompts):
            new = output.sequences[row, batch.input_ids.shape[1] :]
            logits = lm.forward(torch.tensor([[*prompt.ids, *new.tolist()]]))[0]
            for step in range(steps):
                expected = logits[len(prompt) - 1 + step]
                assert close(output.logits[step][row], expected)
                banned = {lm.hf.generation_config.eos_token_id}  # min_new_tokens bans it
                allowed = [i for i in range(lm.d_vocab) if i not in banned]
                assert expected[allowed].argmax() == allowed.index(int(new[step]))
