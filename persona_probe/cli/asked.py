"""What the shell is told to read: documents or questions, and which of their tokens count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from persona_probe.cli.console import show_error
from persona_probe.cli.options import Mask, TooLong
from persona_probe.errors import InputError

MAX_NEW_TOKENS = 48
SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class Asked:
    """The options of that name, as they were given; None where nothing was said."""

    questions: str | None = None
    data: str | None = None
    field: str | None = None
    split: str | None = None
    context: int | None = None
    too_long: TooLong | None = None
    limit: int | None = None
    max_new_tokens: int | None = None
    mask: Mask | None = None
    first_k: int | None = None
    skip_first: int = 0

    @property
    def said(self) -> dict[str, object]:
        """What was said, by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    def check(self) -> None:
        """Raise `InputError` unless there are either questions or documents, and nothing is said that only
        the other kind has.
        """
        if (self.questions is None) == (self.data is None):
            raise InputError("give --questions or --data, one of them")
        others = ("max_new_tokens",) if self.data is not None else ("field", "split", "context", "too_long")
        kind = "--data" if self.data is not None else "--questions"
        check_unsaid(kind, {name: value for name, value in self.said.items() if name in others})

    def token_mask(self, default: Mask) -> Any:
        """The tokens that count."""
        from persona_probe.activations.masks import TokenMask

        return TokenMask(self.mask or default, first_k=self.first_k, skip_first=self.skip_first)

    def documents(self) -> Any:
        """What lies at `data`; raises for a path or a kind of file that cannot be read."""
        from persona_probe.activations.documents import read_documents

        return read_documents(self.data or "", field=self.field, split=self.split, limit=self.limit)

    def conversations(self, lm: Any, documents: Any, too_long: TooLong = "truncate") -> Any:
        """Documents as token ids of `lm`; says on stderr what was left out or cut. `too_long` is what becomes
        of long ones where nothing was said.
        """
        found = documents.conversations(lm, context=self.context, too_long=self.too_long or too_long)
        _warn_of(found.reading)
        return found


def check_unsaid(beside: str, said: Mapping[str, object]) -> None:
    """Raise `InputError` for options that mean nothing beside another; None, False and [] are not said."""
    given = (name for name, value in said.items() if not (value is None or value is False or value == []))
    named = [f"--{name.replace('_', '-')}" for name in given]
    if named:
        raise InputError(
            f"{' and '.join(named)} cannot be used with {beside}", fix="leave out one or the other"
        )


def placing(device: str | None, dtype: str | None, device_map: str | None) -> dict[str, Any]:
    """Where models are loaded, for `load_model`. Raises `InputError` for both a device and a map."""
    if device_map is not None:
        check_unsaid("--device-map", {"device": device})
    return {"device": device or "auto", "dtype": dtype, "device_map": device_map}


def _warn_of(reading: Any) -> None:
    if reading.bad:
        show_error(f"{reading.bad} rows could not be read and were left out:")
        for problem in reading.problems[:SHOWN_PROBLEMS]:
            show_error(f"  {problem}")
        if reading.bad > SHOWN_PROBLEMS:
            show_error(f"  and {reading.bad - SHOWN_PROBLEMS} more")
    if reading.too_long:
        show_error(
            f"{reading.too_long} documents are longer than the context"
            + (f"; {reading.cut_tokens} tokens were cut off" if reading.cut_tokens else "; they were split")
        )
