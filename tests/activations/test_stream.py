from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from persona_probe.activations import TokenMask, sinks, stream
from persona_probe.activations.stream import buckets, joined
from persona_probe.errors import InputError, NonFiniteError, UnknownSiteError
from persona_probe.hooks import capture_at, edit_at
from persona_probe.model import LanguageModel, Rendered, load_model
from tests.model.tiny_models import adapter_of, checkpoint_of, model_of

SITES = ["blocks.1.hook_resid_post", "blocks.0.hook_mlp_out"]


def conversations(count: int = 9) -> list[Rendered]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for number in range(count):
        length = int(torch.randint(3, 25, (), generator=generator))
        ids = torch.randint(4, 300, (length,), generator=generator).tolist()
        prompt = 1 + number % (length - 1)
        made.append(Rendered(tuple(ids), tuple(i >= prompt for i in range(length)), prompt))
    return made


def slowly(lm: LanguageModel, conversation: Rendered, site: str) -> Tensor:
    """One conversation by itself, the whole forward pass, nothing padded."""
    with torch.no_grad(), capture_at(lm.hf, [site], stop_after_deepest=False) as captured:
        captured.run(lambda: lm.hf(torch.tensor([conversation.ids])))
    return captured[site][0]


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_every_counted_token_once_as_read_alone(batch_tokens: int) -> None:
    base = model_of("gpt2")
    models = [base, base.with_adapter(adapter_of("gpt2"))]
    texts, mask = conversations(), TokenMask("answer", skip_first=1)
    found: dict[tuple[int, int], dict[tuple[int, str], Tensor]] = {}
    batches = 0
    for chunk in stream(models, texts, SITES, mask, batch_tokens=batch_tokens, sink_factor=None):
        batches += 1
        assert set(chunk.activations) == {(m, site) for m in (0, 1) for site in SITES}
        for token, place in enumerate(zip(chunk.document.tolist(), chunk.position.tolist(), strict=True)):
            assert place not in found
            found[place] = {key: value[token] for key, value in chunk.activations.items()}
    assert (batches == 1) == (batch_tokens == 4096)
    expected = {
        (document, position)
        for document, text in enumerate(texts)
        for position, counted in enumerate(mask.select(text, base.special_ids))
        if counted
    }
    assert found.keys() == expected
    for document, text in enumerate(texts):
        for number, lm in enumerate(models):
            for site in SITES:
                alone = slowly(lm, text, site)
                for (of, position), values in found.items():
                    if of == document:
                        torch.testing.assert_close(
                            values[number, site], alone[position], atol=1e-4, rtol=1e-5
                        )


@pytest.mark.parametrize("tokens", [1, 40, 10**6])
def test_chunks_put_together_hold_the_same_in_the_same_order(tokens: int) -> None:
    every = list(stream([model_of("llama")], conversations(), SITES, TokenMask("all"), batch_tokens=24))
    found = list(joined(every, tokens))
    assert all(len(one.document) >= tokens for one in found[:-1]) and list(joined([], tokens)) == []
    assert len(found) == {1: len(every), 10**6: 1}.get(tokens, len(found)) and len(every) > 3
    parts = [lambda one: one.document, lambda one: one.position, lambda one: one.activations[0, SITES[0]]]
    for part in parts:
        assert torch.equal(torch.cat([part(one) for one in found]), torch.cat([part(one) for one in every]))
    assert sum(one.sinks for one in found) == sum(one.sinks for one in every)
    dropped = [[place for one in chunks for place in one.sink_tokens] for chunks in (found, every)]
    assert dropped[0] == dropped[1]


def test_the_same_bits_every_time_and_for_the_same_model_twice() -> None:
    lm = load_model(checkpoint_of("llama"))
    runs = [list(stream([lm, lm], conversations(), SITES, TokenMask("all"))) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first.document, second.document)
        for site in SITES:
            assert torch.equal(first.activations[0, site], second.activations[0, site])
            assert torch.equal(first.activations[0, site], first.activations[1, site])


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 200))
def test_buckets_hold_everything_once_and_fit(lengths: list[int], budget: int) -> None:
    groups = buckets(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= budget
    widths = [lengths[i] for group in groups for i in group]
    assert widths == sorted(lengths, reverse=True)


def test_sinks_of_the_base_are_left_out_of_every_model() -> None:
    base, tuned = model_of("llama"), load_model(checkpoint_of("llama"))
    texts = conversations(4)

    def shout(x: Tensor) -> Tensor:
        return torch.cat([x[:, :2] * torch.tensor([1.0, 1000.0])[:, None], x[:, 2:]], dim=1)

    with edit_at(base.hf, {"blocks.0.hook_resid_post": shout}):
        # the tuned model is not loud anywhere, and loses the same tokens
        chunks = list(stream([base, tuned], texts, ["blocks.0.hook_resid_post"], TokenMask("all")))
    read = {
        place
        for chunk in chunks
        for place in zip(chunk.document.tolist(), chunk.position.tolist(), strict=True)
    }
    assert read == {(d, p) for d, text in enumerate(texts) for p in range(len(text)) if p != 1}
    assert sum(chunk.sinks for chunk in chunks) == len(texts)
    for chunk in chunks:
        assert len(chunk.activations[1, "blocks.0.hook_resid_post"]) == len(chunk.document)
    norms = slowly(tuned, texts[0], "blocks.0.hook_resid_post").norm(dim=-1)
    assert not sinks(norms).any()
    with edit_at(base.hf, {"blocks.0.hook_resid_post": shout}):
        kept = list(stream([base], texts, ["blocks.0.hook_resid_post"], TokenMask(), sink_factor=None))
    assert sum(chunk.sinks for chunk in kept) == 0


def test_low_precision_is_widened() -> None:
    lm = load_model(checkpoint_of("qwen2"), dtype="bfloat16")
    (chunk,) = stream([lm], conversations(3), SITES, TokenMask("all"))
    assert {value.dtype for value in chunk.activations.values()} == {torch.float32}


def test_a_nan_is_named() -> None:
    good, bad = load_model(checkpoint_of("llama")), load_model(checkpoint_of("llama"))

    def poison(x: Tensor) -> Tensor:
        return torch.where(torch.arange(x.shape[1])[:, None] == 22, torch.nan, x)

    texts = conversations()
    hit = [number for number, text in enumerate(texts) if len(text) > 22]
    assert hit
    with (
        edit_at(bad.hf, {"blocks.1.hook_resid_post": poison}),
        pytest.raises(NonFiniteError) as caught,
    ):
        list(stream([good, bad], texts, SITES, TokenMask("all")))
    message = str(caught.value)
    assert "blocks.1.hook_resid_post" in message and "token 22" in message
    assert any(f"conversation {number}," in message for number in hit)
    with edit_at(bad.hf, {"blocks.1.hook_resid_post": poison}):
        early = TokenMask("all", first_k=5)
        assert list(stream([good, bad], texts, SITES, early, sink_factor=None))


def test_bad_calls_fail_before_anything_is_read() -> None:
    lm = model_of("llama")
    with pytest.raises(UnknownSiteError, match="blocks 0 to 2"):
        stream([lm], conversations(), ["blocks.3.hook_resid_post"], TokenMask())
    with pytest.raises(InputError, match="leaves no token"):
        stream([lm], [Rendered((5, 6), (False, False), 2)], SITES, TokenMask("response"))
    for models, texts in (([], conversations()), ([lm], [])):
        with pytest.raises(InputError, match="nothing to read"):
            stream(models, texts, SITES, TokenMask())
    for asked in (0, -5):
        with pytest.raises(InputError, match=f"batch_tokens must be at least 1, got {asked}"):
            stream([lm], conversations(), SITES, TokenMask(), batch_tokens=asked)
    with pytest.raises(InputError, match="no site"):
        stream([lm], conversations(), [], TokenMask())
