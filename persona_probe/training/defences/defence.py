"""What a defence is: data that says which parts of a training run it changes.

There are four parts, and a defence overrides those that it needs:

    rows           what is trained on                  interleaving, inoculation
    interventions  edits of the residual stream        preventative steering, CAFT
    penalty        a term of the loss                  KL, LDIFS, latent blocking
    finish         the weights, once training is done  SafeLoRA

Defences compose: a run takes a list, applies `rows` and `finish` in its order, adds up the penalties
and makes all edits at once. One whose strength is 0 is left out altogether, so the run is, bit for
bit, the run without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, cast

from jaxtyping import Bool, Float
from torch import Tensor, nn

from persona_probe.artifact import digest_of
from persona_probe.steering.intervention import Intervention
from persona_probe.training.rows import Row


@dataclass(frozen=True, eq=False)
class Reading:
    """What a forward pass left on one batch: of the model in training, or of the model before it."""

    real: Bool[Tensor, "batch pos"]
    """Tokens that are no padding."""
    producing: Bool[Tensor, "batch pos"]
    """Tokens whose successor the loss counts: the last prompt token, and the answer but its last."""
    activations: Mapping[str, Float[Tensor, "batch pos d_model"]]
    """By hook name, at the sites that this defence asked for."""
    logits: Float[Tensor, "batch pos d_vocab"] | None = None
    """None where no defence reads them."""


@dataclass(frozen=True)
class Defence:
    """The base of every defence; by itself it changes nothing."""

    name: ClassVar[str] = ""
    penalises: ClassVar[bool] = False
    """Whether there is a `penalty`, and with it a second forward pass, of the base, at every step."""
    reads_logits: ClassVar[bool] = False
    """Whether the penalty needs the base's logits (else its pass ends at the deepest site)."""

    @property
    def strength(self) -> float:
        """Its one dial; at 0 the defence is off."""
        raise NotImplementedError

    def rows(self, rows: Sequence[Row], seed: int) -> list[Row]:
        """The rows to train on."""
        del seed
        return list(rows)

    def interventions(self) -> tuple[Intervention, ...]:
        """Edits that are made during training, and at no other time."""
        return ()

    def sites(self, n_layers: int) -> tuple[str, ...]:
        """Hook names that the penalty reads, in a model of so many blocks."""
        del n_layers
        return ()

    def penalty(self, now: Reading, base: Reading) -> Float[Tensor, ""]:
        """What is added to the loss, a mean over the batch's tokens, strength included."""
        raise NotImplementedError

    def finish(self, model: nn.Module) -> Mapping[str, float]:
        """Change the trained weights in place; figures about what was done."""
        del model
        return {}

    def record(self) -> dict[str, Any]:
        """Name and settings for `settings.json`; tensors and rows by their digest."""
        shown = {one.name: _shown(getattr(self, one.name)) for one in fields(self)}
        return {"defence": self.name, **shown}


def _shown(value: object) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple) and all(isinstance(one, Row) for one in cast("tuple[object, ...]", value)):
        return digest_of([row.record() for row in cast("tuple[Row, ...]", value)])
    return digest_of(value)
