"""Latents in words: what they fire on, what they say, what is like them, where they come from."""

from persona_probe.figures.highlight import highlight
from persona_probe.interpretation.explain import Explanation, explain, explainer
from persona_probe.interpretation.interpret import interpret, interpret_all
from persona_probe.interpretation.interpretation import Interpretation, Shown
from persona_probe.interpretation.lexicon import Detection, Lexicon
from persona_probe.interpretation.logit_lens import Lens, logit_lens, nearest

__all__ = [
    "Detection",
    "Explanation",
    "Interpretation",
    "Lens",
    "Lexicon",
    "Shown",
    "explain",
    "explainer",
    "highlight",
    "interpret",
    "interpret_all",
    "logit_lens",
    "nearest",
]
