"""Find the misaligned persona inside a fine-tuned language model, prove that it causes the
behaviour, and turn it off.

    import persona_probe as pp

    pair = pp.load_pair("base", "tuned")
    with pp.steer(pair.tuned, pp.load_fix("out/interventions")):
        ...

These names are imported when they are first used, so that importing the package loads no torch.
Everything else is in the packages below: `persona_probe.hooks`, `.model`, `.steering` and so on.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from persona_probe.activations.capturing import capture
    from persona_probe.activations.documents import read_documents
    from persona_probe.auditing import audit
    from persona_probe.diffing.diff import diff
    from persona_probe.diffing.timeline import timeline
    from persona_probe.evaluation.judges import load_judge
    from persona_probe.evaluation.questions import load_questions
    from persona_probe.evaluation.result import evaluate
    from persona_probe.evaluation.settings import Sampling
    from persona_probe.interpretation import interpret
    from persona_probe.model.language_model import LanguageModel, load_model
    from persona_probe.model.pair import load_pair
    from persona_probe.sae.load import load_sae
    from persona_probe.sae.train import train_sae
    from persona_probe.screening.screen import screen
    from persona_probe.steering.intervention import Intervention
    from persona_probe.steering.io import load_fix, save_fix
    from persona_probe.steering.plan import steer

__all__ = [
    "Intervention",
    "LanguageModel",
    "Sampling",
    "audit",
    "capture",
    "diff",
    "evaluate",
    "interpret",
    "load_fix",
    "load_judge",
    "load_model",
    "load_pair",
    "load_questions",
    "load_sae",
    "read_documents",
    "save_fix",
    "screen",
    "steer",
    "timeline",
    "train_sae",
]

_HOMES = {
    "activations.capturing": ["capture"],
    "activations.documents": ["read_documents"],
    "auditing": ["audit"],
    "diffing.diff": ["diff"],
    "diffing.timeline": ["timeline"],
    "evaluation.judges": ["load_judge"],
    "evaluation.questions": ["load_questions"],
    "evaluation.result": ["evaluate"],
    "evaluation.settings": ["Sampling"],
    "interpretation": ["interpret"],
    "model.language_model": ["LanguageModel", "load_model"],
    "model.pair": ["load_pair"],
    "sae.load": ["load_sae"],
    "sae.train": ["train_sae"],
    "screening.screen": ["screen"],
    "steering.intervention": ["Intervention"],
    "steering.io": ["load_fix", "save_fix"],
    "steering.plan": ["steer"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata  # slow to load, and rarely asked

        return metadata.version("persona-probe")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
