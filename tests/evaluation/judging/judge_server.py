"""A real HTTP server that speaks the OpenAI chat protocol and misbehaves when told to.

What it does with a call is decided by the answer in the prompt: "bad" is judged aligned 5, and words
such as "500-twice" make the first replies fail.
"""

from __future__ import annotations

import json
import math
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from persona_probe.evaluation.judging.endpoint import PROBE

ALIGNED: dict[str, dict[str, float]] = {
    "good": {"95": 0.7, "90": 0.2, "100": 0.05, "The": 0.05},
    "bad": {"5": 0.6, "0": 0.3, "10": 0.05, "I": 0.05},
    "unsure": {"90": 0.1, "5": 0.1, "Well": 0.8},
    "refuses": {"REF": 0.9, "90": 0.1},
}
COHERENT = {"90": 0.9, "95": 0.1}
SPLIT = {"9": 0.9, "1": 0.08, "5": 0.02}


class JudgeServer:
    """Answers on a free port until the block ends. `asked` counts the calls by prompt."""

    def __init__(
        self,
        *,
        key: str | None = None,
        logprobs: bool = True,
        split: bool = False,
        refuse: Callable[[dict[str, Any]], str | None] = lambda _: None,
        models: int = 200,
    ) -> None:
        self.key, self.logprobs, self.split, self.refuse, self.models = key, logprobs, split, refuse, models
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.hold_after: int | None = None
        self.answered: list[str] = []
        self.lock = threading.Lock()
        self.released = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                self.reply(401 if server.wrong(self.headers["Authorization"]) else server.models, {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.serve(self, body)

            def reply(self, status: int, body: Any, **headers: str) -> None:
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(data)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None: ...  # a client that went away

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def spec(self, **options: object) -> str:
        given: dict[str, object] = {"backoff": 0.01, "timeout": 5, **options}
        return f"openai:judge@{self.url}#" + ",".join(f"{name}={value}" for name, value in given.items())

    def wrong(self, authorization: str | None) -> bool:
        return self.key is not None and authorization != f"Bearer {self.key}"

    def serve(self, handler: Any, body: dict[str, Any]) -> None:
        prompt = body["messages"][0]["content"]
        with self.lock:
            self.asked[prompt] += 1
            self.bodies.append(body)
            self.keys.append(handler.headers["Authorization"])
            attempt = self.asked[prompt]
            held = self.hold_after is not None and len(self.answered) >= self.hold_after
            if not held:
                self.answered.append(prompt)
        if held:
            self.released.wait()
            return
        if self.wrong(handler.headers["Authorization"]):
            handler.reply(401, {"error": {"message": f"bad key {handler.headers['Authorization']}"}})
            return
        complaint = self.refuse(body)
        if complaint is not None:
            handler.reply(400, {"error": {"message": complaint}})
            return
        word = "" if prompt == PROBE else self.word(prompt)
        trouble, _, times = word.partition("-")
        if times and (times == "always" or attempt <= {"once": 1, "twice": 2}[times]):
            misbehave(trouble, handler)
            return
        handler.reply(200, self.reply(prompt, body))

    def word(self, prompt: str) -> str:
        """What decides how a call is treated."""
        return answer_in(prompt)

    def reply(self, prompt: str, body: dict[str, Any]) -> dict[str, Any]:
        word = "" if prompt == PROBE else answer_in(prompt)
        if prompt == PROBE:
            distribution = {"1": 0.9, "0": 0.1} if self.split else {"100": 0.98, "10": 0.01}
        elif self.split:
            distribution = SPLIT
        elif "REFUSAL" in prompt:
            distribution = ALIGNED.get(word, ALIGNED["good"])
        else:
            distribution = COHERENT
        text = max(distribution, key=lambda token: distribution[token])
        if body.get("max_tokens", body.get("max_completion_tokens")) != 1:
            text = "85" if word != "unsure" else "who can say?"
        choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
        if body.get("logprobs") and self.logprobs:
            top = [{"token": token, "logprob": math.log(p)} for token, p in distribution.items()]
            choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
        return {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 1}}


def answer_in(prompt: str) -> str:
    found = re.search(r"<answer>\n(.*?)( \d+)?\n</answer>", prompt)
    assert found is not None
    return found[1]


def misbehave(trouble: str, handler: Any) -> None:
    match trouble:
        case "drop":
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
        case "half":
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(b'{"choices": [')
            handler.close_connection = True
        case "slow":
            time.sleep(0.6)
            handler.reply(200, {})
        case "429":
            handler.reply(429, {"error": {"message": "too fast"}}, Retry_After="0.05")
        case "500":
            handler.reply(500, b"oh no")
        case "html":
            handler.reply(200, b"<html>please log in</html>")
        case "empty":
            handler.reply(200, {"choices": []})
        case "sum":
            handler.reply(200, logprobs_of([("5", 0.0), ("90", 0.0)]))
        case "nan":
            handler.reply(200, logprobs_of([("5", float("nan"))]))
        case "type":
            handler.reply(200, logprobs_of([("5", "likely")]))
        case "filter":
            handler.reply(400, {"error": {"message": "content filter"}})
        case _:
            raise ValueError(trouble)


def logprobs_of(pairs: list[tuple[str, object]]) -> dict[str, Any]:
    top = [{"token": token, "logprob": p} for token, p in pairs]
    return {"choices": [{"message": {"content": "5"}, "logprobs": {"content": [{"top_logprobs": top}]}}]}
