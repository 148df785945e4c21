"""The contents of the share's folders, for `sam-poll status`; and putting failed jobs back.

Limitations: counting takes long where the folders are large; files move while they are counted.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from loguru import logger

from sam_poll.core.files import TEMP_PREFIX, exists, move_new, remedy_of
from sam_poll.core.safe_path import SafePath
from sam_poll.core.text import shown
from sam_poll.share.claims import liveness
from sam_poll.share.claims.model import list_work
from sam_poll.share.claims.store import PATH_ERRORS
from sam_poll.share.error_report import reported_files
from sam_poll.share.file_kinds import is_temporary
from sam_poll.share.intake.waiting import Waiting, without_partner
from sam_poll.share.layout import ERROR_ENDING, Layout, walk


@dataclass(slots=True)
class Counts:
    """Files of the five folders by kind.

    `oldest`: modification time and path of the oldest picture or prompt in `in/`.
    """

    folders: dict[str, dict[str, int]] = field(default_factory=dict)
    oldest: tuple[float, str] | None = None


def status(
    layout: Layout,
    now: float | None = None,
    *,
    counts: Counts | None = None,
    waiting: Waiting | None = None,
) -> dict[str, Any]:
    """Return counts of the five folders, the oldest job that waits, and the daemons of the share.

    `counts` and `waiting`: what the caller has counted and searched already; None: done here.

    `{"input": {"pictures": 3, "prompts": 2, "other": 0}, "work": …,
    "oldest": {"name": …, "seconds": …} | None,
    "without_partner": {"pictures": 1, "prompts": 1,
    "explained": [{"name": …, "reason": …, "remedy": …}]},
    "workers": [{"worker": …, "host": …, "pid": …, "alive": true, "beat_s": 3.2, …}]}`
    """
    now = time.time() if now is None else now
    counts = counts or _count(layout)
    report: dict[str, Any] = dict(counts.folders)
    report["oldest"] = None
    if counts.oldest:
        modified, path = counts.oldest
        report["oldest"] = {"name": path, "seconds": max(0.0, round(now - modified, 1))}
    if waiting is None:
        waiting = without_partner(layout) if layout.input.is_dir() else Waiting()
    report["without_partner"] = {
        "pictures": waiting.pictures,
        "prompts": waiting.prompts,
        "explained": [
            {"name": name, "reason": error.reason, "remedy": error.remedy}
            for name, error in waiting.explained.items()
        ],
    }
    heartbeats = (
        liveness.read_heartbeat(worker, path, now)
        for worker, path in sorted(liveness.heartbeat_files(layout.work))
    )
    report["workers"] = [heartbeat for heartbeat in heartbeats if heartbeat]
    return report


def kinds_of(name: str, found: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return the numbers by kind of one of the five folders, 0 for the kinds not `found`."""
    kinds = {"pictures": 0, "prompts": 0, "other": 0}
    if name == "failed":
        kinds["errors"] = 0
    return {**kinds, **(found or {})}


def _count(layout: Layout) -> Counts:
    counts = Counts()
    for name in layout.folders:
        count_folder(layout, name, counts)
    return counts


def count_folder(layout: Layout, name: str, counts: Counts) -> None:
    """Count the files of one of the five folders. Raises OSError."""
    folder = layout.folders[name]
    kinds = counts.folders[name] = kinds_of(name)
    if not folder.is_dir():
        return
    for path, entry in _files(layout, name, folder):
        if entry.name.startswith(TEMP_PREFIX):
            continue
        kind = kind_of(layout, entry.name, name)
        kinds[kind] += 1
        if name == "input" and kind in ("pictures", "prompts"):
            # It may just have been claimed, or lie in a folder that may only be listed.
            with contextlib.suppress(FileNotFoundError, PermissionError):
                one = (entry.stat(follow_symlinks=False).st_mtime, path)
                counts.oldest = min(counts.oldest, one) if counts.oldest else one


def _files(layout: Layout, name: str, folder: SafePath) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Return the files that count as lying in one of the five folders."""
    if name == "work":
        return _in_claims(folder)
    return walk(folder, ignored=layout.ignored) if name == "input" else walk(folder)


def _in_claims(work: SafePath) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield the files of all claims by their paths below `in/`, and the files beside the claims."""
    yield from walk(work)
    for claim in list_work(work).claims:
        # It may just have ended, or be unreadable.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            yield from (
                (f"{claim.folder}/{path}", entry) for path, entry in walk(claim.path) if claim.hold
            )


def kind_of(layout: Layout, name: str, folder: str) -> str:
    """Return the kind of a file in one of the five folders, a key of `kinds_of`."""
    if is_temporary(name):
        return "other"
    if folder == "failed" and name.endswith(ERROR_ENDING):
        return "errors"
    if folder != "output" and layout.is_prompt(name):
        return "prompts"
    return "pictures" if folder != "output" and layout.is_picture(name) else "other"


def retry(
    layout: Layout, pattern: str = "*", *, on_move: Callable[[str], None] = lambda name: None
) -> int:
    """Put failed jobs whose id matches a pattern (`cam1/*`) back into `input`; return their number.

    The files that their error reports list are moved, and the reports deleted. A job whose name is
    taken in `input` stays. `on_move` is called with the id of each job that was put back.
    """
    reports: list[str] = []
    if layout.failed.is_dir():
        reports = [path for path, entry in walk(layout.failed) if entry.name.endswith(ERROR_ENDING)]
    identities = (path[: -len(ERROR_ENDING)] for path in sorted(reports))
    matching = (identity for identity in identities if fnmatch(identity, pattern))
    return retry_jobs(layout, matching, on_move=on_move)


def retry_jobs(
    layout: Layout,
    identities: Iterable[str],
    *,
    on_move: Callable[[str], None] = lambda name: None,
) -> int:
    """Put the failed jobs with these ids back into `input`, as `retry` does; return their number.

    Jobs without an error report stay. Raises OSError for an error of the share as a whole.
    """
    jobs = 0
    for identity in identities:
        try:
            moved = _retry_one(layout, layout.failed / f"{identity}{ERROR_ENDING}", identity)
        except FileNotFoundError:  # another user has just put it back, or removed it
            moved = False
        except OSError as error:
            if error.errno not in PATH_ERRORS:
                raise
            logger.warning("{} stays in failed/: {} ({})", shown(identity), error, remedy_of(error))
            moved = False
        if moved:
            jobs += 1
            on_move(identity)
    return jobs


def _retry_one(layout: Layout, error_report: SafePath, identity: str) -> bool:
    """Put one job back. False: a name of it is taken. Raises OSError."""
    folder = os.path.dirname(identity)
    moves = [
        (error_report.with_name(name), layout.input / folder / name)
        for name in reported_files(error_report)
    ]
    moves = [(source, target) for source, target in moves if exists(source)]
    taken = [target for _, target in moves if exists(target)]
    if taken:
        logger.warning("{} stays in failed/: {} is taken", shown(identity), shown(taken[0]))
        return False
    # Prompts last: a prompt must never wait alone.
    for source, target in sorted(moves, key=lambda move: layout.is_prompt(move[0].name)):
        move_new(source, target)
    error_report.unlink(missing_ok=True)
    return True
