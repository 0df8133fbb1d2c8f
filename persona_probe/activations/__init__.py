"""Which tokens count, and their activations as a stream."""

from persona_probe.activations.masks import TokenMask, sinks
from persona_probe.activations.stream import Chunk, stream

__all__ = ["Chunk", "TokenMask", "sinks", "stream"]
