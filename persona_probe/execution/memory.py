"""How much memory is left."""

from __future__ import annotations

from pathlib import Path


def free_memory() -> int | None:
    """Bytes that a new process can take: what the system has left, within a container's limit."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no such file, or "max": no limit
        return free
    return min(free, max(limit - used, 0))
