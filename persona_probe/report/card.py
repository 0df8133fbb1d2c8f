"""A finished audit in a notebook cell: verdict, reason, and the rates of its arms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import escape

ARMS = ("base", "tuned", "steered", "induced")
COLUMNS = ("misaligned", "other_persona", "incoherent", "in_domain", "skill")


def audit_card(record: Mapping[str, Any]) -> str:
    """The content of ``audit.json`` as a small HTML table; every string is escaped."""
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in COLUMNS)
    body = "".join(
        f"<tr><th>{escape(arm)}</th>"
        + "".join(f"<td>{_rate(record[arm].get(name))}</td>" for name in COLUMNS)
        + "</tr>"
        for arm in ARMS
        if record.get(arm)
    )
    after = f" → <b>{escape(record['after'])}</b>" if record.get("after") else ""
    return (
        f"<p><b>{escape(record['verdict'])}</b>{after}<br>{escape(record['reason'])}</p>"
        f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _rate(one: Mapping[str, Any] | None) -> str:
    if not one or one["rate"] is None:
        return "–"
    return f"{one['rate']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"
