"""The models of one comparison: what each is called, and each in memory only while it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from persona_probe.errors import InputError
from persona_probe.model.checkpoint import Checkpoint, describe, has_tokenizer, is_adapter
from persona_probe.model.language_model import LanguageModel, load_model
from persona_probe.model.loading import read_tokenizer
from persona_probe.model.pair import load_pair
from persona_probe.model.sharing import CannotShareError

MERGE_BELOW = 100_000_000
"""Parameters. The adapter of a smaller model is merged into a copy: cheap, and twice as fast."""


@dataclass(frozen=True)
class SampledArm:
    """A model to be asked, with a fix or without."""

    name: str
    model: Path
    fix: Path | None = None


def arms_of(base: Path | None, tuned: Sequence[Path], fixes: Sequence[Path]) -> tuple[SampledArm, ...]:
    """Base, tuned models, and under each fix every tuned model (the base where there is none).

    A model is named by its folder, with as much of the path before it as tells it from the others.
    Raises `InputError` for a model or a fix that is given twice.
    """
    models = ([] if base is None else [base]) + list(tuned)
    names = dict(zip(models, _short_names(models), strict=True))
    fix_names = dict(zip(fixes, _short_names(fixes), strict=True))
    plain = [SampledArm(names[model], model) for model in models]
    fixed = [
        SampledArm(f"{names[model]} + {fix_names[fix]}", model, fix)
        for model in tuned or models
        for fix in fixes
    ]
    # a model's arms side by side, so that it is loaded once
    return tuple(sorted([*plain, *fixed], key=lambda arm: models.index(arm.model)))


def _short_names(paths: Sequence[Path]) -> list[str]:
    whole = [path.resolve() for path in paths]
    for path in whole:
        if whole.count(path) > 1:
            raise InputError(f"{path} is given twice", fix="name each model and each fix once")
    for depth in range(1, max((len(path.parts) for path in whole), default=0) + 1):
        names = ["/".join(path.parts[-depth:]) for path in whole]
        if len(set(names)) == len(names):
            return names
    return []


class Models:
    """Loads the models of a comparison one after the other; adapters share the base's weights."""

    def __init__(self, base: Path | None, *, device: str | None = None, dtype: str | None = None) -> None:
        self._options: dict[str, Any] = {"device": device or "auto", "dtype": dtype}
        self._base_path = base
        self._base: LanguageModel | None = None
        self._held: tuple[Path, LanguageModel] | None = None

    def __getitem__(self, path: Path) -> LanguageModel:
        """The model at `path`, ready to be asked. One other than the base is let go for the next.

        Raises what `load_model` raises.
        """
        if self._held is None or self._held[0] != path:
            self._held = None  # before the next is loaded, not after
            self._held = (path, merged_if_small(self._load(path)))
        return self._held[1]

    def _load(self, path: Path) -> LanguageModel:
        if path != self._base_path and not is_adapter(path):
            return load_model(path, **self._options)
        if self._base_path is None:
            return _with_own_tokenizer(load_model(path, **self._options))
        if self._base is None:
            self._base = load_model(self._base_path, **self._options)
        if path == self._base_path:
            return self._base
        try:
            adapted = load_pair(self._base, path, **self._options).tuned
        except CannotShareError:
            adapted = load_pair(self._base_path, path, **self._options).tuned
        return _with_own_tokenizer(adapted)


def checkpoint_of(path: Path, base: Path | None) -> Checkpoint:
    """The files that the model at `path` comes from; an adapter goes on `base` where that is given.

    Raises `MissingPathError` or `InputError` for a folder that is no model.
    """
    if base is not None and path != base and is_adapter(path):
        return replace(describe(base), adapter=str(path))
    return describe(path)


def merged_if_small(lm: LanguageModel) -> LanguageModel:
    """`lm` with its adapter in the weights where that costs little memory."""
    small = sum(parameter.numel() for parameter in lm.hf.parameters()) < MERGE_BELOW
    return lm.merged() if small else lm


def _with_own_tokenizer(lm: LanguageModel) -> LanguageModel:
    """With the one its adapter was saved with, if it was: its template is what it was trained on."""
    adapter = lm.checkpoint.adapter
    own = adapter is not None and has_tokenizer(adapter)
    return replace(lm, tokenizer=read_tokenizer(lm.checkpoint)) if own else lm
