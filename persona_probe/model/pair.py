"""The two models that are compared: before the fine-tune and after it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.artifact import read_text
from persona_probe.errors import InputError, MismatchError
from persona_probe.model.checkpoint import has_tokenizer, is_adapter
from persona_probe.model.language_model import LanguageModel, load_model
from persona_probe.model.loading import read_tokenizer, resolve
from persona_probe.model.sharing import CannotShareError

TEMPLATES = ("base", "tuned")
"""Whose chat template `load_pair` can take; anything else is a file."""


@dataclass(frozen=True, eq=False)
class ModelPair:
    """A base model and one that was fine-tuned from it: same shape, same vocabulary."""

    base: LanguageModel
    tuned: LanguageModel

    def __post_init__(self) -> None:
        check_same_shape(self.base, self.tuned)
        check_same_vocabulary(self.base, self.tuned)

    def _repr_html_(self) -> str:
        base = self.base
        first, second = (cast("Tensor", one.hf.get_input_embeddings().weight) for one in (base, self.tuned))
        weights = "shared weights" if first.data_ptr() == second.data_ptr() else "weights of their own"
        facts = (
            f"{base.n_layers} blocks, d_model {base.d_model}, {base.d_vocab:,} logits; "
            f"{base.dtype} on {base.device}; {weights}"
        )
        rows = "".join(
            f"<tr><th>{name}</th><td>{escape(one.name)}</td>"
            f"<td><code>{escape(one.checkpoint.adapter or one.checkpoint.path)}</code></td></tr>"
            for name, one in (("base", base), ("tuned", self.tuned))
        )
        return f"<table>{rows}</table><p>{escape(facts)}</p>"


def load_pair(
    base: str | Path | PreTrainedModel | LanguageModel,
    tuned: str | Path | PreTrainedModel | LanguageModel,
    *,
    template: str | Path | None = None,
    **options: Any,
) -> ModelPair:
    """Load both models; one copy of the weights serves both when `tuned` is a LoRA adapter folder.

    The adapter goes on `base`, whatever base its own config names. An adapter that cannot share
    (trained biases, not LoRA) gets a base of its own. `template` settles which chat template both
    read: that of `base`, that of `tuned` (an adapter's own where it was saved with one), or a file's.
    `options` go to `load_model`, for both.

    Raises `MismatchError` where the two do not belong together, naming the first difference, and
    `InputError` for a template that is not there.
    """
    pair = _loaded(base, tuned, options)
    return pair if template is None else with_template(pair, template)


def with_template(pair: ModelPair, template: str | Path) -> ModelPair:
    """Both models with one tokenizer, the base's, and one chat template: `base`, `tuned`, or a file.

    Raises `InputError` where there is no such template.
    """
    tokenizer = copy.deepcopy(pair.base.tokenizer)
    if template not in TEMPLATES:
        text: Any = read_text(template)
    else:
        text = cast(
            "Any", pair.base.tokenizer if template == "base" else own_tokenizer(pair.tuned)
        ).chat_template
    if not text:
        raise InputError(
            f"the {template} model has no chat template",
            fix="choose the other model's, or write one to a file and name that",
        )
    tokenizer.chat_template = text
    return ModelPair(*(replace(lm, tokenizer=tokenizer) for lm in (pair.base, pair.tuned)))


def own_tokenizer(lm: LanguageModel) -> PreTrainedTokenizerBase:
    """The one that an adapter was saved with, if it was: its chat template is what it was trained on."""
    adapter = lm.checkpoint.adapter
    own = adapter is not None and has_tokenizer(adapter)
    return read_tokenizer(lm.checkpoint) if own else lm.tokenizer


def _loaded(
    base: str | Path | PreTrainedModel | LanguageModel,
    tuned: str | Path | PreTrainedModel | LanguageModel,
    options: dict[str, Any],
) -> ModelPair:
    # a base in memory is where it is: a map is for what is still to be loaded
    own: dict[str, Any] = {"device_map": None} if isinstance(base, LanguageModel) else {}
    first = load_model(base, **(options | own))
    adapter = None
    if isinstance(tuned, str | Path):  # the base that an adapter names is not asked for: it may be gone
        adapter = str(tuned) if is_adapter(tuned) else resolve(tuned).adapter
    if adapter is None:
        return ModelPair(first, load_model(tuned, **options))
    root = first.without_adapter()  # the base may itself be an adapter: an earlier checkpoint of the same run
    try:
        return ModelPair(first, root.with_adapter(adapter))
    except CannotShareError:
        if not isinstance(base, str | Path):
            raise
        return ModelPair(first, load_model(root.checkpoint.path, adapter=adapter, **options))


def check_same_shape(base: LanguageModel, tuned: LanguageModel) -> None:
    """Check that hook names and directions of one model fit the other. Raises `MismatchError`."""
    for what in ("n_layers", "d_model"):
        ours, theirs = getattr(base, what), getattr(tuned, what)
        if ours != theirs:
            raise MismatchError(
                f"base and tuned are not the same architecture: {what} is {ours} in {base.name} "
                f"and {theirs} in {tuned.name}",
                fix="pass the checkpoint that the tuned model was fine-tuned from",
            )


def check_same_vocabulary(base: LanguageModel, tuned: LanguageModel) -> None:
    """Check that a token id means the same to both. Raises `MismatchError` with the first difference."""
    if base.tokenizer is tuned.tokenizer:
        return
    ours, theirs = base.tokenizer.get_vocab(), tuned.tokenizer.get_vocab()
    if ours == theirs:
        return
    token = min(
        (token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)),
        key=lambda token: (ours.get(token, theirs.get(token, 0)), token),
    )
    raise MismatchError(
        f"base and tuned have different vocabularies ({len(ours)} and {len(theirs)} tokens); the "
        f"first difference: {token!r} is id {ours.get(token)} in the base and "
        f"{theirs.get(token)} in the tuned model",
        fix="copy the base's tokenizer files into the tuned folder (in Python: load_pair(..., tokenizer=))",
    )
