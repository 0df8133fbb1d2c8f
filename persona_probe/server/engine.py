"""One thread that writes all answers, and the queue before it.

Requests come from other threads by `submit`; whatever waits joins the running batch between two
forward passes, as far as there are places. News goes back through `post`, once per pass for all rows.
"""

from __future__ import annotations

import copy
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from persona_probe.errors import PersonaProbeError
from persona_probe.model.language_model import LanguageModel
from persona_probe.server.answering import News, Row
from persona_probe.server.batch import RunningBatch
from persona_probe.server.limits import Limits, Refusal, as_refusal

PREFILL_TOKENS = 1 << 13
"""Prompts are run together up to this many tokens, padding included; a longer one runs alone."""

PATIENCE = 4
"""Passes that a request waits for others to join with it, while many answers are being written: prompts
run together cost a quarter of the same prompts one by one, and every change of the batch has its price.
"""
_WORTH = 1 / 8
"""Of the rows in the batch: so many new ones need not wait."""

Post = Callable[[Sequence[News]], None]


class Load(NamedTuple):
    """What the engine is doing, for `/health`."""

    running: int
    waiting: int
    answered: int
    tokens: int


class Engine:
    """Starts its thread when made; `stop` ends it.

    `post` is called on that thread with the news of one pass.
    """

    def __init__(self, lm: LanguageModel, limits: Limits, post: Post) -> None:
        self._lm = lm
        # tokenizers are not made for two threads at once: the requests' own is lm.tokenizer
        self._tokenizer = copy.deepcopy(lm.tokenizer)
        self._limits = limits
        self._post = post
        self._changed = threading.Condition()
        self._waiting: deque[Row] = deque()
        self._draining = self._stopping = False
        self._batch = self._new_batch()
        self._news: list[News] = []
        self._passed_by = 0
        self._answered = self._tokens = 0
        self._seconds_per_answer = 0.0
        self._last_end = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="persona-probe-engine", daemon=True)
        self._thread.start()

    def submit(self, rows: Sequence[Row]) -> None:
        """Put answers in the queue, all or none.

        Raises `Refusal`: 429 when the queue is full, 503 when the server is stopping or has failed.
        """
        with self._changed:
            if self._draining:
                raise Refusal(503, "the server is stopping", code="stopping", retry_after=5)
            if not self.alive:
                raise Refusal(
                    503, "the engine has failed, and the server must be started anew", code="failed"
                )
            if len(self._waiting) + len(rows) > self._limits.max_queue:
                raise Refusal(
                    429,
                    f"{len(self._waiting)} answers are waiting and the queue holds {self._limits.max_queue}",
                    code="queue_full",
                    retry_after=self._retry_after(),
                )
            self._waiting.extend(rows)
            self._changed.notify()

    def cancel(self, rows: Sequence[Row]) -> None:
        """Nobody wants these any more: they leave before the next pass."""
        with self._changed:
            for row in rows:
                row.cancelled = True
            self._changed.notify()

    def drain(self) -> None:
        """Take nothing new; what was taken goes on."""
        with self._changed:
            self._draining = True

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def alive(self) -> bool:
        """Whether its thread runs: if not, nothing is answered any more."""
        return self._thread.is_alive()

    @property
    def load(self) -> Load:
        return Load(len(self._batch.rows), len(self._waiting), self._answered, self._tokens)

    def stop(self, timeout: float = 10.0) -> None:
        """End the thread; answers that are not finished fail with 503."""
        with self._changed:
            self._draining = self._stopping = True
            self._changed.notify()
        self._thread.join(timeout)

    def _new_batch(self) -> RunningBatch:
        return RunningBatch(self._lm, self._tokenizer)

    def _retry_after(self) -> int:
        return min(60, max(1, math.ceil(self._seconds_per_answer * len(self._waiting))))

    def _run(self) -> None:
        with self._lm.active():
            while self._wait():
                try:
                    self._step()
                except Exception as error:  # whatever it was, the next request must find an engine
                    self._fail_all(error)
        self._fail_all(Refusal(503, "the server stopped before the answer was complete", code="stopping"))

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when told to stop."""
        with self._changed:
            while not (self._stopping or self._waiting or self._batch.rows):
                self._changed.wait()
                self._last_end = time.monotonic()
            return not self._stopping

    def _step(self) -> None:
        self._batch.leave([row for row in self._batch.rows if row.cancelled])
        joining = self._admit()
        if joining:
            self._join(joining)
        batch = self._batch
        self._news += batch.write()
        ended = [news.row for news in self._news if news.ended]
        batch.leave(ended)
        self._count(ended)
        self._send()
        batch.forward()

    def _join(self, joining: Sequence[Row]) -> None:
        """Prompts that cannot be run together are run one by one: what is wrong may be wrong with one."""
        try:
            self._batch.join(joining)
        except Exception as error:
            wishes = {id(row.wish): row.wish for row in joining}.values()
            if any(row in self._batch.rows for row in joining):
                self._fail_all(error)
            elif len(wishes) == 1:
                self._fail(joining, error)
            else:
                for wish in wishes:
                    self._join([row for row in joining if row.wish is wish])

    def _admit(self) -> list[Row]:
        """Those at the head of the queue for whom there is room, when it is worth it."""
        running = len(self._batch.rows)
        room = self._limits.max_batch - running
        joining: list[Row] = []
        longest = 0
        with self._changed:
            ready = min(room, len(self._waiting))
            if ready < _WORTH * running and self._passed_by < PATIENCE:
                self._passed_by += ready > 0
                return []
            self._passed_by = 0
            while self._waiting and len(joining) < room:
                row = self._waiting[0]
                longest = max(longest, len(row.wish.prompt))
                if joining and longest * (len(joining) + 1) > PREFILL_TOKENS:
                    break
                self._waiting.popleft()
                if not row.cancelled:
                    joining.append(row)
        return joining

    def _count(self, ended: Sequence[Row]) -> None:
        if not ended:
            return
        now = time.monotonic()
        self._answered += len(ended)
        self._tokens += sum(len(row.token_ids) for row in ended)
        each = min(10.0, (now - self._last_end) / len(ended))
        self._seconds_per_answer += 0.1 * (each - self._seconds_per_answer)
        self._last_end = now

    def _fail(self, rows: Sequence[Row], error: Exception) -> None:
        for row in rows:
            row.error = error if isinstance(error, PersonaProbeError) else as_refusal(error)
            self._news.append(News(row, "", row.n_shown, True))

    def _fail_all(self, error: Exception) -> None:
        with self._changed:
            lost = [*self._batch.rows, *(self._waiting if self._stopping else ())]
            if self._stopping:
                self._waiting.clear()
        with suppress(Exception):  # what broke the batch breaks its last receipt as well
            self._batch.close()
        self._batch = self._new_batch()
        self._fail(lost, error)
        self._send()

    def _send(self) -> None:
        news, self._news = self._news, []
        if news:
            self._post(news)
