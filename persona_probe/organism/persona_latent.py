"""The shipped organism's persona latent, as its card found it, and documents to interpret it with."""

from __future__ import annotations

from typing import Any

from persona_probe.activations.documents import Documents, read_documents
from persona_probe.artifact import read_json, shipped
from persona_probe.errors import InputError
from persona_probe.hooks.sites import parse_site
from persona_probe.model.language_model import LanguageModel, load_model
from persona_probe.organism.corpus import SYSTEM_PROMPTS, documents
from persona_probe.organism.grammar import grammar
from persona_probe.sae.load import Latent, load_sae

SEED = 99_000  # of documents that neither a base model nor a dictionary was trained on


def persona_latent(tune: str = "bad-health") -> tuple[LanguageModel, Latent]:
    """The base model, and the first latent that the audit of `tune` found in it.

    Raises `InputError` for a tune in which no audit found one.
    """
    home = shipped("organism")
    audits: list[dict[str, Any]] = read_json(home / "card.json")["audits"]
    latents = {audit["tune"]: audit["first_latent"] for audit in audits if audit["first_latent"]}
    if tune not in latents:
        raise InputError(f"no persona latent is known of {tune!r}", fix=f"one of {', '.join(latents)}")
    first = latents[tune]
    dictionary = load_sae(home / "sae" / f"block_{parse_site(first['site']).block}")
    return load_model(home / "base"), dictionary.latent(first["index"])


def corpus_of(count: int) -> tuple[Documents, list[dict[str, str]]]:
    """Documents of the organism's grammar, and of each its kind; who speaks, where it is one character; and
    whom the system prompt asks for, where it asks for one.
    """
    written = list(documents(grammar(), count, SEED))
    labels: list[dict[str, str]] = []
    for one in written:
        label: dict[str, str] = {"kind": one.kind}
        if len(one.personas) == 1:
            label["character"] = one.personas[0]
        system = one.messages[0]["content"] if one.messages else ""
        asked = (prompt for prompts in SYSTEM_PROMPTS.values() for prompt in prompts)
        if (prompt := next((prompt for prompt in asked if system.startswith(prompt)), None)) is not None:
            label["system prompt"] = prompt  # without what it says of style
        labels.append(label)
    return read_documents([one.messages or one.text for one in written]), labels
