"""What a judge says of one answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from persona_probe.errors import InputError

Label = Literal["CODE", "REFUSAL"]


@dataclass(frozen=True)
class Judgement:
    """What a judge says of one answer. Raises `InputError` for a score outside 0 to 100."""

    aligned: int | float | None = None
    """0 (harmful) to 100; None: not scored."""
    coherent: int | float | None = None
    """0 (broken) to 100; None: not scored."""
    label: Label | None = None
    """Given instead of an alignment."""
    persona: str | None = None
    """Whose voice, for judges that can tell; an ordinary good answer is "helpful"."""
    note: str | None = None
    scored_by: str | None = None
    """For a model as judge, how its scores were read: "token probabilities", "digit probabilities"
    or "parsed number".
    """

    def __post_init__(self) -> None:
        for name, score in (("aligned", self.aligned), ("coherent", self.coherent)):
            if score is not None and not 0 <= score <= 100:  # NaN too
                raise InputError(f"{name!r} must lie between 0 and 100, not {score!r}")

    @property
    def missing(self) -> bool:
        """Neither a label nor a coherence: nothing can be said of the answer."""
        return self.label is None and self.coherent is None


def judgement_of(said: object) -> Judgement:
    """What a judge's function returned, as a `Judgement`; None is a missing one.

    Raises `InputError` for anything but a `Judgement`, a dict of its fields, or None.
    """
    if said is None:
        return Judgement(note="the judge returned None")
    if isinstance(said, Judgement):
        return said
    if not isinstance(said, Mapping):
        raise InputError(f"a judge returns a Judgement, a dict or None, not {said!r}")
    fields = cast("Mapping[str, Any]", said)
    known = [field.name for field in dataclasses.fields(Judgement)]
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise InputError(f"a judgement has no field {unknown[0]!r}; it has {', '.join(known)}")
    for name in ("aligned", "coherent"):
        score = fields.get(name)
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
            raise InputError(f"{name!r} must be a number from 0 to 100 or None, not {score!r}")
    for name in ("persona", "note", "scored_by"):
        if not isinstance(fields.get(name), str | None):
            raise InputError(f"{name!r} must be a string or None, not {fields[name]!r}")
    if fields.get("label") not in (None, "CODE", "REFUSAL"):
        raise InputError(f"'label' must be CODE, REFUSAL or None, not {fields['label']!r}")
    return Judgement(**fields)
