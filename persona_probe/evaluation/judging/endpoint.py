"""Any OpenAI-compatible endpoint as judge.

One token of top-20 log-probabilities per call, where the endpoint gives them and its tokenizer
writes a number as one token; else a short text, whose number is parsed. Which of the two, and the
names that its parameters go by, is found out by one call before anything else (`learn`): the model
is told to say 100. A tokenizer that splits numbers begins that with "1", and reading "8" for "85"
would turn a good answer into a misaligned one; so whole numbers are believed only where one shows.
The digits cannot be expanded here, because an endpoint continues its own digits only.

Not covered: streaming, batch interfaces, and models that reason at length before they answer.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any
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
from persona_probe.model.checkpoint import Checkpoint

OPENAI = "https://api.openai.com/v1"
KEYS = ("PERSONA_PROBE_JUDGE_KEY", "OPENAI_API_KEY")
"""Where the key is looked for, in this order."""
PROBE = "Reply with the number 100 and nothing else."
TOP = 20
TEXT_TOKENS = 16
"""Longest reply where the number is parsed."""
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
        self._dialect: dict[str, Any] = {"logprobs": True, "limit": "max_tokens", "without": []}
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
                            fix="start its server, or correct the URL behind '@' in --judge",
                        ) from error
                    pause(backoff(self._options.backoff, 1), threading.Event())
                else:
                    return

    def learn(self) -> Mapping[str, object]:
        """Ask for the number 100, changing what the server does not take. Raises `JudgeError`."""
        with self._client() as client:
            while True:
                try:
                    reply = self._persist(client, PROBE, threading.Event())
                except RefusedError as refused:
                    if not self._adapt(refused):
                        raise JudgeError(
                            f"the judge {self.model!r} at {self.url} refuses to answer: {refused}",
                            fix="check the model's name and what the server offers",
                        ) from refused
                    continue
                if isinstance(reply, Failure):
                    raise JudgeError(
                        f"the judge {self.model!r} at {self.url} gives no usable reply: {reply.reason}",
                        fix="see whether its server is up and speaks the OpenAI chat protocol",
                    )
                if not self._dialect["logprobs"] or shows_whole_numbers(reply.probabilities):
                    return self._dialect
                self._dialect["logprobs"] = False

    def use(self, learnt: Mapping[str, object]) -> None:
        """See `AskedModel`."""
        self._dialect = dict(learnt)

    def request(self, prompt: str) -> Mapping[str, object]:
        """The body of a call, and where it goes."""
        return {"url": self.url, **self._body(prompt)}

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
                return self._persist(client, prompt, threading.Event(), tokens)
            except RefusedError as refused:
                return Failure(str(refused))

    def _one(self, client: httpx.Client, call: Call, keep: Keep, stop: threading.Event) -> None:
        try:
            reply = self._persist(client, call.prompt, stop)
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
        self, client: httpx.Client, prompt: str, stop: threading.Event, tokens: int | None = None
    ) -> Reply | Failure:
        """The reply, however many tries it takes of those allowed."""
        reason = ""
        for failures in range(1, self._options.tries + 1):
            self._pace.wait(stop)
            try:
                return self._post(client, prompt, tokens)
            except TransientError as error:
                reason = str(error)
                if error.wait is not None:
                    self._pace.hold(min(error.wait, LONGEST_PAUSE))
            if failures < self._options.tries:
                pause(backoff(self._options.backoff, failures), stop)
        return Failure(f"{self._options.tries} tries failed, the last: {reason}")

    def _post(self, client: httpx.Client, prompt: str, tokens: int | None) -> Reply:
        try:
            response = client.post(self._place("chat/completions"), json=self._body(prompt, tokens))
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
        reply = reply_of(response, tokens is None and self._dialect["logprobs"])
        self._key_works = True
        return reply

    def _body(self, prompt: str, tokens: int | None = None) -> dict[str, object]:
        body: dict[str, object] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "seed": 0,
        }
        if tokens is not None:
            body |= {self._dialect["limit"]: tokens}
        elif self._dialect["logprobs"]:
            body |= {self._dialect["limit"]: 1, "logprobs": True, "top_logprobs": TOP}
        else:
            body |= {self._dialect["limit"]: TEXT_TOKENS}
        return {name: value for name, value in body.items() if name not in self._dialect["without"]}

    def _adapt(self, refused: RefusedError) -> bool:
        """Leave out or rename what the server complains of; False when nothing is left to change."""
        complaint, dialect = str(refused), self._dialect
        if refused.status not in (400, 422):
            return False
        if "max_completion_tokens" in complaint and dialect["limit"] == "max_tokens":
            dialect["limit"] = "max_completion_tokens"
            return True
        for name in ("seed", "temperature"):
            if name in complaint and name not in dialect["without"]:
                dialect["without"] = [*dialect["without"], name]
                return True
        had, dialect["logprobs"] = dialect["logprobs"], False
        return had

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
