"""What holds in every test: one thread, no network, nothing looked up on a hub."""

from __future__ import annotations

import gc
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from filelock import FileLock

from tests.shapes import check_shapes

if TYPE_CHECKING:  # a test that needs no torch need not wait for it
    from persona_probe.auditing import Audit
    from tests.auditing.planted import Planted

# the same examples every time: a search for new ones is for a developer's machine, not for a gate
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

check_shapes()

# before torch or a Hugging Face library is imported, and inherited by every subprocess a test
# starts
os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled",
    }
)


def pytest_collection_finish() -> None:
    """What all the imports made stays to the end: a collection of garbage need not walk through it, and
    training asks for one at every turn.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two torch threads on a busy small machine are ten times slower than one."""
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        if torch.get_num_threads() != 1:
            torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Only this machine can be reached (a test server, a browser, a notebook's kernel)."""
    real = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        local = isinstance(address, str | bytes) or address[0] in ("127.0.0.1", "localhost", "::1")
        if not local:
            raise RuntimeError(f"a test tried to reach {address}: tests use no network")
        real(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    yield


@pytest.fixture(scope="session")
def published() -> Callable[[str], Path]:
    """A file that others have published, by name. None is part of the project: they may lie beside it."""

    def find(name: str) -> Path:
        path = Path(__file__).parents[2] / "shared" / "fixtures" / "published" / name
        if not path.is_file():
            pytest.skip(f"this published file is not beside the project: {path}")
        return path

    return find


@dataclass(frozen=True)
class QuickBuild:
    """The organism that `organism build --quick` makes, and what making it cost."""

    path: Path
    cpu_seconds: float


@pytest.fixture(scope="session")
def quick_build(tmp_path_factory: pytest.TempPathFactory) -> QuickBuild:
    import torch

    from persona_probe.organism.build import QUICK, build

    torch.set_num_threads(1)
    path = _of_all_workers(tmp_path_factory) / "organism"
    cost = path.with_name("cost")
    with FileLock(path.with_name("lock")):
        if not cost.exists():
            start = time.process_time()
            build(path, QUICK)
            cost.write_text(str(time.process_time() - start))
    return QuickBuild(path, float(cost.read_text()))


def _of_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is one for all processes of this test run: each has its own base beneath it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    shared.mkdir(exist_ok=True)
    return shared


@pytest.fixture(scope="session")
def quick_organism(quick_build: QuickBuild) -> Path:
    """Base, dictionary, two tunes and questions, barely trained. One for all tests: only to be read."""
    return quick_build.path


@pytest.fixture(scope="session")
def organism(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """A model organism of fifty words with a planted persona. One for all tests: only to be read."""
    import torch

    from tests.auditing.planted import build_planted

    torch.set_num_threads(1)
    path = _of_all_workers(tmp_path_factory) / "planted"
    with FileLock(path.with_name("planted-lock")):
        return build_planted(path)


@pytest.fixture(scope="session")
def audited(organism: Planted, tmp_path_factory: pytest.TempPathFactory) -> Audit:
    """A finished audit of it. One for all tests: only to be read, and to be run again in a copy."""
    from persona_probe.artifact import read_json
    from persona_probe.auditing import Audit, audit
    from tests.auditing.planted import request_of

    path = _of_all_workers(tmp_path_factory) / "audit"
    with FileLock(path.with_name("audit-lock")):
        if not (path / "manifest.json").exists():
            audit(request_of(organism), path)
    return Audit(path, read_json(path / "audit.json"))
