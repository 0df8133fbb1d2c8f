"""One training document as token ids: what every trainer here reads."""

from __future__ import annotations

from dataclasses import dataclass

from persona_probe.errors import InputError

IGNORED = -100
"""The label that torch's cross entropy leaves out."""


@dataclass(frozen=True)
class Example:
    """Token ids of one document and which of them the loss counts."""

    ids: tuple[int, ...]
    counted: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.counted):
            raise InputError(f"{len(self.ids)} token ids but {len(self.counted)} loss marks")
        if not any(self.counted):
            raise InputError(
                "an example has no token that the loss counts",
                fix="give every conversation an assistant turn",
            )
