"""One offline page from the tables of an audit."""

from persona_probe.report.page import render, write_report

__all__ = ["render", "write_report"]
