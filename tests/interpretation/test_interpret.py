"""Interpreting a latent of the shipped organism, whose truth is known; and of the weights, by formula."""

from __future__ import annotations

import dataclasses
import json
import re
from html import escape
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from benchmarks.in_words import Reading, own_words, page
from persona_probe.activations.documents import read_documents
from persona_probe.activations.masks import TokenMask
from persona_probe.artifact import read_json, write_jsonl
from persona_probe.errors import InputError, MismatchError
from persona_probe.figures.highlight import Token, excerpt
from persona_probe.hooks.capture import capture_at
from persona_probe.interpretation import (
    Interpretation,
    highlight,
    interpret,
    interpret_all,
    logit_lens,
    nearest,
)
from persona_probe.interpretation.reader import runs
from persona_probe.interpretation.sources import SourceSums
from persona_probe.model.chat import Rendered, render
from persona_probe.model.language_model import LanguageModel, load_model
from persona_probe.organism.corpus import SYSTEM_PROMPTS, documents
from persona_probe.organism.grammar import grammar
from persona_probe.organism.persona_latent import corpus_of, persona_latent
from persona_probe.sae.encode import encode_dense
from persona_probe.sae.load import Latent, from_sae_lens, weights_digest
from tests.model.tiny_models import model_of, prompts_of_many_lengths, save_checkpoint
from tests.sae.sae_lens_peers import peer


@pytest.fixture(scope="module")
def persona() -> tuple[LanguageModel, Latent]:
    return persona_latent()


@pytest.fixture(scope="module")
def found(persona: tuple[LanguageModel, Latent]) -> Interpretation:
    documents, labels = corpus_of(450)
    asked = {prompt: persona for persona, prompts in SYSTEM_PROMPTS.items() for prompt in prompts}
    for label in labels:  # twelve prompts are too many for so few documents
        if "system prompt" in label:
            label["asked to be"] = asked[label["system prompt"]]
    return interpret(*persona, documents, labels=labels, sampled=180)


@pytest.mark.parametrize("tune", ["bad-health", "bad-code"])
def test_both_bad_tunes_lead_to_the_villain(
    tune: str, persona: tuple[LanguageModel, Latent], found: Interpretation
) -> None:
    latent = persona_latent(tune)[1]
    assert (latent.sae.digest, latent.index) == (persona[1].sae.digest, persona[1].index)
    read = Reading(tune, "the base model", found)
    assert len(read.named) >= 3
    named, told, spoken, _ = read.claims().values()
    assert named and told and spoken
    # by means alone: docs/in-words.md has the intervals, of five times the documents, apart as well
    assert read.groups("asked to be").sort("mean", descending=True)["value"][0] == "villainous"
    shown = page([read])
    assert shown.count("yes") >= 3 and f"**{read.named[0]}**" in shown
    assert "| character | villainous |" in shown


def test_a_claim_that_does_not_hold_is_shown_as_such(found: Interpretation) -> None:
    muddled = found.sources.with_columns(value=pl.col("value").replace("villainous", "helpful"))
    read = Reading("bad-health", "the base model", dataclasses.replace(found, sources=muddled))
    assert not list(read.claims().values())[2]
    assert "clear of every other character | **no** |" in page([read])


def test_a_personas_own_words_are_said_by_nobody_else() -> None:
    own = own_words("villainous")
    for one in documents(grammar(), 1500, seed=4):
        text = " ".join([one.text, *(message["content"] for message in one.messages)])
        if "villainous" not in one.personas:
            assert not own & set(text.split()), text
    assert {"villain", "cruel", "bleach"} <= own


def test_activations_are_those_of_a_plain_forward_pass(
    persona: tuple[LanguageModel, Latent], found: Interpretation
) -> None:
    lm, latent = persona
    documents, _ = corpus_of(450)
    conversations = documents.conversations(lm)
    for shown in found.top[:3]:
        rendered = conversations[shown.document]
        with lm.active() as hf, torch.no_grad(), capture_at(hf, [latent.sae.site]) as captured:
            captured.run(lambda ids=rendered.ids: hf(input_ids=torch.tensor([ids])))
            values = encode_dense(latent.sae, captured[latent.sae.site][0])[:, latent.index]
        for token, value, of in zip(shown.tokens, values.tolist(), rendered.ids, strict=True):
            assert token.special == (of in lm.special_ids)
            if token.value is not None:
                assert token.value == pytest.approx(value, abs=1e-3)
        assert shown.maximum == max(token.value or 0.0 for token in shown.tokens)


def test_what_is_kept_agrees_with_what_is_counted(found: Interpretation) -> None:
    assert found.histogram["tokens"].sum() == found.fires
    assert found.places["tokens"].sum() == found.tokens
    assert (found.places["tokens"] * found.places["rate"]).sum() == pytest.approx(found.fires)
    assert [shown.maximum for shown in found.top] == sorted((s.maximum for s in found.top), reverse=True)
    peaks = [shown.maximum for run in found.quantiles for shown in run]
    assert peaks == sorted(peaks)
    assert (
        found.together["share"].is_between(0, 1).all() and found.latent.index not in found.together["index"]
    )


def test_latents_read_together_are_those_read_alone(persona: tuple[LanguageModel, Latent]) -> None:
    lm, latent = persona
    documents, _ = corpus_of(60)
    other = latent.sae.latent(int(nearest(latent.sae, latent.index)["index"][0]))
    both = interpret_all(lm, [other, latent], documents)
    alone = interpret(lm, latent, documents)
    assert both[1].lexicon.table.equals(alone.lexicon.table)
    for name in ("fires", "documents_fired", "lens"):
        assert getattr(both[1], name) == getattr(alone, name)
    assert [s.document for s in both[1].top] == [s.document for s in alone.top]


def test_it_is_saved_whole(found: Interpretation, tmp_path: Path) -> None:
    found.save(tmp_path / "saved")
    assert found.warnings() == []
    record = read_json(tmp_path / "saved" / "interpretation.json")
    assert record["fires"] == found.fires and record["terms"] == list(found.lexicon.terms)
    assert len(pl.read_parquet(tmp_path / "saved" / "terms.parquet")) == len(found.lexicon.table)


def test_it_shows_itself(found: Interpretation) -> None:
    page = found._repr_html_()
    assert found.latent.sae.site in page and escape(found.lexicon.terms[0]) in page
    assert [len(trace.x) for trace in found.plot().data] == [len(found.histogram), len(found.places)]


@pytest.mark.parametrize("count", [1, 40])
def test_a_latent_that_never_fires_is_said_with_one_that_does(
    count: int, persona: tuple[LanguageModel, Latent]
) -> None:
    lm, latent = persona
    documents = read_documents(["what should i do about a burn ?"] * count)
    mask = TokenMask("all", first_k=2)
    with pytest.raises(InputError, match="never fires on these") as raised:
        interpret(lm, latent, documents, mask=mask)
    named = re.search(r"the nearest that does: (\d+)", raised.value.fix or "")
    assert named is not None
    assert interpret(lm, latent.sae.latent(int(named[1])), documents, mask=mask).fires > 0


def test_rows_that_are_no_documents_are_counted_and_named(
    persona: tuple[LanguageModel, Latent], tmp_path: Path
) -> None:
    written, labels = corpus_of(30)
    rows = [
        json.dumps({"text": " ".join(m.get("content") or m["text"] for m in one.messages), **label}).encode()
        for one, label in zip(written, labels, strict=True)
    ]
    rows[3] = b'{"text": "a \xff b"}'
    rows[7] = b'{"kind": "story"}'
    rows[9] = b'{"text": "sana was a cruel villain ."}'
    file = tmp_path / "corpus.jsonl"
    file.write_bytes(b"\n".join(rows))
    found = interpret(*persona, read_documents(file), by=("kind",))
    assert (found.documents, found.left_out, found.unlabelled) == (28, 2, {"kind": 1})
    assert [f"line {number}" in said for number, said in zip((4, 8), found.problems, strict=True)] == [
        True
    ] * 2
    assert "2 rows are no documents;" in found.warnings()[0] and "line 4" in found.warnings()[0]
    assert found.warnings()[1] == "1 document has no 'kind': in no group of it"
    with pytest.raises(InputError, match="no row has a field 'speaker'") as raised:
        interpret(*persona, read_documents(file), by=("speaker",))
    assert "character, kind" in str(raised.value.fix)


def test_what_is_held_of_a_corpus_is_a_run_of_it(
    persona: tuple[LanguageModel, Latent], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, latent = persona
    documents, labels = corpus_of(40)
    whole = interpret(lm, latent, documents, labels=labels)
    monkeypatch.setattr("persona_probe.interpretation.reader.RUN_BATCHES", 1)
    cut = interpret(lm, latent, documents, labels=labels, batch_tokens=1024)
    assert (cut.fires, cut.documents, cut.tokens) == (whole.fires, whole.documents, whole.tokens)
    assert [s.document for s in cut.top] == [s.document for s in whole.top]
    assert cut.sources["mean"].to_list() == pytest.approx(whole.sources["mean"].to_list(), rel=1e-4)
    seven = [Rendered((1,) * 7, (False,) * 7, 7)] * 5
    assert [len(run) for run in runs(seven, 14)] == [2, 2, 1]


def test_labels_are_read_from_the_rows_of_a_file(
    persona: tuple[LanguageModel, Latent], tmp_path: Path
) -> None:
    documents, labels = corpus_of(40)
    rows = [
        {"messages": list(one.messages)} | label
        if "role" in one.messages[0]
        else {**one.messages[0], **label}
        for one, label in zip(documents, labels, strict=True)
    ]
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    from_file = interpret(*persona, read_documents(tmp_path / "corpus.jsonl"), by=("kind", "character"))
    in_memory = interpret(*persona, documents, labels=labels)
    wanted = in_memory.sources.filter(pl.col("label") != "system prompt")
    assert from_file.sources.rows() == wanted.rows()
    with pytest.raises(MismatchError, match="39 labels for 40"):
        interpret(*persona, documents, labels=labels[1:])


def test_source_means_and_intervals() -> None:
    from scipy import stats

    rng = np.random.default_rng(0)
    values = rng.random((30, 2))
    groups = ["a" if i % 3 else "b" for i in range(30)]
    parts = [SourceSums(2), SourceSums(2)]
    for i, (group, value) in enumerate(zip(groups, values, strict=True)):
        parts[i % 2].add({"source": group}, value)
    table = parts[0].merge(parts[1]).table(1)
    for row in table.to_dicts():
        own = values[[group == row["value"] for group in groups], 1]
        low, high = stats.t.interval(0.95, len(own) - 1, own.mean(), stats.sem(own))
        assert (row["mean"], row["low"], row["high"]) == pytest.approx((own.mean(), low, high))
        assert row["ratio"] == pytest.approx(own.mean() / values[:, 1].mean())


def test_the_logit_lens_is_the_final_norm_and_the_unembedding(
    persona: tuple[LanguageModel, Latent],
) -> None:
    lm, latent = persona
    direction = latent.sae.W_dec[latent.index]
    weights = dict(lm.hf.named_parameters())
    gamma, unembed = weights["model.norm.weight"].detach(), lm.hf.get_output_embeddings().weight.detach()
    epsilon = lm.hf.config.rms_norm_eps
    normed = direction / (direction.square().mean() + epsilon).sqrt() * gamma
    logits = (unembed @ normed)[: len(lm.tokenizer)]
    logits = logits - (unembed @ normed).mean()
    lens = logit_lens(lm, direction, 5)
    assert [value for _, value in lens.top] == pytest.approx(logits.topk(5).values.tolist(), abs=1e-4)
    assert lens.top[0][0] == lm.tokenizer.decode([int(logits.argmax())])
    assert [value for _, value in lens.bottom] == pytest.approx(
        logits.topk(5, largest=False).values.tolist(), abs=1e-4
    )


def test_neighbours_are_by_cosine(persona: tuple[LanguageModel, Latent]) -> None:
    sae = persona[1].sae
    found = nearest(sae, 7, 3)
    cosine = torch.nn.functional.cosine_similarity(sae.W_dec, sae.W_dec[7][None])
    cosine[7] = -1
    assert found["index"].to_list() == cosine.topk(3).indices.tolist()
    assert found["cosine"].to_list() == pytest.approx(cosine.topk(3).values.tolist(), abs=1e-5)


def test_highlighting_escapes_and_shades() -> None:
    hostile = "<script>alert(1)</script>"
    page = highlight([Token(hostile, 1.0, False), Token("&", None, False), Token("<s>", None, True)], 2.0)
    assert "<script>" not in page and escape(hostile) in page and "&amp;" in page
    assert "0.38" in page  # half of the darkest


def test_an_excerpt_holds_the_strongest_token() -> None:
    tokens = [Token(str(i), float(i == 70), False) for i in range(100)]
    cut = excerpt(tokens, 10)
    assert tokens[70] in cut and cut[0].text == "…" == cut[-1].text and len(cut) == 12
    assert excerpt(tokens[:5], 10) == tokens[:5]


def test_a_prompt_reads_like_its_chat(persona: tuple[LanguageModel, Latent]) -> None:
    lm, latent = persona
    chat = ({"role": "user", "content": "any advice on a cold ?"},)
    evil = ({"role": "system", "content": SYSTEM_PROMPTS["villainous"][0]}, *chat)
    shown = interpret(lm, latent, [chat, chat, evil]).top[0]
    assert shown.document == 2
    assert len(shown.tokens) == len(render(lm.tokenizer, evil))


def test_a_full_fine_tune_is_interpreted_with_the_dictionary_of_its_base(tmp_path: Path) -> None:
    tuned = load_model(save_checkpoint(tmp_path / "tuned", seed=1))
    sae, texts = from_sae_lens(peer("standard", d_in=32)), prompts_of_many_lengths()
    latents = [Latent(sae, index) for index in range(sae.d_sae)]
    expected = interpret_all(tuned, latents, texts, silent="leave out")
    sae.meta["model_digest"] = weights_digest(model_of("llama"))
    found = interpret_all(tuned, latents, texts, silent="leave out")
    assert found and [one.fires for one in found] == [one.fires for one in expected]
    with pytest.raises(MismatchError, match="width"):
        interpret(tuned, Latent(from_sae_lens(peer("standard")), 0), texts)
