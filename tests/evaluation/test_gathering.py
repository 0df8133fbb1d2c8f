"""Requests that come one by one are answered in batches, each with its own result."""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

anyio = pytest.importorskip("anyio")

from persona_probe.evaluation.gathering import Gathering  # noqa: E402


def gather(ask: Callable[[Any], Awaitable[Any]], asked: Sequence[Any]) -> list[Any]:
    """What every one of `asked`, all at once, is given; an exception is what it was given too."""
    given: list[Any] = [None] * len(asked)

    async def one(place: int) -> None:
        try:
            given[place] = await ask(asked[place])
        except Exception as error:
            given[place] = error

    async def every() -> None:
        async with anyio.create_task_group() as tasks:
            for place in range(len(asked)):
                tasks.start_soon(one, place)

    anyio.run(every)
    return given


@pytest.mark.parametrize(("limit", "calls"), [(100, 1), (7, 4), (1, 25)])
def test_everyone_is_given_what_they_asked_for(limit: int, calls: int) -> None:
    batches: list[list[int]] = []

    def squares(numbers: Sequence[int]) -> list[int]:
        batches.append(list(numbers))
        return [n * n for n in numbers]

    assert gather(Gathering(squares, limit=limit), range(25)) == [n * n for n in range(25)]
    assert len(batches) == calls
    assert [n for batch in batches for n in batch] == list(range(25))


def test_the_next_batch_gathers_while_one_is_worked_on() -> None:
    batches: list[int] = []
    inside = threading.Semaphore(1)

    def slow(numbers: Sequence[float]) -> Sequence[float]:
        assert inside.acquire(blocking=False), "two batches at once"
        batches.append(len(numbers))
        time.sleep(0.1)
        inside.release()
        return numbers

    ask = Gathering(slow, limit=100, patience=0.0)

    async def later(delay: float) -> float:
        await anyio.sleep(delay)
        return await ask(delay)

    delays = [0.0, 0.02, 0.03, 0.04]
    assert gather(later, delays) == delays
    assert batches == [1, 3]


def test_an_error_is_that_of_its_batch_alone() -> None:
    def picky(numbers: Sequence[int]) -> Sequence[int]:
        if 3 in numbers:
            raise ValueError("no threes")
        return numbers

    given = gather(Gathering(picky, limit=2), range(6))
    assert [n if isinstance(n, int) else str(n) for n in given] == [0, 1, "no threes", "no threes", 4, 5]
    short = gather(Gathering(lambda numbers: numbers[1:], limit=9), range(3))
    assert all(isinstance(one, ValueError) for one in short)  # too few results are nobody's


def test_who_leaves_takes_nothing_from_the_others() -> None:
    asked_for: list[int] = []

    def slow(numbers: Sequence[int]) -> Sequence[int]:
        asked_for.extend(numbers)
        time.sleep(0.05)
        return numbers

    ask = Gathering(slow, limit=2, patience=0.02)
    given: list[int] = []

    async def one(n: int, patience: float) -> None:
        with anyio.move_on_after(patience):
            given.append(await ask(n))

    async def every() -> None:
        async with anyio.create_task_group() as tasks:
            # 0 leads and leaves before its batch is sent; 3 leaves while it waits for a later one
            for n, patience in enumerate([0.005, 9, 9, 0.03, 9]):
                tasks.start_soon(one, n, patience)

    anyio.run(every)
    assert sorted(given) == [1, 2, 4]
    assert asked_for == [1, 2, 4]
    assert gather(ask, [7]) == [7]  # in another event loop too
