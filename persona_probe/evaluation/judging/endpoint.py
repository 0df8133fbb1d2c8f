"""Any OpenAI-compatible endpoint as judge.

One token of top-20 log-probabilities per call, where the endpoint gives them and its tokenizer
writes a number as one token. A tokenizer that splits numbers begins 85 with "8", and reading that
for the score would turn a good answer into a misaligned one. So whole numbers are believed only
where one shows; else the digits are expanded, as far as the endpoint shows further tokens and
continues replies that were begun for it (see `written`). Without log-probabilities a short text is
asked for, and its number parsed. Which of these, and the names that its parameters go by, is found
out before anything else (`learn`): the model is told to say 100. Each judgement says how it was read.

Not covered: streaming, batch interfaces, and models that reason at length before they answer.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from typing import Any, cast
from urllib.parse import SplitResult, urlsplit

import httpx

from persona_probe.errors import InputError, JudgeError
from persona_probe.evaluation.judging.asked_model import AskedModel, Call, Keep
from persona_probe.evaluation.judging.chat_protocol import (
    RefusedError,
    TransientError,
    complaint_of,
    reply_of,
    shows_whole_numbers,
)
from persona_probe.evaluation.judging.dialect import CONTINUED, WRITTEN, Dialect
from persona_probe.evaluation.judging.options import EndpointOptions
from persona_probe.evaluation.judging.pace import (
    LONGEST_PAUSE,
    Pace,
    backoff,
    pause,
    retry_after,
)
from persona_probe.evaluation.judging.reply import Failure, Reply
from persona_probe.evaluation.judging.spending import BudgetSpentError
from persona_probe.evaluation.judging.written import beginnings, continues, wanted
from persona_probe.model.checkpoint import Checkpoint

OPENAI = "https://api.openai.com/v1"
KEYS = ("PERSONA_PROBE_JUDGE_KEY", "OPENAI_API_KEY")
"""Where the key is looked for, in this order."""
PROBE = "Reply with the number 100 and nothing else."
GIVE_UP_AFTER = 25
"""Calls in a row that fail every try: the endpoint is gone, and waiting for the rest is pointless."""

_TRANSIENT = {408, 409, 425, 429}


class Endpoint(AskedModel):
    """`model` at the base URL `url` (which ends in `/v1`, as a rule)."""

    def __init__(self, model: str, url: str, options: EndpointOptions) -> None:
        parts = _parts(url)
        if parts.username is not None or parts.password is not None:
            raise InputError(
                "a judge's URL must not hold a user or a key: it is written to every result",
                fix=f"put the key into the environment variable {KEYS[0]}",
            )
        self.model = model
        self.url = url.rstrip("/")
        self._options = options
        self._pace = Pace(options.rate)
        self._dialect = Dialect()
        self._failed_in_a_row = 0
        self._key_works = False
        self._lock = threading.Lock()

    @property
    def identity(self) -> Mapping[str, object]:
        """The model and where it runs."""
        return {"url": self.url, "model": self.model}

    def is_model(self, checkpoint: Checkpoint) -> bool:
        """Whether the endpoint serves it under its path or name."""
        return self.model in {checkpoint.path, checkpoint.adapter, checkpoint.name}

    def reach(self) -> None:
        """Ask for the list of models, which is free. Raises `JudgeError`: unreachable, or key refused."""
        with self._client() as client:
            for last in (False, True):
                try:
                    self._check_key(client.get(self._place("models")))
                except httpx.HTTPError as error:
                    if last:
                        raise JudgeError(
                            f"the judge at {self.url} cannot be reached ({type(error).__name__}: {error})",
                            fix="start its server, or correct the URL behind '@'",
                        ) from error
                    pause(backoff(self._options.backoff, 1), threading.Event())
                else:
                    return

    def learn(self) -> Mapping[str, object]:
        """Ask for the number 100, changing what the server does not take. Raises `JudgeError`."""
        with self._client() as client:
            reply = self._probe(client)
            if self._dialect.logprobs and not shows_whole_numbers(reply.probabilities):
                self._dialect = replace(self._dialect, digits=WRITTEN)
                whole = self._probe(client)
                begun = beginnings(whole)
                if begun:
                    way = self._continuation(client, whole, begun)
                    self._dialect = replace(self._dialect, digits=way or WRITTEN)
                else:
                    self._dialect = replace(self._dialect, logprobs=False, digits=None)
        return asdict(self._dialect)

    def _probe(self, client: httpx.Client) -> Reply:
        while True:
            try:
                reply = self._persist(client, Call("", PROBE), threading.Event())
            except RefusedError as refused:
                adapted = self._dialect.adapted(str(refused)) if refused.status in (400, 422) else None
                if adapted is not None:
                    self._dialect = adapted
                    continue
                raise JudgeError(
                    f"the judge {self.model!r} at {self.url} refuses to answer: {refused}",
                    fix="check the model's name and what the server offers",
                ) from refused
            if isinstance(reply, Failure):
                raise JudgeError(
                    f"the judge {self.model!r} at {self.url} gives no usable reply: {reply.reason}",
                    fix="see whether its server is up and speaks the OpenAI chat protocol",
                )
            return reply

    def _continuation(self, client: httpx.Client, whole: Reply, begun: Sequence[str]) -> str | None:
        """The way in which the endpoint continues a reply that was begun; None when it does not."""
        for way in CONTINUED:
            self._dialect = replace(self._dialect, digits=way)
            replies: dict[str, Reply] = {}
            for one in begun:
                try:
                    reply = self._persist(client, Call("", PROBE, one), threading.Event(), tries=2)
                except RefusedError:
                    break
                if isinstance(reply, Failure):
                    break
                replies[one] = reply
            if len(replies) == len(begun) and continues(whole, replies):
                return way
        return None

    def use(self, learnt: Mapping[str, object]) -> None:
        """See `AskedModel`."""
        self._dialect = Dialect(**cast("dict[str, Any]", learnt))

    def request(self, prompt: str, begun: str = "") -> Mapping[str, object]:
        """The body of a call, and where it goes."""
        return {"url": self.url, **self._dialect.body(self.model, Call("", prompt, begun))}

    def further(self, replies: Mapping[str, Reply]) -> Sequence[str]:
        """See `AskedModel`: the first digits that matter, where the endpoint continues them."""
        return wanted(replies) if self._dialect.digits in CONTINUED else ()

    def ask(self, calls: Iterable[Call], keep: Keep) -> None:
        """Make the calls, some at once. Raises `JudgeError` when the key is refused, or when the endpoint
        stays away. Whatever ends it, replies under way are kept.
        """
        stop = threading.Event()
        workers = self._options.concurrency
        going: set[Future[None]] = set()
        with self._client() as client, ThreadPoolExecutor(workers) as pool:
            try:
                for call in calls:
                    going.add(pool.submit(self._one, client, call, keep, stop))
                    if len(going) >= 2 * workers:
                        done, going = wait(going, return_when=FIRST_COMPLETED)
                        _raise_first(done)
                _raise_first(going)
            except BudgetSpentError:
                _raise_first(going)
                raise
            except BaseException:
                stop.set()
                for future in going:
                    future.cancel()
                raise

    def write(self, prompt: str, tokens: int) -> Reply | Failure:
        """See `AskedModel`."""
        with self._client() as client:
            try:
                return self._persist(client, Call("", prompt), threading.Event(), tokens)
            except RefusedError as refused:
                return Failure(str(refused))

    def _one(self, client: httpx.Client, call: Call, keep: Keep, stop: threading.Event) -> None:
        try:
            reply = self._persist(client, call, stop)
        except RefusedError as refused:
            reply = Failure(str(refused))
        keep(call, reply)
        with self._lock:
            self._failed_in_a_row = self._failed_in_a_row + 1 if isinstance(reply, Failure) else 0
            gone = self._failed_in_a_row >= GIVE_UP_AFTER
        if gone and isinstance(reply, Failure):
            raise JudgeError(
                f"the judge at {self.url} failed {GIVE_UP_AFTER} calls in a row; the last: {reply.reason}",
                fix="run the same command again when it is back; what it has judged is kept",
            )

    def _persist(
        self,
        client: httpx.Client,
        call: Call,
        stop: threading.Event,
        tokens: int | None = None,
        tries: int | None = None,
    ) -> Reply | Failure:
        """The reply, however many tries it takes of those allowed."""
        reason, tries = "", tries or self._options.tries
        for failures in range(1, tries + 1):
            self._pace.wait(stop)
            try:
                return self._post(client, call, tokens)
            except TransientError as error:
                reason = str(error)
                if error.wait is not None:
                    self._pace.hold(min(error.wait, LONGEST_PAUSE))
            if failures < tries:
                pause(backoff(self._options.backoff, failures), stop)
        return Failure(f"{tries} tries failed, the last: {reason}")

    def _post(self, client: httpx.Client, call: Call, tokens: int | None) -> Reply:
        try:
            body = self._dialect.body(self.model, call, tokens)
            response = client.post(self._place("chat/completions"), json=body)
        except httpx.HTTPError as error:
            raise TransientError(f"{type(error).__name__}: {error}") from error
        self._check_key(response)
        status, said = (
            response.status_code,
            f"{response.status_code} {complaint_of(response, hide=_key()[1])}",
        )
        if status == 429 and "insufficient_quota" in response.text:
            raise JudgeError(f"the account of the judge at {self.url} has no credit left: {said}")
        if status in _TRANSIENT or status >= 500:
            raise TransientError(said, retry_after(response.headers.get("retry-after")))
        if status != 200:
            raise RefusedError(status, said)
        reply = reply_of(response, 0 if tokens is not None else self._dialect.places(call))
        self._key_works = True
        return reply

    def _check_key(self, response: httpx.Response) -> None:
        """Raise `JudgeError` when the server refuses the key, or wants one. (A 403 after a key that worked
        is about one prompt.)
        """
        if response.status_code != 401 and (response.status_code != 403 or self._key_works):
            return
        given, _ = _key()
        if given is None:
            raise JudgeError(
                f"the judge at {self.url} wants a key ({response.status_code}), and there is none",
                fix=f"put it into the environment variable {KEYS[0]} or {KEYS[1]}",
                command=f"export {KEYS[0]}=...",
            )
        raise JudgeError(
            f"the judge at {self.url} refuses the key in {given} ({response.status_code})",
            fix="check that it is valid, belongs to this endpoint and may use this model",
        )

    def _client(self) -> httpx.Client:
        _, key = _key()
        return httpx.Client(
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(self._options.timeout, connect=min(10.0, self._options.timeout), pool=None),
            limits=httpx.Limits(max_connections=self._options.concurrency),
            verify=self.url.startswith("https"),  # reading the certificates takes longer than many a call
        )

    def _place(self, path: str) -> str:
        base, question_mark, query = self.url.partition("?")
        return f"{base.rstrip('/')}/{path}{question_mark}{query}"


def _parts(url: str) -> SplitResult:
    """The parts of a URL. Raises `InputError` for what is none."""
    try:
        parts = urlsplit(url)
        if parts.hostname and parts.port != 0:  # reading the port checks it
            return parts
    except ValueError:
        pass
    raise InputError(f"a judge's endpoint is a URL, not {url!r}", fix="such as http://localhost:8000/v1")


def _key() -> tuple[str | None, str | None]:
    """(name, value) of the environment variable that holds the key."""
    for name in KEYS:
        value = os.environ.get(name, "").strip()
        if value:
            return name, value
    return None, None


def _raise_first(futures: Iterable[Future[None]]) -> None:
    for future in futures:
        future.result()
