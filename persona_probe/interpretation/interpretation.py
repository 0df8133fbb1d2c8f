"""The result of interpreting a latent: what it fires on, says, resembles, and comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl

from persona_probe.artifact import atomic_folder, versions, write_json
from persona_probe.figures.cells import Row
from persona_probe.figures.firing import firing
from persona_probe.figures.highlight import Token
from persona_probe.figures.latent_card import latent_card
from persona_probe.interpretation.lexicon import Lexicon
from persona_probe.interpretation.logit_lens import Lens
from persona_probe.sae.load import Latent

if TYPE_CHECKING:
    import plotly.graph_objects as go

KNOWN_BY = ("interpretation.json", "terms.parquet")
"""The files by which a saved interpretation is known."""


class Shown(NamedTuple):
    """One document with the latent's activations on it."""

    document: int
    """Its number in the corpus."""
    place: str
    """Where it stands: file and line where there is one."""
    maximum: float
    tokens: tuple[Token, ...]

    @property
    def text(self) -> str:
        """Without special tokens."""
        return "".join(token.text for token in self.tokens if not token.special)


@dataclass(frozen=True, eq=False)
class Interpretation:
    """What is known of one latent from a corpus and from the weights. Shown in a notebook as a card."""

    latent: Latent
    model: str
    documents: int
    """Read."""
    documents_fired: int
    """Documents with a token at which the latent fires."""
    tokens: int
    """Counted."""
    fires: int
    """Counted tokens at which the latent fires."""
    top: tuple[Shown, ...]
    """The documents on which it is strongest."""
    quantiles: tuple[tuple[Shown, ...], ...]
    """Documents on which it fires, from every quantile of their maxima, the weakest first."""
    histogram: pl.DataFrame
    """`low`, `high`, `tokens`: positive activations by size."""
    places: pl.DataFrame
    """`first`, `last`, `tokens`, `rate`: how often it fires, by place in the document."""
    sources: pl.DataFrame
    """Groups of documents that drive it (see `sources`); empty without labels."""
    lens: Lens
    neighbours: pl.DataFrame
    """`index`, `cosine` of decoder rows."""
    together: pl.DataFrame
    """`index`, `share` (of the tokens at which this latent fires, those at which the other does too),
    `lift` (that share over the other's firing rate); on a sample of the documents."""
    lexicon: Lexicon
    held_out: tuple[Shown, ...] = ()
    """Documents of none of the above, on which an explanation is to prove itself: first those on which it
    fires strongly, then as many others."""
    left_out: int = 0
    """Rows of the corpus that are no document (bytes that are no UTF-8, a field that is missing)."""
    problems: tuple[str, ...] = ()
    """The first of them, each with its file and line."""
    unlabelled: Mapping[str, int] = field(default_factory=dict[str, int])
    """Documents without a label that was asked for: in no group of it."""
    effect: Row | None = None
    """What it does, where that is known (see `with_effect`)."""
    dose: tuple[Row, ...] = ()

    @property
    def rate(self) -> float:
        """Share of the counted tokens at which it fires."""
        return self.fires / self.tokens

    def warnings(self) -> list[str]:
        """What of the corpus could not be used, with places."""
        found: list[str] = []
        if n := self.left_out:
            rows = "1 row is no document" if n == 1 else f"{n:,} rows are no documents"
            found.append(f"{rows}; the first: {self.problems[0]}")
        for name, n in self.unlabelled.items():
            if n:
                documents = "1 document has" if n == 1 else f"{n:,} documents have"
                found.append(f"{documents} no {name!r}: in no group of it")
        return found

    def plot(self) -> go.Figure:
        """How strongly it fires, and where in a document."""
        return firing(self.histogram, self.places)

    def summary(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "latent": {"site": self.latent.sae.site, "index": self.latent.index},
            "dictionary": {"path": self.latent.sae.path, "digest": self.latent.sae.digest},
            "model": self.model,
            **{
                name: getattr(self, name)
                for name in ("documents", "documents_fired", "tokens", "fires", "rate", "left_out")
            },
            "problems": self.problems,
            "unlabelled": dict(self.unlabelled),
            "terms": self.lexicon.terms,
            "terms_detection": self.lexicon.detection and self.lexicon.detection._asdict(),
            "sources": self.sources.to_dicts(),
            "lens": self.lens._asdict(),
            "neighbours": self.neighbours.to_dicts(),
            "together": self.together.to_dicts(),
            "histogram": self.histogram.to_dicts(),
            "places": self.places.to_dicts(),
            "top": [_record(shown) for shown in self.top],
            "quantiles": [[_record(shown) for shown in run] for run in self.quantiles],
            "effect": self.effect,
            "dose": self.dose,
        }

    def save(self, folder: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Write `interpretation.json` and `terms.parquet` to `folder`, whole or not at all."""
        with atomic_folder(folder, overwrite=overwrite, known_by=KNOWN_BY) as temporary:
            self.lexicon.table.write_parquet(temporary / "terms.parquet")
            write_json(temporary / "interpretation.json", {**self.summary(), "versions": versions()})

    def with_effect(self, effect: Row | None, dose: Sequence[Row] = ()) -> Interpretation:
        """The same with what the latent does, on the card beside what it is.

        Args:
            effect: a row of a diff (`delta`, `low`, `high`, `q_value`) or of an audit's latents, which has
                `induce`, `control` and `necessity` as well.
            dose: rows `{direction, strength, strength_unit, misaligned, low, high}` of this latent.
        """
        return replace(self, effect=effect, dose=tuple(dose))

    def _repr_html_(self) -> str:
        return latent_card(self.summary())


def _record(shown: Shown) -> dict[str, Any]:
    return {
        "document": shown.document,
        "place": shown.place,
        "maximum": shown.maximum,
        "text": shown.text,
        "tokens": [tuple(token) for token in shown.tokens],
    }
