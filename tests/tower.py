"""beartype as the tests use it: an int is welcome where a float is annotated (PEP 484's numeric tower), and a
check is made ready at its first use. Of the functions that a test imports, most are never called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf
from beartype import beartype as _beartype

_checked = _beartype(conf=BeartypeConf(is_pep484_tower=True))


def beartype(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, its arguments and what it returns checked."""
    made: Callable[..., Any] | None = None

    def check(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        if made is None:
            made = _checked(function)
        return made(*args, **kwargs)

    return check
