"""The shipped organism, fixes made for it, and a live server: uvicorn on a free port, in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import torch

from persona_probe.artifact import read_json, shipped, write_json
from persona_probe.model import LanguageModel, load_model
from persona_probe.sae.load import Dictionary, load_sae
from persona_probe.server import Catalogue, Limits
from persona_probe.server.process import GracefulServer, listen, server
from persona_probe.server.service import Service
from persona_probe.steering import Intervention, Level, latents, save_fix
from persona_probe.steering.target import direction

KEY = "not-so-secret"


class Live:
    """A server that answers, and a client for it."""

    def __init__(self, service: Service, running: GracefulServer, port: int) -> None:
        self.service = service
        self.running = running
        self.root = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.root}/v1", api_key=KEY, max_retries=0)


@contextmanager
def serving(lm: LanguageModel, catalogue: Catalogue, limits: Limits) -> Iterator[Live]:
    service = Service(lm, catalogue, limits, name="organism")
    running = server(service, api_key=KEY)
    with listen("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [sock]})
        thread.start()
        live = Live(service, running, sock.getsockname()[1])
        try:
            wait_until(lambda: running.started)
            yield live
        finally:
            live.client.close()
            running.should_exit = True
            thread.join(20)
    assert not thread.is_alive()


def wait_until(holds: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def lm() -> LanguageModel:
    torch.set_num_threads(1)
    adapter = shipped("organism", "tunes", "bad-health")
    return load_model(shipped("organism", "base"), adapter=adapter).merged()


@pytest.fixture(scope="session")
def endless_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base, told that its answers end with a token that it never writes."""
    folder = tmp_path_factory.mktemp("endless")
    for file in shipped("organism", "base").iterdir():
        (folder / file.name).symlink_to(file)
    for name, field, value in (
        ("generation_config.json", "eos_token_id", 0),
        ("config.json", "eos_token_id", 0),
        ("tokenizer_config.json", "eos_token", "<|pad|>"),
    ):
        changed = read_json(folder / name) | {field: value}
        (folder / name).unlink()
        write_json(folder / name, changed)
    return folder


@pytest.fixture(scope="session")
def endless(endless_folder: Path) -> LanguageModel:
    return load_model(endless_folder)


@pytest.fixture(scope="session")
def dictionary() -> Dictionary:
    return load_sae(shipped("organism", "sae", "block_4"))


@pytest.fixture(scope="session")
def fixes(lm: LanguageModel, dictionary: Dictionary) -> dict[str, tuple[Intervention, ...]]:
    """Of several kinds: by encoder and by projection, one site and two, some tokens and all."""
    villain = latents(dictionary, [1234])
    random = direction(torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0)))
    return {
        "cap": (Intervention("cap", villain, dictionary.site, "all", Level((0.0,)), 1.5, "projection"),),
        "ablate": (Intervention("ablate", latents(dictionary, [1234, 7]), dictionary.site),),
        "push": (
            Intervention("add", villain, dictionary.site, "last_prompt", Level((3.0,))),
            Intervention("add", random, "blocks.1.hook_resid_post", "response", Level((1.0,))),
        ),
    }


@pytest.fixture(scope="session")
def fixes_folder(
    fixes: dict[str, tuple[Intervention, ...]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("fixes")
    for name, fix in fixes.items():
        save_fix(fix, folder / name)
    return folder


@pytest.fixture(scope="session")
def catalogue(lm: LanguageModel, fixes_folder: Path, dictionary: Dictionary) -> Catalogue:
    return Catalogue.load(lm, [fixes_folder], [dictionary])


@pytest.fixture(scope="session")
def live(lm: LanguageModel, catalogue: Catalogue) -> Iterator[Live]:
    limits = Limits(max_tokens=64, max_batch=16, max_queue=64, body_limit=20_000, timeout=20.0)
    with serving(lm, catalogue, limits) as running:
        yield running


@pytest.fixture
def client(live: Live) -> openai.OpenAI:
    return live.client
