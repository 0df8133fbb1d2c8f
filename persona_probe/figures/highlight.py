"""Tokens on paper the darker the more a latent fires, for notebooks and pages."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from persona_probe.figures.style import LOOKS

_RED, _GREEN, _BLUE = (int(LOOKS["tuned"].colour[i : i + 2], 16) for i in (1, 3, 5))
DARKEST = 0.75
"""Opacity at the maximum: text stays readable."""


class Token(NamedTuple):
    """One token of a document, as text."""

    text: str
    value: float | None
    """The latent's activation there; None where the token did not count."""
    special: bool


def highlight(tokens: Sequence[Token], maximum: float) -> str:
    """`tokens` as HTML, shaded by activation over `maximum`; hovering over a token tells the number."""
    return "".join(_marked(token, maximum) for token in tokens)


def _marked(token: Token, maximum: float) -> str:
    text = escape(token.text).replace("\n", "⏎\n")
    if token.special:
        return f'<span style="opacity:.45">{text}</span>'
    if not token.value:
        return text
    strength = DARKEST * min(1.0, max(0.0, token.value) / maximum) if maximum > 0 else 0.0
    return (
        f'<span style="background:rgba({_RED},{_GREEN},{_BLUE},{strength:.2f})" '
        f'title="{token.value:.3g}">{text}</span>'
    )


def excerpt(tokens: Sequence[Token], width: int = 60) -> list[Token]:
    """At most `width` tokens around the strongest, an ellipsis where some were left out."""
    if len(tokens) <= width:
        return list(tokens)
    peak = max(range(len(tokens)), key=lambda i: tokens[i].value or 0.0)
    start = min(max(0, peak - 2 * width // 3), len(tokens) - width)
    cut = Token("…", None, special=True)
    shown = list(tokens[start : start + width])
    return [*([cut] if start else []), *shown, *([cut] if start + width < len(tokens) else [])]
