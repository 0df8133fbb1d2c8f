"""The audit, the main job: one call from two checkpoints to a verdict, a fix and a report."""

from persona_probe.auditing.run import Audit, audit
from persona_probe.auditing.settings import AuditRequest, AuditSettings, organism_request

__all__ = ["Audit", "AuditRequest", "AuditSettings", "audit", "organism_request"]
