"""Error reports: the file beside a rejected job's inputs in `failed/` that says why.

Of two reports that would have one name, the second is called after its whole prompt,
`dog.prompt.error.json`.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from sam_poll import __version__
from sam_poll.core import distributions
from sam_poll.core.errors import SamPollError
from sam_poll.core.files import NAME_MAX, exists, read_json
from sam_poll.core.safe_path import SafePath
from sam_poll.core.text import cut
from sam_poll.core.types import Job
from sam_poll.share.layout import ERROR_ENDING

_MAX_BYTES = 1 << 20
_MAX_TEXT = 2000
_RETRY = "sam-poll retry"  # part of the remedy here only: other sources have no such command


def encode_report(names: Sequence[str], job: Job, error: SamPollError) -> bytes:
    """Return the content of a report.

    `names`: the files that will lie beside it; the report is named after the last one.
    """
    remedy = error.remedy
    if error.retriable and error.remedy:
        remedy = f"{error.remedy}; then `{_RETRY}`"
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
    """Return the name of a report on these files in its folder; None: there are no files.

    An older report on a file of the same name is to be replaced: its file had gone before this one
    came, since a file that is moved to the folder never gets a name that is taken.
    """
    if not names:
        return None
    # The name is taken when dog.json was rejected before dog.prompt; or when two names were cut.
    for number in itertools.count(1):
        ending = (f"~{number}" if number > 1 else "") + ERROR_ENDING
        for name in (os.path.splitext(names[-1])[0], names[-1]):
            candidate = cut(name, NAME_MAX - len(ending)) + ending
            if not exists(folder / candidate) or _is_outdated(folder / candidate, names[-1]):
                return candidate
    raise AssertionError("unreachable")


def _is_outdated(report: SafePath, name: str) -> bool:
    """Return whether a report is one on an earlier file of this name."""
    try:
        return name in reported_files(report)
    except OSError:  # another user's, who keeps it to himself
        return False


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """A report as it was read: texts are at most `_MAX_TEXT` characters, "" where there is none.

    `files`: the inputs that it names. Only plain names beside the report are among them.
    """

    code: str = ""
    reason: str = ""
    place: str = ""
    remedy: str = ""
    files: tuple[str, ...] = ()


def read_report(path: SafePath) -> ErrorReport:
    """Read a report. Every user of the share can write one: a malformed one is empty.

    Raises OSError where it cannot be read now, which says nothing about its content.
    """
    try:
        content = read_json(path, _MAX_BYTES)
    except ValueError:
        return ErrorReport()
    if not isinstance(content, dict):
        return ErrorReport()
    files = content.get("files")
    names = [name for name in files if _is_plain(name)] if isinstance(files, list) else []
    texts = {
        key: value[:_MAX_TEXT]
        for key in ("code", "reason", "place", "remedy")
        if isinstance(value := content.get(key), str)
    }
    return ErrorReport(files=tuple(names), **texts)


def reported_files(path: SafePath) -> list[str]:
    """Return the inputs that a report names, as `read_report`."""
    return list(read_report(path).files)


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and name == os.path.basename(name) and name not in ("", ".", "..")


def versions() -> dict[str, str]:
    """Return the versions of the packages that make answers, without importing them."""
    found = distributions.installed("torch", "segment-anything", "opencv-python")
    for name, version in distributions.installed(*distributions.SAM2).items():
        found["sam2"] = version if name == "sam2" else f"{name} {version}"
    return {"sam_poll": __version__, **found}
