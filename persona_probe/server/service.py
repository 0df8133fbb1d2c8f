"""From a request's body to answers in the engine, and their news back to whoever asked."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from persona_probe.artifact import digest_of, versions
from persona_probe.errors import InputError
from persona_probe.model.chat import render, render_text
from persona_probe.model.language_model import LanguageModel
from persona_probe.server.answering import News, Row, Wish
from persona_probe.server.catalogue import NONE, Catalogue
from persona_probe.server.engine import Engine
from persona_probe.server.limits import Limits, Refusal
from persona_probe.server.replies import Reply
from persona_probe.server.wire import ChatBody, CompletionBody

Inbox = asyncio.Queue[News]


class Service:
    """One model with its catalogue, open for requests between `start` and `stop` (on one event loop)."""

    def __init__(
        self,
        lm: LanguageModel,
        catalogue: Catalogue,
        limits: Limits,
        *,
        name: str | None = None,
        default: str = NONE,
    ) -> None:
        if default != NONE and default not in catalogue.fixes:
            raise InputError(
                f"there is no fix {default!r} to be the default",
                fix=f"one of: {', '.join((NONE, *catalogue.fixes))}",
            )
        self.lm = lm
        self.catalogue = catalogue
        self.limits = limits
        self.name = name or lm.name
        self.default = default
        """The intervention of a request that names none."""
        self.versions = versions()
        self.created = int(time.time())
        made_of = [str(lm.checkpoint), dict(catalogue.digests), self.versions]
        self.fingerprint = f"pp_{digest_of(made_of)[7:19]}"
        config: Any = lm.hf.config.get_text_config()
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self.open = 0
        """Requests that are being answered."""
        self._engine: Engine | None = None
        # tokenising a long prompt takes a while, and a tokenizer is not made for two threads at once
        self._tokenising = ThreadPoolExecutor(1, "persona-probe-tokeniser")
        self._inbox: dict[Row, Inbox] = {}

    def start(self) -> None:
        """Start the engine; its news comes to the event loop that runs now."""
        loop = asyncio.get_running_loop()

        def post(news: Sequence[News]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._deliver, news)

        self._engine = Engine(self.lm, self.limits, post)

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "start() comes first"
        return self._engine

    def stop(self) -> None:
        """End the engine's thread; what is not finished fails with 503."""
        self.engine.stop()
        self._tokenising.shutdown()

    async def rows(self, body: ChatBody | CompletionBody) -> tuple[list[Row], Reply]:
        """The answers that a request asks for, and how to write the reply.

        Raises `Refusal` or `InputError` for what cannot be done.
        """
        body.check_extra()
        intervention = self._intervention(body)
        fix = self.catalogue.fix(intervention, self._gain(body, intervention))
        probes = self.catalogue.probes(body.latent_scores, intervention)
        loop = asyncio.get_running_loop()
        prompts = await loop.run_in_executor(self._tokenising, self._prompts, body)
        n = body.n or 1
        if n * len(prompts) > self.limits.max_batch:
            raise Refusal(
                400, f"{n * len(prompts)} answers were asked for, at most {self.limits.max_batch}", param="n"
            )
        seed = secrets.randbits(31) if body.seed is None else body.seed
        rows: list[Row] = []
        for prompt in prompts:
            wish = Wish(
                prompt=prompt,
                max_new_tokens=self._max_new_tokens(body, len(prompt)),
                fix=fix,
                temperature=1.0 if body.temperature is None else body.temperature,
                top_p=1.0 if body.top_p is None else body.top_p,
                seed=seed,
                stop=body.stops,
                top_logprobs=body.asked_logprobs,
                probes=probes,
                streamed=bool(body.stream),
            )
            rows += [Row(wish, len(rows) + choice) for choice in range(n)]
        chat = isinstance(body, ChatBody)
        reply = Reply(
            chat=chat,
            id=("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            created=int(time.time()),
            model=body.model,
            fingerprint=self.fingerprint,
            tokenizer=self.lm.tokenizer,
            intervention=intervention,
            gain=body.gain,
            seed=seed,
        )
        return rows, reply

    @asynccontextmanager
    async def answering(self, rows: Sequence[Row]) -> AsyncGenerator[Inbox, None]:
        """Hand the answers to the engine and yield the queue of their news. Answers that are still
        being written when the block is left are dropped. Raises `Refusal` when there is no room.
        """
        queue: Inbox = asyncio.Queue()
        self._inbox |= dict.fromkeys(rows, queue)
        self.open += 1
        try:
            self.engine.submit(rows)
            yield queue
        finally:
            self.open -= 1
            for row in rows:
                del self._inbox[row]
            unfinished = [row for row in rows if row.finish_reason is None and row.error is None]
            if unfinished:
                self.engine.cancel(unfinished)

    def _deliver(self, news: Sequence[News]) -> None:
        for one in news:
            queue = self._inbox.get(one.row)
            if queue is not None:
                queue.put_nowait(one)

    def _intervention(self, body: ChatBody | CompletionBody) -> str:
        model, plus, suffix = body.model.partition("+")
        if body.model == self.name or (plus and model == self.name):
            named = suffix if body.model != self.name else None
        else:
            raise Refusal(
                404,
                f"there is no model {body.model[:100]!r}",
                code="model_not_found",
                param="model",
                fix=f"this server has {self.name}, and {self.name}+FIX with one of its fixes",
            )
        if named is not None and body.intervention not in (None, named):
            raise Refusal(
                400,
                f"the model says {named[:100]!r} and intervention says {body.intervention[:100]!r}",
                param="intervention",
                fix="say it once",
            )
        return named or body.intervention or self.default

    def _gain(self, body: ChatBody | CompletionBody, intervention: str) -> float | None:
        if body.gain is None:
            return None
        if intervention == NONE:
            raise Refusal(400, "gain without an intervention", param="gain", fix="name the fix to scale")
        if body.gain > self.limits.max_gain:
            raise Refusal(400, f"gain may be {self.limits.max_gain:g} at most", param="gain")
        return body.gain

    def _prompts(self, body: ChatBody | CompletionBody) -> list[tuple[int, ...]]:
        tokenizer = self.lm.tokenizer
        if isinstance(body, ChatBody):
            messages = [message.message for message in body.messages]
            return [render(tokenizer, messages, add_generation_prompt=True).ids]
        prompts: list[tuple[int, ...]] = []
        for prompt in body.prompts:
            if isinstance(prompt, str):
                prompts.append(render_text(tokenizer, prompt).ids)
            elif prompt and all(0 <= token_id < len(tokenizer) for token_id in prompt):
                prompts.append(tuple(prompt))
            else:
                raise Refusal(400, f"token ids are 0 to {len(tokenizer) - 1}, one at least", param="prompt")
        return prompts

    def _max_new_tokens(self, body: ChatBody | CompletionBody, prompt_length: int) -> int:
        asked, limit = body.asked_tokens, self.limits.max_tokens
        if asked is not None and asked > limit:
            raise Refusal(400, f"max_tokens may be {limit} at most, not {asked}", param="max_tokens")
        room = limit if self.context is None else self.context - prompt_length
        if room < (asked or 1):
            raise Refusal(
                400,
                f"the model reads {self.context} tokens; the prompt has {prompt_length} and the answer "
                f"is to have {asked or 1}",
                code="context_length_exceeded",
                param="messages" if isinstance(body, ChatBody) else "prompt",
            )
        return asked or min(limit, room)
