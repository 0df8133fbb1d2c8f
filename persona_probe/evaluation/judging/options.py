"""The options behind a judge's spec: `openai:MODEL@URL#rate=500,price=2.5/10`.

They stand behind `#`, which no server is sent and no shell needs quoted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeVar, cast

from persona_probe.errors import InputError
from persona_probe.evaluation.judging.spending import Budget, Price


@dataclass(frozen=True)
class EndpointOptions:
    """How an endpoint is asked."""

    rate: int | float | None = None
    """Requests per minute at most."""
    concurrency: int = 16
    """Requests under way at once."""
    timeout: int | float = 60.0
    """Seconds to wait for a reply."""
    tries: int = 6
    """Per call, the first one included."""
    backoff: int | float = 1.0
    """Seconds before the second try; doubled each time, with jitter."""
    price: Price | None = None
    """Dollars per million tokens, `prompt/reply`."""
    budget: Budget | None = None
    """`2000` (calls) or `5usd`."""


@dataclass(frozen=True)
class LocalOptions:
    """How a local model is run."""

    batch: int = 16
    """Prompts at once."""
    device: str = "auto"
    dtype: str | None = None
    """None: fp32 on the CPU, the checkpoint's own on a GPU."""
    budget: Budget | None = None
    """`2000` (calls)."""


Options = TypeVar("Options", EndpointOptions, LocalOptions)

_READERS: Mapping[str, Callable[[str], object]] = {
    "rate": float,
    "concurrency": int,
    "timeout": float,
    "tries": int,
    "backoff": float,
    "price": Price.parse,
    "budget": Budget.parse,
    "batch": int,
    "device": str,
    "dtype": str,
}
_IMMATERIAL = {field.name for field in dataclasses.fields(EndpointOptions)} | {"batch", "device"}


def read_options(text: str, kind: type[Options], spec: str) -> Options:
    """The options in `text`, `name=value` with commas between. Raises `InputError` for any other."""
    known = [field.name for field in dataclasses.fields(kind)]
    given: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise InputError(
                f"the judge {spec!r} has no option {name!r}",
                fix=f"did you mean {near[0]!r}?" if near else f"its options are {', '.join(known)}",
            )
        try:
            given[name] = _READERS[name](value)
        except ValueError as error:
            reason = error.message if isinstance(error, InputError) else f"not a number: {value!r}"
            raise InputError(f"the option {name!r} of the judge {spec!r}: {reason}") from error
        if isinstance(given[name], int | float) and not 0 <= cast("float", given[name]) < float("inf"):
            raise InputError(f"the option {name!r} of the judge {spec!r} must not be {value!r}")
    for name in ("rate", "concurrency", "timeout", "tries", "batch"):
        if given.get(name) == 0:
            raise InputError(f"the option {name!r} of the judge {spec!r} must be more than 0")
    return kind(**given)


def spec_identity(spec: str) -> str:
    """`spec` without the options that change no judgement (pace, price, budget), so that a run can be
    resumed with others.
    """
    place, _, options = spec.partition("#")
    kept = [part for part in options.split(",") if part and part.partition("=")[0] not in _IMMATERIAL]
    return f"{place}#{','.join(kept)}" if kept else place
