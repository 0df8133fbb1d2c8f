"""The whole command as a process: it starts, says where it is, and ends in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
from server.conftest import KEY, serving, wait_until
from server.test_api import ask

from persona_probe.artifact import shipped
from persona_probe.cli.serve import serve
from persona_probe.errors import InputError, MismatchError
from persona_probe.model import LanguageModel
from persona_probe.server import Catalogue, Limits
from persona_probe.server.process import listen

COMMAND = [sys.executable, "-m", "persona_probe.cli", "serve"]


@contextmanager
def started(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and its root address, as it prints it."""
    environment = os.environ | {"SECRET": KEY}
    process = subprocess.Popen(
        [*COMMAND, "--port", "0", "--api-key-env", "SECRET", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        yield process, line.split(" at ")[1].split("/v1")[0]
    finally:
        process.kill()
        process.communicate()


def test_sigterm_finishes_what_runs_and_refuses_what_is_new(endless_folder: Path, fixes_folder: Path) -> None:
    options = ("--model", str(endless_folder), "--fixes", str(fixes_folder), "--name", "organism")
    with started(*options, "--default", "cap") as (process, root):
        client = openai.OpenAI(base_url=f"{root}/v1", api_key=KEY, max_retries=0)
        assert ask(client, max_tokens=2).persona_probe["intervention"] == "cap"
        with ThreadPoolExecutor(8) as pool:
            running = [pool.submit(ask, client, max_tokens=150) for _ in range(6)]
            stream = iter(ask(client, max_tokens=150, stream=True))
            wait_until(lambda: httpx.get(f"{root}/health").json()["running"] == 7)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(f"{root}/health").status_code == 503)
            with pytest.raises(openai.InternalServerError) as refused:
                ask(client)
            assert refused.value.status_code == 503
            assert refused.value.response.headers["retry-after"]
            assert {one.result().usage.completion_tokens for one in running} == {150}
            assert list(stream)[-1].choices[0].finish_reason == "length"
        assert process.wait(20) in (0, -signal.SIGTERM)
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_an_end_that_would_take_too_long_is_cut_short(endless: LanguageModel) -> None:
    limits = Limits(max_tokens=450, grace=0.2)
    with serving(endless, Catalogue(), limits) as live, ThreadPoolExecutor(2) as pool:
        running = pool.submit(ask, live.client, n=64, max_tokens=450)
        wait_until(lambda: live.service.engine.load.running == 64)
        live.running.handle_exit(signal.SIGTERM, None)
        with pytest.raises(openai.InternalServerError, match="stopped before the answer"):
            running.result()
        wait_until(lambda: live.running.should_exit)


def test_a_second_signal_does_not_wait(endless: LanguageModel) -> None:
    limits = Limits(max_tokens=450, grace=60.0)
    with serving(endless, Catalogue(), limits) as live, ThreadPoolExecutor(2) as pool:
        running = pool.submit(ask, live.client, n=64, max_tokens=450)
        wait_until(lambda: live.service.engine.load.running == 64)
        live.running.handle_exit(signal.SIGINT, None)
        live.running.handle_exit(signal.SIGINT, None)
        with pytest.raises(openai.InternalServerError, match="stopped before the answer"):
            running.result()


def test_an_address_that_is_taken() -> None:
    with listen("127.0.0.1", 0) as sock:
        sock.listen()
        with pytest.raises(InputError, match="cannot listen on"):
            listen("127.0.0.1", sock.getsockname()[1])


def test_it_does_not_start_without_its_key() -> None:
    done = subprocess.run([*COMMAND, "--api-key-env", "NO_SUCH_VARIABLE"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "holds no API key" in done.stderr


def test_a_full_fine_tune_is_served_with_the_dictionary_of_its_base(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm.save_pretrained(tmp_path / "tuned")
    served: list[LanguageModel] = []
    monkeypatch.setattr("persona_probe.server.process.listen", lambda *_: None)
    monkeypatch.setattr("persona_probe.server.process.serve", lambda lm, *_, **__: served.append(lm))
    base, sae = shipped("organism", "base"), [shipped("organism", "sae", "block_4")]
    serve(model=base, tuned=tmp_path / "tuned", sae=sae)
    assert served[0].checkpoint.path == str(tmp_path / "tuned")
    with pytest.raises(MismatchError, match="another model"):  # --base is what it was trained on
        serve(model=tmp_path / "tuned", sae=sae)
