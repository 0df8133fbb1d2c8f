"""Answers side by side as one page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import jinja2

from persona_probe.figures.style import FONT, INK, LOOKS, QUIET, RULE
from persona_probe.report.page import TEMPLATES

POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""The page runs no script and asks for nothing."""
HEADINGS: Final = {"base": "base", "tuned": "fine-tuned", "steered": "fix on"}


def answers_page(found: Mapping[str, Any]) -> str:
    """The page of what `persona-probe steer --json` prints, every string escaped.

    Each token stands on a ground as deep as the fix's targets are there; resting on it shows the
    amounts.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    labels = [gauge["label"] for gauge in found["gauges"]]
    return environment.get_template("answers.html.j2").render(
        policy=POLICY,
        names=[(HEADINGS[arm], name) for arm, name in found["arms"].items()],
        prompts=[_prompt(record, list(found["arms"]), labels) for record in found["prompts"]],
        gauges=found["gauges"],
        fix=found["fix"],
        over_corrects=found["over_corrects"],
        sampling=", ".join(
            f"{name} {value:g}" for name, value in found["sampling"].items() if type(value) in (int, float)
        ),
        look={"font": FONT, "ink": INK, "quiet": QUIET, "rule": RULE, "tone": _rgb(LOOKS["tuned"].colour)},
    )


def _prompt(record: Mapping[str, Any], arms: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    last = record["messages"][-1]
    return {
        "text": last.get("content", last.get("text", "")),
        "sides": [
            {
                "start": _token({**record[arm]["start"], "text": "▸"}, labels),
                "tokens": [_token(token, labels) for token in record[arm]["tokens"]],
                "truncated": record[arm]["truncated"],
                "edits": record[arm]["edits"],
            }
            for arm in arms
        ],
    }


def _token(token: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    amounts, shade, text = token["amounts"], token["shade"] or 0, token["text"]
    word = text.lstrip(" ")
    return {
        # the ground is the word's, not the space before it
        "before": text[: len(text) - len(word)],
        "text": word,
        "shade": f"{shade:.2f}",
        "deep": shade > 0.6,
        "title": "not read"
        if amounts is None
        else ", ".join(f"{label}: {z:.3g}" for label, z in zip(labels, amounts, strict=True)),
    }


def _rgb(colour: str) -> str:
    return " ".join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))
