"""Training-time defences: one file each, with its source, formula and departure; see `defence`."""

from persona_probe.training.defences.caft import CAFT
from persona_probe.training.defences.defence import Defence, Reading
from persona_probe.training.defences.inoculation import Inoculation
from persona_probe.training.defences.interleave import Interleave
from persona_probe.training.defences.kl import KL
from persona_probe.training.defences.latent_blocking import LatentBlocking
from persona_probe.training.defences.ldifs import LDIFS
from persona_probe.training.defences.on_policy import OnPolicy
from persona_probe.training.defences.perplexity_gap import InterleaveByGap, perplexity_gaps
from persona_probe.training.defences.preventative import PreventativeSteering
from persona_probe.training.defences.safe_lora import SafeLoRA

__all__ = [
    "CAFT",
    "KL",
    "LDIFS",
    "Defence",
    "Inoculation",
    "Interleave",
    "InterleaveByGap",
    "LatentBlocking",
    "OnPolicy",
    "PreventativeSteering",
    "Reading",
    "SafeLoRA",
    "perplexity_gaps",
]
