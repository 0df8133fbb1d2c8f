"""The only code that touches torch hooks: what a hook name means, reading it, editing it."""

from persona_probe.hooks.capture import Captured, capture_at
from persona_probe.hooks.edit import Edit, edit_at
from persona_probe.hooks.sites import (
    KINDS,
    Site,
    blocks_of,
    check_site,
    parse_site,
    resid_post,
    site_names,
)

__all__ = [
    "KINDS",
    "Captured",
    "Edit",
    "Site",
    "blocks_of",
    "capture_at",
    "check_site",
    "edit_at",
    "parse_site",
    "resid_post",
    "site_names",
]
