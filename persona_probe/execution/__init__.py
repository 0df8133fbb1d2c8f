"""Shards of a job, run in this process, in several, or on a Ray cluster: the same files either way."""

from persona_probe.execution.local import run_local
from persona_probe.execution.shares import Share, UnfinishedError, read_share
from persona_probe.execution.tasks import Done, Failure, Results, Task, Worker

__all__ = [
    "Done",
    "Failure",
    "Results",
    "Share",
    "Task",
    "UnfinishedError",
    "Worker",
    "read_share",
    "run_local",
]
