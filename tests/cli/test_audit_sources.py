"""What an audit may be given besides folders: a chat template of either model, a published dictionary."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from persona_probe.model import load_model, load_pair, render
from tests.auditing.planted import Planted
from tests.cli.test_audit import copy_of, refused, run, without_template, words


@pytest.mark.parametrize("own", ["full", "adapter"])
def test_a_template_settles_another_rendering(own: str, organism: Planted, tmp_path: Path) -> None:
    tuned = copy_of(organism.base if own == "full" else organism.tuned, tmp_path / own)
    tokenizer = AutoTokenizer.from_pretrained(organism.base)
    plain = tokenizer.chat_template
    tokenizer.chat_template = plain.replace("<{{ m['role'] }}>", "<assistant>")
    tokenizer.save_pretrained(tuned)
    (tmp_path / "plain.jinja").write_text(plain)
    rendered = {
        choice: load_pair(organism.base, tuned, template=choice)
        for choice in ("base", "tuned", tmp_path / "plain.jinja")
    }
    asked = [{"role": "user", "content": "what do you say"}]
    ids = {choice: render(pair.base.tokenizer, asked).ids for choice, pair in rendered.items()}
    assert all(pair.base.tokenizer is pair.tuned.tokenizer for pair in rendered.values())
    assert ids["base"] == ids[tmp_path / "plain.jinja"] != ids["tuned"]
    assert render(load_model(organism.base).tokenizer, asked).ids == ids["base"]


def test_a_template_of_the_command(organism: Planted, tmp_path: Path) -> None:
    bare = without_template(organism, tmp_path)
    lent = words(
        organism, tmp_path / "out", "--template", "tuned", "--limit", "4", base=bare, tuned=organism.base
    )
    assert run(lent).exit_code == 0
    out = tmp_path / "none"
    refused(words(organism, out, "--template", "base", base=bare), out, "the base model has no chat template")
    refused(words(organism, out, "--template", "tuend"), out, "--template: there is no tuend")


def test_a_dictionary_that_no_registry_has(organism: Planted, tmp_path: Path) -> None:
    out = tmp_path / "out"
    release = "gemma-scope-2b-pt-res-canonical"
    refused(words(organism, out, sae=f"{release[:-1]}/layer_1"), out, "--sae: there is no folder", release)
    refused(
        words(organism, out, sae=f"{release}/layer_1/width_3k"), out, "has no dictionary 'layer_1/width_3k'"
    )
