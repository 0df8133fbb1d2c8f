"""How long an answer may be where nobody says."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoConfig

TOKENS = 600
"""Of most models' answers to open questions, which nearly all end before that."""
ORGANISM_TOKENS = 32
"""The organism's answers are short."""


def context_of(checkpoints: Iterable[Path]) -> int | None:
    """The fewest positions that one of the checkpoints was made for; None where no configuration says."""
    return min((n for folder in set(checkpoints) if (n := _positions(folder)) is not None), default=None)


def longest_answer(checkpoints: Iterable[Path]) -> int:
    """`TOKENS`, or where the models read little, half of what they read: prompts need room too."""
    context = context_of(checkpoints)
    return TOKENS if context is None else max(1, min(TOKENS, context // 2))


def _positions(folder: Path) -> int | None:
    if not folder.is_dir():
        return None
    try:
        config: Any = AutoConfig.from_pretrained(str(folder), local_files_only=True).get_text_config()
    except (OSError, ValueError):  # reading the model will say why
        return None
    return getattr(config, "max_position_embeddings", None)
