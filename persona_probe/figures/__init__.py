"""Tables in, ``plotly.graph_objects.Figure`` out: one visual language for notebooks and reports.

Pure functions on dicts and tables; nothing here knows a model. plotly is imported when a figure is
drawn, so that importing this costs nothing.
"""

from persona_probe.figures.claims import control, necessity
from persona_probe.figures.dose import dose_response
from persona_probe.figures.firing import firing
from persona_probe.figures.grid import transfer
from persona_probe.figures.latents import delta_against_effect, volcano
from persona_probe.figures.layers import separability
from persona_probe.figures.rates import nulls, rates
from persona_probe.figures.timeline import trajectories

__all__ = [
    "control",
    "delta_against_effect",
    "dose_response",
    "firing",
    "necessity",
    "nulls",
    "rates",
    "separability",
    "trajectories",
    "transfer",
    "volcano",
]
