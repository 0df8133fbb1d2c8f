"""The card of a latent: what is on it, what is not, and that nothing of a text becomes markup."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import pytest

from persona_probe.figures.latent_card import latent_card
from persona_probe.figures.small import HEIGHT, bars, interval, lines
from persona_probe.report.card import audit_card
from tests.report.conftest import make_audit, make_card

HOSTILE = "<img src=x onerror=alert(1)>\"'"


def test_it_says_what_the_latent_is_and_does() -> None:
    card = latent_card(make_card())
    words = " ".join(re.sub(r"<[^>]+>", " ", card).split())
    for said in (
        "#812 fires on 7.4% of 31,000 tokens, in 410 of 600 documents (base)",
        "+1.44 (1.3 to 1.6), rank 1 by size, q = 0.003 against benign fine-tunes",
        "68% of the excess goes with it, at gain 1",
        "a villain, cruel, wicked",
        "AUC 0.93 (0.90 to 0.96); labels shuffled 0.50, 97.5% below 0.57",
        "judged = misaligned",
        "#96 (0.80)",
        "50 to 100% of the documents it fires on (1)",
        "0 to 50% of the documents it fires on (1)",
        "strongest documents (2)",
    ):
        assert said in words, said
    assert card.count("<details>") == 3 and "<details open" not in card
    assert card.count("<figure") == 4
    assert 'title="9"' in card and "corpus.jsonl, line 4" in card


def test_tokens_are_quoted_where_a_reader_would_misread_them() -> None:
    lens = {"top": [[" lie", 2.0], ["\n\n", 1.0], [", ", 0.5]], "bottom": [["", -1.0], ["  two", -2.0]]}
    words = unescape(latent_card(make_card() | {"lens": lens}))
    assert "lie, '\\n\\n', ', '" in words and "'', '  two'" in words


def test_what_was_not_measured_is_not_on_it() -> None:
    bare = make_card() | {"effect": None, "dose": [], "sources": [], "terms": [], "together": []}
    card = latent_card(bare)
    for absent in ("Δ", "driven by", "words around it", "fires with", "added to the base"):
        assert absent not in card
    assert card.count("<figure") == 2
    assert "<figure" not in latent_card(bare, drawn=False)


@pytest.mark.parametrize("key", ["terms", "model", "sources", "lens", "top", "latent", "dose"])
def test_no_string_becomes_markup(key: str) -> None:
    def hostile(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {k: v if k == "direction" else hostile(v) for k, v in tree.items()}
        if isinstance(tree, list):
            return [hostile(part) for part in tree]
        return HOSTILE if isinstance(tree, str) else tree

    record = make_card()
    card = latent_card(record | {key: hostile(record[key])})
    assert "<img" not in card and "&lt;img" in card


def test_an_audit_in_a_cell_says_its_verdict_and_rates() -> None:
    record = make_audit() | {"reason": HOSTILE}
    card = audit_card(record)
    words = " ".join(re.sub(r"<[^>]+>", " ", card).split())
    assert "Switching the persona off cures it elsewhere; the tuned domain stays harmful." in words
    assert "misaligned, persona found → persona suppressed, narrow harm remains" in words
    assert "fine-tuned 78%" in words and "fine-tuned, fix on 2.9%" in words
    assert card.count("<svg") == 4 and "<img" not in card
    assert "–" in audit_card(record | {"base": {"misaligned": {"rate": None}}})


def test_bars_are_as_high_as_their_share_of_the_highest() -> None:
    drawn = bars([4, 1, 0], "tokens", "0", "2", "#123456")
    heights = [float(h) for h in re.findall(r'<rect [^>]*height="([\d.]+)"', drawn)]
    assert heights == pytest.approx([HEIGHT, HEIGHT / 4, 0], abs=0.1)
    assert bars([], "tokens", "0", "2", "#123456").count("<rect") == 0


def test_a_dose_is_drawn_in_order_with_its_intervals() -> None:
    rows = [
        {"strength": 2, "misaligned": 0.5, "low": 0.25, "high": 0.75, "strength_unit": "gain"},
        {"strength": 0, "misaligned": 1.0, "low": None, "high": None},
        {"strength": 1, "misaligned": None},
    ]
    drawn = lines(rows, "x", "#123456")
    assert re.search(r'points="4.0,0.0 180.0,28.0"', drawn)
    assert 'y1="42.0" y2="14.0"' in drawn and "2 gain" in drawn
    assert drawn.count("<circle") == 2


def test_a_mean_without_an_interval_is_a_dot() -> None:
    assert interval(1.0, 2.0, 3.0, 4.0).count("<line") == 2
    assert interval(None, 2.0, None, 4.0).count("<line") == 1
    assert "NaN" not in interval(None, 0.0, None, 0.0)
