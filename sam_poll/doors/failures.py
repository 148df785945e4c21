"""The file that says why a job was rejected, beside its inputs in `failed/`.

What can still go wrong here: a daemon that dies between the report and the moving of the inputs leaves a report without
inputs; the next report on the same job takes its place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from sam_poll import __version__
from sam_poll.doors.layout import ERROR_ENDING
from sam_poll.errors import SamPollError
from sam_poll.fs import exists, with_suffix, write_whole
from sam_poll.types import Job

_NAME_MAX = 255  # bytes; ext4, XFS, and most others


def write_report(plain: Path, suffix: str, names: Sequence[str], job: Job, error: SamPollError) -> None:
    """Write `<stem><suffix>.error.json`; `plain` is the input it is named after, `names` what will lie beside it."""
    place = with_suffix(plain, suffix)
    body = {
        "job": job.id,
        "code": error.code,
        "reason": error.reason,
        "place": error.place,
        "remedy": error.remedy,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "attempt": job.attempt,
        "files": list(names),
        "versions": versions(),
    }
    place.parent.mkdir(parents=True, exist_ok=True)
    target = place.with_name(_cut(place.stem) + ERROR_ENDING)
    if exists(target) and not _stale(target):  # dog.json failed before dog.prompt did
        target = place.with_name(_cut(place.name) + ERROR_ENDING)
    write_whole(target, json.dumps(body, indent=2).encode() + b"\n")


def _cut(stem: str) -> str:
    return os.fsdecode(os.fsencode(stem)[: _NAME_MAX - len(ERROR_ENDING)])


def _stale(report: Path) -> bool:
    """Whether nothing of what a report is about lies beside it."""
    return not any(exists(report.with_name(name)) for name in files_of(report))


def files_of(report: Path) -> list[str]:
    """The inputs that a report names. Plain names beside it and nothing else: anybody on the share can write one."""
    try:
        listed = json.loads(report.read_bytes()).get("files", [])
    except (OSError, ValueError, AttributeError):
        listed = []
    return [f for f in listed if isinstance(f, str) and f == os.path.basename(f) and f not in ("", ".", "..")]


def versions() -> dict[str, str]:
    """What made an answer: package versions, read without importing them."""
    found = {"sam_poll": __version__}
    for package in ("torch", "sam2", "segment-anything", "opencv-python"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
