"""Requests that come one by one, answered many at a time.

While a batch is being worked on, the next one gathers; nobody waits for a batch to fill up. Made for
an event loop whose tasks each want one thing of a model that would rather be asked a hundred at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import anyio
import anyio.to_thread

Asked = TypeVar("Asked")
Given = TypeVar("Given")


class _Waiting(Generic[Asked, Given]):
    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.given: list[Given] = []  # one, once there is a result
        self.error: Exception | None = None

    @property
    def done(self) -> bool:
        return bool(self.given) or self.error is not None


class Gathering(Generic[Asked, Given]):
    """Calls `work` with up to `limit` requests at a time, in another thread and never twice at once.

    `work` returns one result per request, in order; what it raises is raised to every one of them.
    """

    def __init__(
        self, work: Callable[[Sequence[Asked]], Sequence[Given]], *, limit: int, patience: float = 0.01
    ) -> None:
        self._work = work
        self._limit = limit
        self._patience = patience
        """Seconds that the first of a batch waits for company."""
        self._waiting: list[_Waiting[Asked, Given]] = []
        self._busy = anyio.Lock()

    async def __call__(self, asked: Asked) -> Given:
        """The result of one request, which waits for its batch."""
        mine = _Waiting[Asked, Given](asked)
        self._waiting.append(mine)
        try:
            async with self._busy:
                # done by now, when another's batch had room for it; those are taken in their order
                while not mine.done:
                    await self._answer_some()
        finally:
            if mine in self._waiting:  # cancelled before its turn
                self._waiting.remove(mine)
        if mine.error is not None:
            raise mine.error
        return mine.given[0]

    async def _answer_some(self) -> None:
        await anyio.sleep(self._patience)
        batch, self._waiting = self._waiting[: self._limit], self._waiting[self._limit :]

        def answer() -> None:  # in a thread, so that a cancelled leader leaves nobody without a result
            try:
                given = self._work([one.asked for one in batch])
                for one, result in zip(batch, given, strict=True):
                    one.given.append(result)
            except Exception as error:
                for one in batch:
                    one.error = error

        await anyio.to_thread.run_sync(answer)
