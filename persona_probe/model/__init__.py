"""What is probed: checkpoints, language models that share weights, pairs of them, and chat formatting."""

from persona_probe.model.chat import (
    Message,
    Padded,
    Rendered,
    check_same_rendering,
    pad,
    render,
    render_all,
    render_text,
)
from persona_probe.model.chat_template import takes_system
from persona_probe.model.checkpoint import Checkpoint, describe
from persona_probe.model.language_model import LanguageModel, load_model
from persona_probe.model.pair import ModelPair, load_pair

__all__ = [
    "Checkpoint",
    "LanguageModel",
    "Message",
    "ModelPair",
    "Padded",
    "Rendered",
    "check_same_rendering",
    "describe",
    "load_model",
    "load_pair",
    "pad",
    "render",
    "render_all",
    "render_text",
    "takes_system",
]
