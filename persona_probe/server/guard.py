"""The door: who may come in, and how much they may bring. Plain ASGI, before any framework."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from persona_probe.server.limits import Limits, Refusal

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_BODY_SECONDS = 30.0


class Guard:
    """Checks the API key of every request under /v1, and reads its body whole: up to the limit, and
    no slower than a client in good faith.
    """

    def __init__(self, app: App, *, limits: Limits, api_key: str | None) -> None:
        self._app = app
        self._limits = limits
        self._key = None if api_key is None else _digest(api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1"):
            await self._app(scope, receive, send)
            return
        try:
            headers: dict[bytes, bytes] = dict(scope["headers"])
            self._check_key(headers.get(b"authorization", b""))
            body = await self._read(headers, receive)
        except Refusal as refusal:
            await _refuse(refusal, send)
            return
        if body is None:  # the client left while it was sending
            return
        unread = [body]

        async def replay() -> Event:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await receive()

        await self._app(scope, replay, send)

    def _check_key(self, given: bytes) -> None:
        if self._key is None:
            return
        kind, _, key = given.partition(b" ")
        # digests, so that not even the length of the key can be told by the time this takes
        if kind.lower() != b"bearer" or not hmac.compare_digest(_digest(key.strip()), self._key):
            raise Refusal(401, "missing or wrong API key", code="invalid_api_key")

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        limit = self._limits.body_limit
        too_large = Refusal(413, f"the body may have {limit} bytes at most", code="body_too_large")
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(min(_BODY_SECONDS, self._limits.timeout)):
                while True:
                    event = await receive()
                    if event["type"] == "http.disconnect":
                        return None
                    body += event.get("body", b"")
                    if len(body) > limit:
                        raise too_large
                    if not event.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise Refusal(408, "the body took too long to arrive", code="body_timeout") from None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


async def _refuse(refusal: Refusal, send: Send) -> None:
    body = json.dumps(refusal.body).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        # what was not read of a body would be taken for the next request
        "connection": "close",
        **refusal.headers,
    }
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
