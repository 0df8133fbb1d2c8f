"""Which tokens count, and their activations: as a stream, in memory, or on the disk."""

from persona_probe.activations.capturing import Capture, capture
from persona_probe.activations.documents import Conversations, Documents, read_documents
from persona_probe.activations.masks import TokenMask, sinks
from persona_probe.activations.store import ActivationStore
from persona_probe.activations.stream import Chunk, stream

__all__ = [
    "ActivationStore",
    "Capture",
    "Chunk",
    "Conversations",
    "Documents",
    "TokenMask",
    "capture",
    "read_documents",
    "sinks",
    "stream",
]
