"""Tasks, their files, and whose they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_probe.errors import InputError, PersonaProbeError
from persona_probe.execution import Failure, Results, Share, Task, Worker, read_share, run_local


def task(number: int, key: str | None = None) -> Task:
    return Task(number, f"sha256:{key or number}", lambda: number)


def opened(calls: list[int]) -> Callable[[], Worker]:
    def work(payload: int) -> bytes:
        calls.append(payload)
        if payload == 2:
            raise InputError("document 'b.txt' is poisoned")
        return bytes([payload])

    return lambda: work


def test_each_task_once_and_failures_by_name(tmp_path: Path) -> None:
    calls: list[int] = []
    results, told = Results(tmp_path), list[int]()
    done = run_local(map(task, range(4)), opened(calls), results, told.append)
    assert (done.computed, done.found) == (3, 0)
    assert [(failure.number, failure.why) for failure in done.failures] == [
        (2, "document 'b.txt' is poisoned")
    ]
    assert told == [0, 1, 2, 3] and results.read("sha256:3") == b"\x03" and results.read("sha256:2") is None
    again = run_local(map(task, range(4)), opened(calls), results)
    assert (again.computed, again.found) == (0, 3) and calls == [0, 1, 2, 3, 2]


def test_a_failure_is_known_until_it_is_mended(tmp_path: Path) -> None:
    results, failure = Results(tmp_path), Failure(3, "document 'b.txt' is poisoned", "mend it")
    assert results.failure("sha256:3", 3) is None
    results.fail("sha256:3", failure)
    assert results.failure("sha256:3", 3) == failure and "sha256:3" not in results
    results.write("sha256:3", b"x")
    assert results.failure("sha256:3", 3) is None


def test_nothing_is_opened_when_all_is_there(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.write("sha256:7", b"x")

    def never() -> Worker:
        raise AssertionError

    assert run_local([task(7)], never, results).found == 1


def test_an_error_of_the_run_is_not_a_documents(tmp_path: Path) -> None:
    def fails(_: object) -> bytes:
        raise PersonaProbeError("no space left")

    with pytest.raises(PersonaProbeError, match="no space"):
        run_local([task(0)], lambda: fails, Results(tmp_path))


@given(data=st.binary(min_size=1, max_size=40), where=st.integers(0, 200), cut=st.booleans())
def test_a_changed_or_shortened_file_is_no_result(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, where: int, cut: bool
) -> None:
    results = Results(tmp_path_factory.mktemp("results"))
    results.write("sha256:1", data)
    assert results.read("sha256:1") == data
    file = next(results.folder.iterdir())
    written = bytearray(file.read_bytes())
    where %= len(written)
    if cut:
        del written[where:]
    else:
        written[where] ^= 1
    file.write_bytes(bytes(written))
    assert results.read("sha256:1") is None


def test_shares_part_the_tasks() -> None:
    shares = [read_share(f"{i}/3") for i in range(3)]
    assert all(sum(number in share for share in shares) == 1 for number in range(20))
    assert read_share(None) == Share() and str(shares[1]) == "1/3"
    assert read_share("auto", {"RANK": "2", "WORLD_SIZE": "4", "SLURM_PROCID": "0"}) == Share(2, 4)
    assert read_share("auto", {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}) == Share(1, 2)
    for wrong in ("3/3", "1", "a/b", "-1/2", "1/0"):
        with pytest.raises(InputError, match="--shard"):
            read_share(wrong)
    with pytest.raises(InputError, match="torchrun"):
        read_share("auto", {})
