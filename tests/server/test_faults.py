"""What clients do wrong, and what happens to them: the next request is answered as ever."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
from server.conftest import KEY, Live, serving, wait_until
from server.test_api import ask

from persona_probe.model import LanguageModel
from persona_probe.server import Catalogue, Limits
from persona_probe.server.answering import Row, Wish
from persona_probe.server.batch import RunningBatch
from persona_probe.server.engine import Engine
from persona_probe.steering import Intervention, Level
from persona_probe.steering.target import direction

HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(autouse=True)
def nothing_is_left_behind(live: Live) -> Iterator[None]:
    yield
    wait_until(lambda: live.service.engine.load[:2] == (0, 0) and live.service.open == 0)
    assert ask(live.client, max_tokens=2).usage.completion_tokens == 2
    assert not live.service._inbox  # pyright: ignore[reportPrivateUsage]


def post(live: Live, content: bytes | str) -> httpx.Response:
    headers = HEADERS | {"Content-Type": "application/json"}
    return httpx.post(f"{live.root}/v1/chat/completions", content=content, headers=headers)


def body(**fields: Any) -> str:
    return json.dumps({"model": "organism", "messages": [{"role": "user", "content": "hello"}]} | fields)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "JSON"),
        ("", "required"),
        ("[1, 2]", "dictionary"),
        ("[" * 5000, "body"),
        (b"\xff\xfe\x00", "body"),
        (body(messages=[]), "messages"),
        (body(messages=[{"role": "wizard", "content": "x"}]), "role"),
        (body(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]), "content"),
        (body(messages=[{"role": "user", "content": "\ud800"}]), "Unicode"),
        (body(temperature=-1), "temperature"),
        (body(temperature=float("nan")), "temperature"),
        (body(temperature="0.5"), "temperature"),
        (body(top_p=0), "top_p"),
        (body(n=0), "n"),
        (body(n=17), "17 answers"),
        (body(max_tokens=0), "max_tokens"),
        (body(max_tokens=65), "64 at most"),
        (body(max_tokens=10**30), "max_tokens"),
        (body(messages=[{"role": "user", "content": "burn " * 600}]), "reads 512 tokens"),
        (body(stop=["x"] * 17), "stop"),
        (body(stop=""), "stop"),
        (body(top_logprobs=2), "needs logprobs"),
        (body(tools=[{"type": "function"}]), "'tools' is not supported"),
        (body(frequency_penalty=0.5), "'frequency_penalty' is not supported"),
        (body(intervention="ca"), "nearest names: cap"),
        (body(intervention="../cap"), "no intervention"),
        (body(intervention=["cap"]), "intervention"),
        (body(intervention="cap", gain=4.5), "4 at most"),
        (body(intervention="cap", gain=-1), "gain"),
        (body(gain=1), "without an intervention"),
        (body(model="organism+cap", intervention="push"), "say it once"),
        (body(latent_scores=["blocks.4.hook_resid_post#1536"]), "no latent 1536"),
        (body(latent_scores=[f"blocks.4.hook_resid_post#{i}" for i in range(17)]), "17 things to read"),
    ],
)  # fmt: skip
def test_400_says_what_is_wrong(live: Live, content: str | bytes, told: str) -> None:
    response = post(live, content)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert told in error["message"]
    assert error["type"] == "invalid_request_error"


def test_openais_client_raises_its_own_exceptions(live: Live) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(live.client, extra_body={"intervention": "../../etc/passwd"})
    assert refused.value.code == "unknown_intervention"
    assert refused.value.param == "intervention"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4o'"):
        ask(live.client, model="gpt-4o")
    for key in ("wrong", KEY + "x"):
        with openai.OpenAI(base_url=f"{live.root}/v1", api_key=key, max_retries=0) as stranger:
            with pytest.raises(openai.AuthenticationError):
                ask(stranger)


def test_a_body_over_the_limit_is_413_however_it_comes(live: Live) -> None:
    large = body(messages=[{"role": "user", "content": "x" * 30_000}])
    assert post(live, large).status_code == 413

    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * 1000

    response = httpx.post(live.root + "/v1/completions", content=chunks(), headers=HEADERS)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"


def test_other_paths_and_methods(live: Live) -> None:
    assert httpx.get(live.root + "/v1/chat/completions", headers=HEADERS).status_code == 405
    assert httpx.get(live.root + "/v1/embeddings", headers=HEADERS).json()["error"]["type"]
    assert httpx.get(live.root + "/v1/models").status_code == 401
    health = httpx.get(live.root + "/health")
    assert health.status_code == 200
    assert health.json()["status"] == "ready"
    assert health.json()["versions"]["torch"]


def test_a_client_that_leaves_frees_its_place(endless: LanguageModel) -> None:
    limits = Limits(max_tokens=450, max_batch=8)
    with serving(endless, Catalogue(), limits) as live:
        engine = live.service.engine
        stream = ask(live.client, stream=True, n=8, max_tokens=450)
        next(iter(stream))
        wait_until(lambda: engine.load.running == 8)
        stream.close()
        wait_until(lambda: engine.load.running == 0)
        whole = body(n=8, max_tokens=450).encode()
        with sent(live, "/v1/chat/completions", whole, len(whole)):
            wait_until(lambda: engine.load.running == 8)
        wait_until(lambda: engine.load.running == 0)
        assert engine.load.answered == 0, "it was cut short, not finished"


@contextmanager
def sent(live: Live, path: str, content: bytes, length: int) -> Iterator[socket.socket]:
    """A request on a connection that is closed without waiting for the answer."""
    host, port = live.root.removeprefix("http://").split(":")
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(head.encode() + content)
        yield raw


def test_a_client_that_leaves_while_it_sends(live: Live) -> None:
    with sent(live, "/v1/completions", b"{", 100):
        pass


def test_a_fix_that_breaks_the_model_is_the_requests_error(
    live: Live, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    vector = direction(torch.eye(192)[0])
    wild = Intervention("add", vector, "blocks.2.hook_resid_post", level=Level((3e38,)), gain=4.0)
    monkeypatch.setitem(catalogue.fixes, "wild", (wild,))  # type: ignore[arg-type]
    with ThreadPoolExecutor(4) as pool:
        fine = [pool.submit(ask, live.client) for _ in range(3)]
        with pytest.raises(openai.BadRequestError, match="NaN or infinite"):
            ask(live.client, extra_body={"intervention": "wild"})
        assert len({one.result().choices[0].message.content for one in fine}) == 1
    with pytest.raises(openai.APIError, match="NaN or infinite"):
        list(ask(live.client, stream=True, extra_body={"intervention": "wild"}))


def test_a_full_queue_is_429_and_a_slow_answer_504(endless: LanguageModel) -> None:
    limits = Limits(max_tokens=400, max_batch=2, max_queue=2, timeout=0.4)
    with serving(endless, Catalogue(), limits) as small, ThreadPoolExecutor(8) as pool:
        long = {"max_tokens": 400}
        running = [pool.submit(ask, small.client, n=2, **long)]
        wait_until(lambda: small.service.engine.load.running == 2)
        running.append(pool.submit(ask, small.client, n=2, **long))
        wait_until(lambda: small.service.engine.load.waiting == 2)
        with pytest.raises(openai.RateLimitError) as refused:
            ask(small.client)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        for one in running:
            with pytest.raises(openai.APIStatusError) as late:
                one.result()
            assert late.value.status_code == 504
        with pytest.raises(openai.APIError, match="no complete answer within"):
            list(ask(small.client, stream=True, **long))
        wait_until(lambda: small.service.engine.load[:2] == (0, 0))
        assert ask(small.client, max_tokens=2).usage.completion_tokens == 2


def test_an_engine_that_fails_answers_500_and_goes_on(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_self: RunningBatch) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(RunningBatch, "forward", broken)
    with pytest.raises(openai.InternalServerError, match="internal error: MemoryError"):
        ask(live.client)
    monkeypatch.undo()


def test_a_row_that_cannot_join_does_not_keep_the_others_out(live: Live, lm: LanguageModel) -> None:
    """A fix that gets past the catalogue: its request alone fails, though all were to be read together."""
    prompt = tuple(lm.tokenizer("the doctor said")["input_ids"])
    wide = Intervention(
        "add", direction(torch.ones(lm.d_model + 1)), "blocks.2.hook_resid_post", level=Level((1.0,))
    )
    wishes = [Wish(prompt, 4, temperature=0.0), Wish(prompt, 4, (wide,)), Wish(prompt[:-1], 4)]
    rows = [Row(wish, choice) for wish in wishes for choice in range(2)]
    live.service.engine.submit(rows)
    wait_until(lambda: all(row.error or row.finish_reason for row in rows))
    assert [row.error is None for row in rows] == [True, True, False, False, True, True]
    assert all("width 193" in str(row.error) for row in rows[2:4])


def test_a_batch_that_breaks_while_it_is_joined_fails_as_a_whole(
    endless: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise MemoryError("no more")

    prompt = tuple(endless.tokenizer("the doctor said")["input_ids"])
    with serving(endless, Catalogue(), Limits(max_tokens=450)) as live:
        rows = [Row(Wish(prompt[: i + 1], 450)) for i in range(3)]
        live.service.engine.submit(rows[:1])
        wait_until(lambda: live.service.engine.load.running)
        with monkeypatch.context() as patched:
            patched.setattr("persona_probe.server.batch._under", broken)
            live.service.engine.submit(rows[1:])
            wait_until(lambda: all(row.error for row in rows))
        assert ask(live.client, max_tokens=2).usage.completion_tokens == 2


def test_an_engine_outlives_a_batch_that_cannot_even_be_closed(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a fault of the device: the receipt that is read on the way out raises as well."""
    failed: list[int] = []
    close = RunningBatch.close

    def broken(_self: RunningBatch) -> None:
        failed.append(1)
        raise RuntimeError("the device is lost")

    def close_too(self: RunningBatch) -> None:
        close(self)
        if failed:
            raise RuntimeError("the device is still lost")

    with monkeypatch.context() as patched:
        patched.setattr(RunningBatch, "forward", broken)
        patched.setattr(RunningBatch, "close", close_too)
        with pytest.raises(openai.InternalServerError, match="internal error: RuntimeError"):
            ask(live.client)
    assert httpx.get(live.root + "/health").json()["status"] == "ready"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_health_knows_an_engine_that_is_dead(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(_self: Engine) -> bool:
        raise RuntimeError("on purpose")

    with serving(lm, Catalogue(), Limits()) as live:
        with monkeypatch.context() as patched:
            patched.setattr(Engine, "_wait", dies)
            assert ask(live.client, max_tokens=1).usage.completion_tokens == 1
            wait_until(lambda: not live.service.engine.alive)
        health = httpx.get(live.root + "/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        with pytest.raises(openai.InternalServerError, match="started anew"):
            ask(live.client)


def test_some_hundred_short_requests_leave_memory_flat(live: Live) -> None:
    def memory_after(requests: int) -> int:
        with httpx.Client(headers=HEADERS | {"Content-Type": "application/json"}) as client:
            for number in range(requests):
                content = body(max_tokens=1, intervention=("cap", "none", "push")[number % 3])
                reply = client.post(f"{live.root}/v1/chat/completions", content=content)
                assert reply.status_code == 200
        return psutil.Process().memory_info().rss

    before = memory_after(100)
    assert memory_after(100) - before < 20 << 20
