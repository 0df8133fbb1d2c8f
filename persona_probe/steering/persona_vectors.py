"""Persona vectors as their authors publish them (Chen et al. 2025): traits in JSON, vectors in `.pt`.

A trait file holds pairs of system prompts that ask for the trait and for its opposite, and questions
on which it shows. A vector file holds one difference of means per layer, `[layers + 1, d_model]`, in
the order of Hugging Face's hidden states: row 0 is the embedding, row i + 1 the output of block i, but
the last row is read *after the final norm*, and belongs to no place in the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from persona_probe.artifact import StrPath, read_json
from persona_probe.artifact.records import nearest
from persona_probe.errors import InputError, MismatchError, MissingPathError, NonFiniteError
from persona_probe.hooks.sites import Site, check_site, parse_site
from persona_probe.model.language_model import LanguageModel
from persona_probe.steering.target import Target, direction


@dataclass(frozen=True)
class Trait:
    """What to ask for, and on which questions. Raises `InputError` for one without either."""

    name: str
    instructions: tuple[tuple[str, str], ...]
    """Pairs of system prompts: one asks for the trait, the other for its opposite."""
    questions: tuple[str, ...]
    eval_prompt: str | None = None
    """The prompt of its judge, with places for {question} and {answer}."""

    def __post_init__(self) -> None:
        if not self.instructions or not self.questions:
            raise InputError(f"the trait {self.name!r} needs instruction pairs and questions")


def load_trait(path: StrPath) -> Trait:
    """A published trait file: `{"instruction": [{"pos", "neg"}], "questions": [...], "eval_prompt"}`.

    Raises `MissingPathError`, and `InputError` naming what is malformed.
    """
    found = read_json(path)
    entries = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    pairs, questions = entries.get("instruction"), entries.get("questions")
    if not (isinstance(pairs, list) and all(_is_pair(pair) for pair in cast("list[object]", pairs))):
        raise InputError(f'{path}: "instruction" must be a list of {{"pos": text, "neg": text}}')
    if not (isinstance(questions, list) and all(isinstance(q, str) for q in cast("list[object]", questions))):
        raise InputError(f'{path}: "questions" must be a list of texts')
    prompt = entries.get("eval_prompt")
    return Trait(
        Path(path).stem,
        tuple((pair["pos"], pair["neg"]) for pair in cast("list[dict[str, str]]", pairs)),
        tuple(cast("list[str]", questions)),
        prompt if isinstance(prompt, str) else None,
    )


def _is_pair(pair: object) -> bool:
    entries = cast("dict[str, object]", pair) if isinstance(pair, dict) else {}
    return all(isinstance(entries.get(name), str) for name in ("pos", "neg"))


@dataclass(frozen=True, eq=False)
class PersonaVectors:
    """One direction per layer, read from a file."""

    rows: Float[Tensor, "row d_model"]
    """As in the file, in fp32."""
    path: str

    @property
    def n_layers(self) -> int:
        return len(self.rows) - 1

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that there is a row for, in the order of the rows."""
        inner = (Site(block, 4).name for block in range(self.n_layers - 1))
        return (Site(0, 0).name, *inner)

    def at(self, site: str) -> Float[Tensor, " d_model"]:
        """The row of a site: `resid_post` of a block, or `resid_pre` (what the block before it left).

        Raises `InputError` for a site that has none, the last block's output among them: the file
        has that after the final norm.
        """
        place = parse_site(site)
        row = {"hook_resid_pre": place.block, "hook_resid_post": place.block + 1}.get(place.kind)
        if row is None or row > self.n_layers:
            raise InputError(f"{self.path} has no vector for {site}", fix=f"one of {', '.join(self.sites)}")
        if row == self.n_layers:
            raise InputError(
                f"the last row of {self.path} is read after the final norm, and is no vector of {site}",
                fix=f"an earlier layer, such as {self.sites[-1]}",
            )
        return self.rows[row]

    def target(self, site: str) -> Target:
        """The row of a site, to steer by."""
        return direction(self.at(site), label=f"{Path(self.path).stem} of {site}")

    def check_fits(self, lm: LanguageModel) -> None:
        """Raise `MismatchError` unless the vectors are of this width and number of layers."""
        if self.rows.shape[1] != lm.d_model or self.n_layers != lm.n_layers:
            raise MismatchError(
                f"{self.path} holds vectors of {self.n_layers} layers of width {self.rows.shape[1]}, "
                f"{lm.name} has {lm.n_layers} of {lm.d_model}",
                fix="use vectors made from this model",
            )
        for site in self.sites:
            check_site(lm.hf, site)


def load_persona_vectors(path: StrPath, lm: LanguageModel | None = None) -> PersonaVectors:
    """Read a `.pt` file; nothing in it can run (`weights_only`). With `lm`, check that it fits.

    Raises `MissingPathError`, `InputError` for a file that is no tensor `[layers + 1, d_model]`,
    `NonFiniteError`, `MismatchError`.
    """
    file = Path(path)
    if not file.is_file():
        raise MissingPathError(f"there is no file {file}", fix=nearest(file))
    try:
        found: object = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"{path} cannot be read as weights alone: {type(error).__name__}",
            fix="a .pt file that holds one tensor [layers + 1, d_model]",
        ) from error
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) < 3 or not found.is_floating_point():
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"{path} must hold a tensor [layers + 1, d_model], got {shape}")
    rows = found.detach().float()
    if not bool(rows.isfinite().all()):
        raise NonFiniteError(f"{path} holds NaN or infinite numbers")
    vectors = PersonaVectors(rows, str(path))
    if lm is not None:
        vectors.check_fits(lm)
    return vectors
