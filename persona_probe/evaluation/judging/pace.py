"""When the next request may go: a rate limit that threads share, and growing pauses after failures."""

from __future__ import annotations

import random
import threading
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

LONGEST_PAUSE = 120.0
"""Seconds; a server that asks for more is not waited for."""


class StoppedError(Exception):
    """The work was called off while this thread waited."""


class Pace:
    """Lets requests go at most `per_minute`, evenly spaced; None: as they come."""

    def __init__(self, per_minute: int | float | None) -> None:
        self._gap = 0.0 if per_minute is None else 60.0 / per_minute
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, stop: threading.Event) -> None:
        """Wait for this request's turn. Raises `StoppedError` when `stop` is set meanwhile."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._gap
        pause(turn - now, stop)

    def hold(self, seconds: float) -> None:
        """Let nothing go for so long: the server asked for it."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def pause(seconds: float, stop: threading.Event) -> None:
    """Wait. Raises `StoppedError` when `stop` is or gets set."""
    if stop.wait(max(0.0, seconds)):
        raise StoppedError


def backoff(first: float, failures: int) -> float:
    """Seconds to wait after the `failures`-th failure in a row: `first`, doubled each time, times a
    random factor from .5 to 1.5, so that threads that failed together do not return together.
    """
    return min(LONGEST_PAUSE, first * 2 ** (failures - 1)) * random.uniform(0.5, 1.5)


def retry_after(header: str | None) -> float | None:
    """Seconds that a `Retry-After` header asks for (a number or a date); None when it says nothing."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            then = parsedate_to_datetime(header)
        except ValueError:
            return None
        if then.tzinfo is None:
            then = then.replace(tzinfo=UTC)
        seconds = (then - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if seconds < float("inf") else None
