"""What is written to disk is whole or absent, and says what made it."""

from persona_probe.artifact.atomic import (
    StrPath,
    atomic_file,
    atomic_folder,
    check_replaceable,
    check_writable,
    disk_full_named,
    remove,
)
from persona_probe.artifact.provenance import (
    check_manifest,
    digest_file,
    digest_folder,
    digest_of,
    digests_at,
    shipped,
    versions,
    write_manifest,
)
from persona_probe.artifact.records import (
    append_jsonl,
    plain,
    read_json,
    read_jsonl,
    read_text,
    write_json,
    write_jsonl,
    write_text,
)
from persona_probe.artifact.run_folder import RunFolder

__all__ = [
    "RunFolder",
    "StrPath",
    "append_jsonl",
    "atomic_file",
    "atomic_folder",
    "check_manifest",
    "check_replaceable",
    "check_writable",
    "digest_file",
    "digest_folder",
    "digest_of",
    "digests_at",
    "disk_full_named",
    "plain",
    "read_json",
    "read_jsonl",
    "read_text",
    "remove",
    "shipped",
    "versions",
    "write_json",
    "write_jsonl",
    "write_manifest",
    "write_text",
]
