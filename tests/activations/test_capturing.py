"""The capture's account: what was read, what was left out and why, and who is named when it goes wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from persona_probe.activations import ActivationStore, TokenMask, capture, read_documents
from persona_probe.errors import InputError, MismatchError, NonFiniteError, UnknownSiteError
from persona_probe.figures.norms import SHARES, quantiles
from persona_probe.hooks import edit_at
from persona_probe.model import ModelPair, load_model
from tests.activations.test_stream import conversations, slowly
from tests.model.tiny_models import MARKED_TEMPLATE, adapter_of, checkpoint_of, model_of, tiny_tokenizer

SITES = ["blocks.1.hook_resid_post", "blocks.0.hook_mlp_out"]
CHATS: list[Any] = [
    [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "I am well thank you"}],
    [{"role": "user", "content": "how are you"}],
    "the hello well",
]


def test_activations_are_the_models_own_document_after_document() -> None:
    base = model_of("llama")
    tuned = base.with_adapter(adapter_of("llama"))
    found = capture(ModelPair(base, tuned), CHATS, SITES, TokenMask("all"), sink_factor=None)
    texts = list(read_documents(CHATS).conversations(base))
    for name, lm in (("llama", base), ("llama-lora-0", tuned)):
        for site in SITES:
            expected: list[Tensor] = []
            for text in texts:
                counted = torch.tensor(TokenMask("all").select(text, base.special_ids))
                expected.append(slowly(lm, text, site)[counted])
            torch.testing.assert_close(
                found.activations(name, site), torch.cat(expected), atol=1e-4, rtol=1e-5
            )
    assert found.document.tolist() == sorted(found.document.tolist())
    with pytest.raises(InputError, match=r"captured are blocks\.1"):
        found.activations()
    with pytest.raises(InputError, match="there is llama, llama-lora-0"):
        found.activations("gpt2", SITES[0])


def test_every_token_is_accounted_for() -> None:
    """One loud token a document; special tokens, BOS among them; the first two skipped."""
    lm = model_of("llama")
    mask = TokenMask("prompt", skip_first=2)

    def shout(x: Tensor) -> Tensor:
        return torch.where(torch.arange(x.shape[1])[:, None] == 4, 1000 * x, x)

    with edit_at(lm.hf, {"blocks.0.hook_mlp_out": shout}):
        found = capture(lm, CHATS, ["blocks.0.hook_mlp_out"], mask, shard_tokens=5)
    texts = list(read_documents(CHATS).conversations(lm))
    counts = found.counts
    assert counts.conversations == 3 and counts.tokens == sum(map(len, texts))
    assert counts.covered == sum(text.prompt_length for text in texts)
    prompts = [text.ids[: text.prompt_length] for text in texts]
    special = [sum(i in lm.special_ids for i in ids) for ids in prompts]
    assert counts.special == sum(special) > counts.bos == sum(ids.count(0) for ids in prompts) == 2
    assert counts.skipped == 6
    loud = [len(ids) > 4 and ids[4] not in lm.special_ids for ids in prompts]
    plain = [[n for n, i in enumerate(ids) if i not in lm.special_ids] for ids in prompts]
    assert counts.sinks == sum(hit and 4 in kept[2:] for hit, kept in zip(loud, plain, strict=True)) > 0
    assert counts.covered == counts.special + counts.skipped + counts.sinks + counts.counted
    table = found.table
    assert table["counted"].sum() == counts.counted == len(found.document)
    assert table["sinks"].sum() == counts.sinks and table["special"].to_list() == special
    assert table["source"].to_list() == ["document 0", "document 1", "document 2"]
    assert set(table["model"]) == {"llama"} and set(table["site"]) == {"blocks.0.hook_mlp_out"}
    assert len(found.plot().data) == 1
    norms = found.activations().norm(dim=-1)
    for row in table.to_dicts():
        mine = norms[found.document == row["conversation"]]
        assert len(mine) == row["counted"]
        assert row["norm"] == (pytest.approx(float(mine.mean()), rel=1e-5) if len(mine) else None)


def test_a_conversation_without_a_counted_token_is_a_row_without_a_norm() -> None:
    found = capture(model_of("llama"), CHATS, SITES[:1], TokenMask("response"), shard_tokens=1)
    assert found.table["counted"].to_list()[1:] == [0, 0]
    assert found.table["norm"].to_list()[1:] == [None, None]
    with pytest.raises(InputError, match="the mask 'response' leaves no token"):
        capture(model_of("llama"), CHATS[1:], SITES, TokenMask("response"))


@pytest.mark.parametrize("shard_tokens", [1, 20, None])
def test_shards_change_nothing_but_rounding(shard_tokens: int | None) -> None:
    whole = capture(model_of("qwen2"), conversations(), SITES)
    found = capture(model_of("qwen2"), conversations(), SITES, shard_tokens=shard_tokens)
    assert torch.equal(found.document, whole.document) and torch.equal(found.position, whole.position)
    for site in SITES:
        torch.testing.assert_close(
            found.activations(0, site), whole.activations(0, site), atol=1e-4, rtol=1e-5
        )


def test_what_was_read_into_memory_can_be_saved(tmp_path: Path) -> None:
    found = capture(model_of("llama"), conversations(), SITES, shard_tokens=30)
    assert found.store is None
    store = found.save(tmp_path / "saved")
    straight = capture(
        model_of("llama"), conversations(), SITES, shard_tokens=30, out=tmp_path / "straight"
    ).store
    assert isinstance(straight, ActivationStore) and straight.digest == store.digest
    again = capture(model_of("llama"), conversations(), SITES, shard_tokens=30, out=tmp_path / "straight")
    assert torch.equal(again.activations(0, SITES[1]), found.activations(0, SITES[1]))
    assert again.table.equals(found.table) and again.counts == found.counts


def test_a_nan_names_model_site_and_line(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("hello\n\nthe hello there well thank you how are you\nwell\n")
    lm = model_of("llama")

    def poison(x: Tensor) -> Tensor:
        return torch.where(torch.arange(x.shape[1])[:, None] == 6, torch.nan, x)

    with edit_at(lm.hf, {SITES[0]: poison}), pytest.raises(NonFiniteError) as caught:
        capture(lm, read_documents(path), SITES[:1], shard_tokens=1, sink_factor=None)
    assert f"llama has a NaN or an infinity at {SITES[0]}, {path}, line 3, token 6" in str(caught.value)
    with edit_at(lm.hf, {SITES[0]: poison}), pytest.raises(NonFiniteError):
        capture(lm, read_documents(path), SITES[:1], out=tmp_path / "store", sink_factor=None)
    assert not (tmp_path / "store").exists(), "it would refuse the call put right"


def test_bad_calls_fail_before_anything_is_read(tmp_path: Path) -> None:
    lm = model_of("llama")
    with pytest.raises(UnknownSiteError, match="blocks 0 to 2"):
        capture(lm, CHATS, ["blocks.3.hook_resid_post"], out=tmp_path / "x")
    with pytest.raises(InputError, match="no site"):
        capture(lm, CHATS, [])
    with pytest.raises(InputError, match="no model"):
        capture([], CHATS, SITES)
    with pytest.raises(InputError, match="nothing to read"):
        capture(lm, [], SITES)
    with pytest.raises((InputError, TypeError), match="float16"):
        capture(lm, CHATS, SITES, dtype="float16")  # type: ignore[arg-type]
    other = load_model(checkpoint_of("llama"), tokenizer=tiny_tokenizer(MARKED_TEMPLATE + "!"))
    with pytest.raises(MismatchError, match="render document 0 to different token ids, first at position"):
        capture([lm, other], CHATS, SITES)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"not written by persona-probe.*thesis\.tex"):
        capture(lm, CHATS, SITES, out=tmp_path / "mine", overwrite=True)
    assert not (tmp_path / "x").exists()


def test_two_models_of_one_name_are_told_apart() -> None:
    lm = model_of("llama")
    found = capture([lm, lm], CHATS, SITES[:1])
    assert [model.name for model in found.models] == ["llama (0)", "llama (1)"]
    assert torch.equal(found.activations(0), found.activations(1))


def test_the_boxes_of_the_figure_are_quantiles() -> None:
    values = torch.rand(101, generator=torch.Generator().manual_seed(0)).double()
    expected = values.quantile(torch.tensor(SHARES, dtype=torch.float64))
    torch.testing.assert_close(torch.tensor(quantiles(values.tolist()), dtype=torch.float64), expected)
    assert quantiles([3.0]) == [3.0] * 5
