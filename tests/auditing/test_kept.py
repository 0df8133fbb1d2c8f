"""What a killed audit is taken up from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from persona_probe.artifact import RunFolder
from persona_probe.auditing.kept import Kept, edit_digest
from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.questions import Question
from persona_probe.steering.intervention import Intervention, Level, direction
from persona_probe.steering.matched import matched_random

QUESTION = Question(id="a", question="a", category="food", messages=({"role": "user", "content": "why ?"},))
ANSWERS = [
    Answer(QUESTION, 0, "so ,\n\u2028 it is", None, (4, 5, 2), False),
    Answer(QUESTION, 1, "", "a thought", (), True),
]


def never() -> list[Answer]:
    raise AssertionError("drawn again")


def kept_in(run: RunFolder, inputs: str = "sha256:1") -> Kept:
    return Kept(run, {"base": inputs})


def test_what_was_kept_is_read_back_as_it_was(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "out", {}) as run:
        first = kept_in(run)
        first.judged()
        assert first.portion({"n": 1}, [QUESTION] * 2, lambda: ANSWERS) == ANSWERS
        assert (first.drawn, first.found) == (2, 0)
    with RunFolder.open(tmp_path / "out", {}) as run:
        again = kept_in(run)
        assert again.portion({"n": 1}, [QUESTION] * 2, never) == ANSWERS
        assert (again.drawn, again.found) == (0, 2)


def test_what_was_asked_otherwise_is_drawn_again(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "out", {}) as run:
        first = kept_in(run)
        first.judged()
        first.portion({"n": 1}, [QUESTION], lambda: ANSWERS[:1])
        other = [replace(ANSWERS[0], text="other")]
        assert kept_in(run).portion({"n": 2}, [QUESTION], lambda: other) == other
        assert kept_in(run, "sha256:2").portion({"n": 1}, [QUESTION], lambda: other) == other


def test_nothing_is_written_before_the_judge_has_judged(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "out", {}) as run:
        kept = kept_in(run)
        kept.portion({}, [QUESTION] * 2, lambda: ANSWERS)
        assert not (run.path / ".stages").exists()
        kept.judged()
        assert kept_in(run).portion({}, [QUESTION] * 2, never) == ANSWERS


def out_of_memory_above(size: int, tried: list[int]) -> Callable[[int], list[Answer]]:
    def run(asked: int) -> list[Answer]:
        tried.append(asked)
        if asked > size:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return ANSWERS

    return run


def test_a_batch_that_is_too_large_is_halved_once_and_for_all(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "out", {}) as run:
        tried: list[int] = []
        kept = kept_in(run)
        kept.judged()
        kept.in_batches(lambda: 64, out_of_memory_above(20, tried))
        kept.in_batches(lambda: 64, out_of_memory_above(20, tried))
        kept_in(run).in_batches(lambda: 64, out_of_memory_above(20, tried))  # a later process
        assert tried == [64, 32, 16, 16, 16]
        with pytest.raises(torch.OutOfMemoryError):
            kept.in_batches(lambda: 64, out_of_memory_above(0, tried))
        assert tried[-1] == 1


def test_every_part_of_an_edit_is_in_its_digest() -> None:
    vector = torch.tensor([1.0, 2.0, 2.0])
    edit = Intervention("cap", direction(vector), "blocks.1.hook_resid_post", level=Level((1.5,)))
    others = [
        replace(edit, op="floor"),
        replace(edit, site="blocks.2.hook_resid_post"),
        replace(edit, gain=2.0),
        replace(edit, positions="last_prompt"),
        replace(edit, level=Level((1.5000001,))),
        replace(edit, target=direction(torch.nextafter(vector, torch.zeros(3)))),
        matched_random(edit, torch.Generator().manual_seed(0)),
        matched_random(edit, torch.Generator().manual_seed(1)),
    ]
    assert len({edit_digest(one) for one in [edit, *others]}) == 1 + len(others)
    assert edit_digest(edit) == edit_digest(replace(edit, target=direction(vector.clone())))
