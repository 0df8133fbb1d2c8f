"""The endpoints: OpenAI's three, and `/health`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from persona_probe.errors import MissingExtraError, PersonaProbeError
from persona_probe.server.answering import Row
from persona_probe.server.guard import Guard
from persona_probe.server.limits import Refusal, as_refusal
from persona_probe.server.replies import Reply
from persona_probe.server.service import Inbox, Service
from persona_probe.server.wire import ChatBody, CompletionBody

try:
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise MissingExtraError.of("fastapi", "serve") from error

_CLIENT_LEFT = 499


def create_app(service: Service, *, api_key: str | None = None) -> FastAPI:
    """The ASGI application; the engine runs while the application does (its lifespan)."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None, None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(title="persona-probe", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, limits=service.limits, api_key=api_key)  # type: ignore[arg-type]

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        return await _complete(service, body, request)

    @app.post("/v1/completions")
    async def complete(body: CompletionBody, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        return await _complete(service, body, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        return {"object": "list", "data": _models(service)}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        found = next((one for one in _models(service) if one["id"] == name), None)
        if found is None:
            raise Refusal(404, f"there is no model {name[:100]!r}", code="model_not_found", param="model")
        return found

    @app.get("/health")
    async def health() -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        engine = service.engine
        status = "stopping" if engine.draining else "ready" if engine.alive else "failed"
        state = {
            "status": status,
            "model": service.name,
            "interventions": sorted(service.catalogue.fixes),
            **engine.load._asdict(),
            "versions": service.versions,
        }
        return JSONResponse(state, status_code=200 if status == "ready" else 503)

    @app.exception_handler(PersonaProbeError)
    async def refused(_request: Request, error: PersonaProbeError) -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        return _refused(as_refusal(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(_request: Request, error: RequestValidationError) -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        param = None if first["type"] == "json_invalid" else where or None
        message = f"{where}: {first['msg']}" if param else str(first["msg"])
        return _refused(Refusal(400, message, param=param))

    @app.exception_handler(HTTPException)
    async def other(_request: Request, error: HTTPException) -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        return _refused(Refusal(error.status_code, str(error.detail)))

    return app


async def _complete(service: Service, body: ChatBody | CompletionBody, request: Request) -> Response:
    deadline = asyncio.get_running_loop().time() + service.limits.timeout
    rows, reply = await service.rows(body)
    if not body.stream:
        return await _whole(service, rows, reply, request, deadline)
    with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    chunks = _chunks(service, rows, reply, deadline, with_usage)
    # up to here a refusal is a status; once the head of the answer is out it can only be an event
    await anext(chunks)
    return StreamingResponse(_events(chunks), media_type="text/event-stream")


async def _whole(
    service: Service, rows: Sequence[Row], reply: Reply, request: Request, deadline: float
) -> Response:
    async with service.answering(rows) as inbox:
        answered = asyncio.create_task(_all_ended(inbox, len(rows)))
        left = asyncio.create_task(_left(request))
        try:
            remaining = deadline - asyncio.get_running_loop().time()
            await asyncio.wait({answered, left}, timeout=remaining, return_when=asyncio.FIRST_COMPLETED)
            if answered.done():
                answered.result()  # raises what went wrong
                return JSONResponse(reply.whole(rows))
            if left.done():
                return Response(status_code=_CLIENT_LEFT)
            raise _too_late(service)
        finally:
            left.cancel()
            answered.cancel()


async def _all_ended(inbox: Inbox, n: int) -> None:
    while n:
        news = await inbox.get()
        if news.row.error is not None:
            raise as_refusal(news.row.error)
        n -= news.ended


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _chunks(
    service: Service, rows: Sequence[Row], reply: Reply, deadline: float, with_usage: bool
) -> AsyncGenerator[dict[str, Any], None]:
    """The stream's chunks; before them an empty one, once the answers are in the engine."""
    async with service.answering(rows) as inbox:
        yield {}
        for row in rows if reply.chat else ():
            yield reply.first(row)
        told = dict.fromkeys(rows, 0)
        n = len(rows)
        while n:
            try:
                async with asyncio.timeout_at(deadline):
                    news = await inbox.get()
            except TimeoutError:
                raise _too_late(service) from None
            if news.row.error is not None:
                raise as_refusal(news.row.error)
            n -= news.ended
            if news.piece or news.ended:
                yield reply.piece(news, told[news.row])
                told[news.row] = news.n_shown
        if with_usage:
            yield reply.usage_chunk(rows)


async def _events(chunks: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[str, None]:
    try:
        async for chunk in chunks:
            yield f"data: {json.dumps(chunk, ensure_ascii=False, allow_nan=False)}\n\n"
    except Refusal as refusal:
        yield f"data: {json.dumps(refusal.body)}\n\n"
    finally:
        # a client that leaves ends this generator; the answers must not wait for the collector
        await chunks.aclose()
    yield "data: [DONE]\n\n"


def _too_late(service: Service) -> Refusal:
    limit = service.limits.timeout
    return Refusal(504, f"no complete answer within {limit:g} s", code="timeout", fix="fewer tokens")


def _refused(refusal: Refusal) -> JSONResponse:
    return JSONResponse(refusal.body, status_code=refusal.status, headers=refusal.headers)


def _models(service: Service) -> list[dict[str, Any]]:
    """The model as it is, and with each of the fixes."""
    plain = {"object": "model", "created": service.created, "owned_by": "persona-probe"}
    models: list[dict[str, Any]] = [{"id": service.name, **plain, "intervention": service.default}]
    for name, fix in service.catalogue.fixes.items():
        models.append(
            {
                "id": f"{service.name}+{name}",
                **plain,
                "intervention": name,
                "edits": [str(edit) for edit in fix],
                "digest": service.catalogue.digests.get(name),
            }
        )
    return models
