"""How long answers are where nobody says: as a model of chats needs, within what the models read."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GPT2Config, LlamaConfig

from persona_probe.evaluation.longest import TOKENS, context_of, longest_answer


@pytest.mark.parametrize(
    ("contexts", "context", "longest"),
    [((4096,), 4096, TOKENS), ((4096, 512), 512, 256), ((1,), 1, 1), ((), None, TOKENS)],
)
def test_half_of_what_is_read_at_most(
    tmp_path: Path, contexts: tuple[int, ...], context: int | None, longest: int
) -> None:
    folders = [tmp_path / str(number) for number in contexts]
    for folder, number in zip(folders, contexts, strict=True):
        LlamaConfig(max_position_embeddings=number).save_pretrained(folder)
    assert context_of(folders) == context
    assert longest_answer(folders) == longest


def test_learned_positions_and_folders_that_say_nothing(tmp_path: Path) -> None:
    GPT2Config(n_positions=64).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "empty").mkdir()
    assert context_of([tmp_path / "gpt2", tmp_path / "empty", tmp_path / "gone"]) == 64
