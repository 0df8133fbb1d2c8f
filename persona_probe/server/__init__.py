"""A steered model behind an OpenAI-compatible endpoint: an intervention per request, by name."""

from persona_probe.server.catalogue import Catalogue
from persona_probe.server.limits import Limits

__all__ = ["Catalogue", "Limits"]
