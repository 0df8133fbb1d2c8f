"""Answers side by side in the terminal, each token on a ground as deep as the fix's targets are there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from persona_probe.cli.console import out

ARMS = {"base": "base", "tuned": "tuned", "steered": "fix on"}
START = "▸"
"""Stands for the end of the prompt, which decides the first token."""
_STACKED_BELOW = 72  # columns of the terminal
_DEEPEST = (200, 70, 14)  # the tuned arm's colour in every figure


def show_prompt(record: Mapping[str, Any], arms: Mapping[str, str]) -> None:
    """One prompt and what every arm said to it."""
    last = record["messages"][-1]
    out.print(Text(last.get("content", last.get("text", "")), style="bold"))
    columns = {name: f"{ARMS[name]} ({arms[name]})" for name in arms}
    if out.width < _STACKED_BELOW:
        for name, heading in columns.items():
            out.print(Text(heading, style="dim"))
            out.print(coloured(record[name]))
    else:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for heading in columns.values():
            table.add_column(heading, ratio=1)
        table.add_row(*(coloured(record[name]) for name in columns))
        out.print(table)
    out.print()


def show_legend(found: Mapping[str, Any]) -> None:
    """What the colour means, and whether the fix over-corrects."""
    from persona_probe.cli.steer_arms import OVER_CORRECTS

    parts = [f"{gauge['label']} {gauge['low']:.3g}–{gauge['high']:.3g}" for gauge in found["gauges"]]
    legend = Text("colour: ", style="dim")
    for step in range(5):
        legend.append(" ", style=ground(step / 4))
    legend.append(f" {', '.join(parts)}; {START} is the end of the prompt", style="dim")
    out.print(legend)
    if found["over_corrects"]:
        out.print(Text(OVER_CORRECTS, style="yellow"))


def coloured(side: Mapping[str, Any]) -> Text:
    """One answer; without colours in the terminal it is the plain text."""
    text = Text(f"{START} ", style="", end="")
    text.stylize(ground(side["start"]["shade"]), 0, 1)
    for token in side["tokens"]:
        text.append(token["text"], style=ground(token["shade"]))
    if side["truncated"]:
        text.append(" …", style="dim")
    return text


def ground(shade: float | None) -> str:
    """A background between the terminal's own (0) and the deepest (1)."""
    if shade is None or shade < 0.05:
        return ""
    red, green, blue = (round(255 + (channel - 255) * shade) for channel in _DEEPEST)
    return f"{'white' if shade > 0.6 else 'black'} on rgb({red},{green},{blue})"
