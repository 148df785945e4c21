"""Claiming jobs one after another: a path that prevents a claim is held, the others go on."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator

from loguru import logger

from sam_poll.core.errors import ClaimLostError
from sam_poll.core.types import Job
from sam_poll.share.claims.model import ClaimEntry, claims_in
from sam_poll.share.context import ShareContext
from sam_poll.share.job_factory import JobFactory
from sam_poll.share.pending_job import PendingJob

_MAX_FAILURES = 5  # failed claims in one folder, after which other folders come first
_MAX_POSTPONED = 50  # postponed groups that are tried in one scan


class JobClaimer:
    """Calls a `JobFactory` and holds the paths for which it fails. For the scan's thread.

    `wake` requests another scan. Both methods that return jobs return none where a claim failed,
    and raise OSError where the share as a whole cannot be used.
    """

    def __init__(
        self, context: ShareContext, factory: JobFactory, *, wake: Callable[[], None]
    ) -> None:
        self._factory = factory
        self._active = context.active
        self._holds = context.holds
        self._wake = wake
        self._failures: Counter[str] = Counter()

    def claim(self, group: list[PendingJob]) -> list[Job]:
        """Claim a picture with its prompts and return the jobs."""
        pairs = (file for pending in group for file in (pending.picture, pending.prompt) if file)
        files = list(dict.fromkeys(pairs))
        if self._holds.blocks(*files):  # held since an earlier claim of this scan failed
            return []
        try:
            jobs = self._factory.claim(group)
        except ClaimLostError as error:
            _log_lost(error)
            return []
        except OSError as error:
            if not self._holds.failed_to_take(error, files, time.monotonic()):
                raise
            self._failures[folder_of(group)] += 1
            self._wake()
            return []
        if jobs:
            self._holds.worked(*files)
        return jobs

    def resume(self, entry: ClaimEntry, *, handed: bool = False) -> list[Job]:
        """Take a claim over, move its files if it has ended, and return its jobs.

        `handed`: see `JobFactory.resume`.
        """
        try:
            jobs = self._factory.resume(entry, handed=handed)
            if not jobs:
                self._check_removed(entry)
        except ClaimLostError as error:
            _log_lost(error)
            return []
        except OSError as error:
            if not self._holds.failed_claim(error, entry.outer, time.monotonic()):
                raise
            self._wake()
            return []
        if not jobs:
            self._holds.ended(entry.outer)
        return jobs

    def _check_removed(self, entry: ClaimEntry) -> None:
        """Raise OSError where a claim that has ended is still there.

        It is not an error where files are in it: the daemon that it was taken over from has just
        moved them there, and the next scan moves them out.
        """
        left = [
            other
            for other in claims_in(entry.folder, entry.outer)
            if self._active.left_behind(other)
        ]
        if any(other.has_files() for other in left):
            self._wake()
        elif left:
            raise OSError(
                errno.ENOTEMPTY, "a claim that has ended cannot be removed", str(entry.outer)
            )

    def failing_folders_last(self, groups: list[list[PendingJob]]) -> Iterator[list[PendingJob]]:
        """Yield groups to claim; those of folders where several claims have failed come last.

        Thousands of files that cannot be moved must not delay those of other folders: only some of
        them are tried.
        """
        self._failures.clear()
        postponed: list[list[PendingJob]] = []
        for group in groups:
            if self._failures[folder_of(group)] < _MAX_FAILURES:
                yield group
            else:
                postponed.append(group)
        yield from postponed[:_MAX_POSTPONED]


def folder_of(group: list[PendingJob]) -> str:
    """Return the folder of a group's files, relative to `in/`."""
    return os.path.dirname(group[0].picture or group[0].prompt or "")


def _log_lost(error: ClaimLostError) -> None:
    logger.warning("claiming took longer than the lease: {}", error)
