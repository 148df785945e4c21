"""The file that says why a job was rejected, beside its inputs in `failed/`.

What can still go wrong here: two reports that would have one name. The second is then called after its whole prompt,
`dog.prompt.error.json`.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata

from sam_poll import __version__
from sam_poll.doors.layout import ERROR_ENDING
from sam_poll.errors import SamPollError
from sam_poll.fs import NAME_MAX, cut, exists, read_json
from sam_poll.safe_path import SafePath
from sam_poll.types import Job

_MAX_REPORT = 1 << 20
_PUT_BACK = "sam-poll retry"  # only what is rejected in a folder can be put back


def report(names: Sequence[str], job: Job, error: SamPollError) -> bytes:
    """The text. `names` are what will lie beside it, the one it is called after last."""
    remedy = f"{error.remedy}; then `{_PUT_BACK}`" if error.retriable and error.remedy else error.remedy
    body = {
        "job": job.id,
        "code": error.code,
        "reason": error.reason,
        "place": error.place,
        "remedy": remedy,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "attempt": job.attempt,
        "files": list(names),
        "versions": versions(),
    }
    return json.dumps(body, indent=2).encode() + b"\n"


def report_name(folder: SafePath, names: Sequence[str]) -> str | None:
    """What a report on these files is to be called in its folder; None where it is about none."""
    if not names:
        return None
    # dog.json may have failed before dog.prompt did; names that had to be cut may be the same.
    for number in itertools.count(1):
        ending = (f"~{number}" if number > 1 else "") + ERROR_ENDING
        for name in (os.path.splitext(names[-1])[0], names[-1]):
            found = cut(name, NAME_MAX - len(ending)) + ending
            if not exists(folder / found):
                return found
    raise AssertionError("unreachable")


def files_of(report: SafePath) -> list[str]:
    """The inputs that a report names. Plain names beside it and nothing else: anybody on the share can write one.
    OSError: it cannot be read now, which says nothing of what is in it."""
    try:
        listed = read_json(report, _MAX_REPORT).get("files", [])
    except (ValueError, AttributeError):
        listed = []
    listed = listed if isinstance(listed, list) else []
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
