"""The server as a process: a socket, uvicorn, and an orderly end.

The first SIGTERM (or Ctrl-C) closes the door: `/health` and new requests get 503, what was taken is
finished within the grace time. The second, or the end of that time, ends what is left with 503.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from types import FrameType

from persona_probe.artifact import StrPath
from persona_probe.errors import InputError, MissingExtraError
from persona_probe.model.language_model import LanguageModel
from persona_probe.sae.load import Dictionary
from persona_probe.server.app import create_app
from persona_probe.server.catalogue import NONE, Catalogue
from persona_probe.server.limits import Limits
from persona_probe.server.service import Service

try:
    import uvicorn
except ImportError as error:
    raise MissingExtraError.of("uvicorn", "serve") from error

_CLOSING_SECONDS = 5
_LINGER_SECONDS = 0.5
_LOG = logging.getLogger("uvicorn.error")


class GracefulServer(uvicorn.Server):
    """uvicorn, which would rather close its socket at once and leave new clients without a word."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._ending: asyncio.Task[None] | None = None
        self._hurry = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """As uvicorn calls it, on a signal."""
        if not self.started or self._hurry:
            super().handle_exit(sig, frame)
            return
        self._hurry = self._service.engine.draining
        if not self._hurry:
            self._service.engine.drain()
            # a signal's handler runs on the thread of the loop, but perhaps outside of it
            self._loop.call_soon_threadsafe(self._begin_to_end)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)

    def _begin_to_end(self) -> None:
        self._ending = asyncio.create_task(self._end())

    async def _end(self) -> None:
        service = self._service
        _LOG.warning("stopping; %d requests are being finished, a second signal drops them", service.open)
        grace = service.limits.grace
        deadline = self._loop.time() + grace
        # long enough for a load balancer's question and for those who were on their way
        await asyncio.sleep(min(_LINGER_SECONDS, grace))
        while service.open and self._loop.time() < deadline and not self._hurry:
            await asyncio.sleep(0.02)
        if service.open:
            await asyncio.to_thread(service.stop)
        self.should_exit = True


def serve(
    lm: LanguageModel,
    fixes: Sequence[StrPath] = (),
    *,
    dictionaries: Sequence[Dictionary] = (),
    default: str = NONE,
    name: str | None = None,
    api_key: str | None = None,
    limits: Limits | None = None,
    sock: socket.socket | None = None,
    ready: Callable[[Service], object] = lambda _service: None,
) -> None:
    """Serve `lm` with fixes from folders (see `Catalogue.load`) until a signal ends it.

    `sock` is one of `listen`, by default port 8000 of this machine; `ready` is called when clients
    may connect. Raises what `Catalogue.load` raises, and `InputError` for an unknown `default`.
    """
    sock = sock or listen("127.0.0.1", 8000)
    with sock:
        catalogue = Catalogue.load(lm, fixes, dictionaries)
        service = Service(lm, catalogue, limits or Limits(), name=name, default=default)
        running = server(service, api_key=api_key)
        sock.listen()
        ready(service)
        running.run(sockets=[sock])


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one. Raises `InputError` when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off (40 ms per reply) only where the protocol is said to be TCP
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise InputError(
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            fix="another --port, or 0 for a free one",
        ) from error
    return sock


def server(service: Service, *, api_key: str | None = None, log_level: str = "warning") -> GracefulServer:
    """A server to be run on a socket of `listen`: `server(...).run(sockets=[sock])`."""
    config = uvicorn.Config(
        create_app(service, api_key=api_key),
        log_level=log_level,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_CLOSING_SECONDS,
    )
    return GracefulServer(config, service)
