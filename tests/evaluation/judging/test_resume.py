"""A judge killed with -9 half way: the rerun repeats no call that was answered."""

from __future__ import annotations

import multiprocessing
import signal
import time
from pathlib import Path

from persona_probe.artifact import read_jsonl
from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.judges import load_judge
from persona_probe.evaluation.judging.judgement import Judgement
from persona_probe.evaluation.questions import Question
from tests.evaluation.judging.judge_server import JudgeServer

N = 40
QUESTION = Question("q", "c", ({"role": "user", "content": "what now ?"},))


def judged(spec: str, record: Path) -> list[Judgement]:
    judge = load_judge(spec, record=record)
    judge.check()
    return judge.judge([Answer(QUESTION, i, f"bad {i}", None, (), False) for i in range(N)])


def test_kill_9_half_way_and_rerun_repeats_no_call(tmp_path: Path) -> None:
    record = tmp_path / "judge.jsonl"
    server = JudgeServer()
    server.hold_after = N  # replies to about half of the calls, then to none
    # forked before the server has threads: a process of its own, without importing torch again
    first = multiprocessing.get_context("fork").Process(
        target=judged, args=(server.spec(concurrency=4), record)
    )
    first.start()
    with server:
        deadline = time.monotonic() + 60
        while not record.exists() or len(record.read_bytes().splitlines()) < N:
            assert first.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        first.kill()
        first.join()
        assert first.exitcode == -signal.SIGKILL
        server.hold_after = None
        server.released.set()
        assert len(judged(server.spec(), record)) == N
        # one call to learn how to ask, and two for each answer
        assert len(server.answered) == len(set(server.answered)) == 1 + 2 * N
        assert len(read_jsonl(record)) == 1 + 2 * N
