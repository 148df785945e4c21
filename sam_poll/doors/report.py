"""What lies in the share's folders, for people; and putting failed jobs back.

What can still go wrong here: counting takes as long as the folders are large, and what is counted moves meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from typing import Any

from loguru import logger

from sam_poll.doors import lease
from sam_poll.doors.claims import PATH_ERRORS, listing
from sam_poll.doors.failures import files_of
from sam_poll.doors.layout import ERROR_ENDING, Layout, walk
from sam_poll.doors.settle import is_temporary
from sam_poll.doors.waiting import Waiting, without_partner
from sam_poll.fs import TEMP_PREFIX, exists, move_new, remedy_of, shown
from sam_poll.safe_path import SafePath


def status(layout: Layout, now: float | None = None) -> dict[str, Any]:
    """Counts of the five folders, the oldest prompt or picture that waits, what has no partner, the daemons at work.

    `{"input": {"pictures": 3, "prompts": 2, "other": 0}, "work": …, "oldest": {"name": …, "seconds": …} | None,
    "without_partner": {"pictures": 1, "prompts": 1, "explained": [{"name": …, "reason": …, "remedy": …}]},
    "workers": [{"worker": …, "host": …, "pid": …, "alive": true, "beat_s": 3.2, …}]}`
    """
    now = time.time() if now is None else now
    report: dict[str, Any] = {}
    oldest: tuple[float, str] | None = None
    for name, folder in layout.folders.items():
        counts = {"pictures": 0, "prompts": 0, "other": 0}
        if name == "failed":
            counts["errors"] = 0
        report[name] = counts
        if not folder.is_dir():
            continue
        for path, entry in _files(layout, name, folder):
            if entry.name.startswith(TEMP_PREFIX):
                continue
            kind = _kind(layout, entry.name, name)
            counts[kind] = counts.get(kind, 0) + 1
            if name == "input" and kind in ("pictures", "prompts"):
                # claimed in this very moment, or in a folder that may be listed only
                with contextlib.suppress(FileNotFoundError, PermissionError):
                    age = entry.stat(follow_symlinks=False).st_mtime
                    oldest = min(oldest, (age, path)) if oldest else (age, path)
    report["oldest"] = {"name": oldest[1], "seconds": max(0.0, round(now - oldest[0], 1))} if oldest else None
    waiting = without_partner(layout) if layout.input.is_dir() else Waiting()
    report["without_partner"] = {
        "pictures": waiting.pictures,
        "prompts": waiting.prompts,
        "explained": [
            {"name": name, "reason": error.reason, "remedy": error.remedy} for name, error in waiting.explained.items()
        ],
    }
    found = (lease.read(worker, path, now) for worker, path in sorted(lease.workers(layout.work)))
    report["workers"] = [worker for worker in found if worker]
    return report


def _files(layout: Layout, name: str, folder: SafePath) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """What counts as lying in one of the five folders."""
    if name == "work":
        return _in_claims(folder)
    return walk(folder, ignored=layout.ignored) if name == "input" else walk(folder)


def _in_claims(work: SafePath) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """The files of all claims, by their paths below `in/`, and what lies beside the claims."""
    yield from walk(work)
    for claim in listing(work).claims:
        # it has just ended, or may not be read
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            yield from ((f"{claim.folder}/{path}", entry) for path, entry in walk(claim.path) if claim.hold)


def _kind(layout: Layout, name: str, folder: str) -> str:
    if is_temporary(name):
        return "other"
    if folder == "failed" and name.endswith(ERROR_ENDING):
        return "errors"
    if folder != "output" and layout.is_prompt(name):
        return "prompts"
    return "pictures" if folder != "output" and layout.is_picture(name) else "other"


def retry(layout: Layout, pattern: str = "*", *, on_move: Callable[[str], None] = lambda name: None) -> int:
    """Put failed jobs whose id matches the pattern (`cam1/*`) back into `input` and drop their error files.

    Returns the number of jobs. What the error file lists is moved; a name taken in `input` is left where it is.
    """
    jobs = 0
    errors = [p for p, e in walk(layout.failed) if e.name.endswith(ERROR_ENDING)] if layout.failed.is_dir() else []
    for path in sorted(errors):
        error_file = layout.failed / path
        identity = path[: -len(ERROR_ENDING)]
        if not fnmatch(identity, pattern):
            continue
        try:
            again = _retry_one(layout, error_file, identity)
        except OSError as error:
            if error.errno not in PATH_ERRORS:
                raise
            logger.warning("{} stays in failed/: {} ({})", shown(identity), error, remedy_of(error))
            again = False
        if again:
            jobs += 1
            on_move(identity)
    return jobs


def _retry_one(layout: Layout, error_file: SafePath, identity: str) -> bool:
    """Put one job back. False: a name of it is taken. OSError."""
    files = files_of(error_file)
    folder = os.path.dirname(identity)
    moves = [(error_file.with_name(f), layout.input / folder / f) for f in files]
    moves = [(source, target) for source, target in moves if exists(source)]
    taken = [target for _, target in moves if exists(target)]
    if taken:
        logger.warning("{} stays in failed/: {} is taken", shown(identity), shown(taken[0]))
        return False
    for source, target in sorted(moves, key=lambda m: layout.is_prompt(m[0].name)):
        move_new(source, target)
    error_file.unlink(missing_ok=True)
    return True
