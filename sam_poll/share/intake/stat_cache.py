"""What is known about the files in `in/`, with as few `lstat` calls as possible.

There may be very many files, and a share may be slow. `lstat` is called for a file when it is first
needed, when the watcher has seen something happen to it, when it is to be checked again (`doubt`),
and once more before it is claimed (`changed`). Where the last of these calls finds what the first
one found, the file has been the same for all the time between.

Limitations: a writer that sets a file's size and time back before the next call is not noticed.
"""

from __future__ import annotations

import os
import stat
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

from sam_poll.core.files import NOT_THERE
from sam_poll.core.safe_path import SafePath
from sam_poll.prompts.mask_files import is_mask_file
from sam_poll.share.file_kinds import is_temporary
from sam_poll.share.intake.stability import FileEvent, Signature, StabilityTracker
from sam_poll.share.layout import Layout

NEVER = float("inf")
_MAX_EVENTS = 100_000


class StatCache:
    """What is known about the files in `in/`. Paths are relative to it.

    Used by one thread, except `note_event`.
    """

    def __init__(
        self,
        layout: Layout,
        settle_s: float,
        clock: Callable[[], float] = time.monotonic,
        changed: Callable[[str], object] = lambda path: None,
    ) -> None:
        """Create an empty cache.

        `changed` is called with each file whose signature has changed.
        """
        self._layout = layout
        self._clock = clock
        self._changed = changed
        self._prefix = f"{layout.input}/"
        self._input = layout.input
        self._stability = StabilityTracker(settle_s)
        self._events: deque[tuple[str, FileEvent, float]] = deque(maxlen=_MAX_EVENTS)
        self._doubted: set[str] = set()
        self._budget_s = 0.0
        self._spent_s = 0.0
        self.closed: set[str] = set()
        """Folders for whose files `lstat` is not permitted."""
        self.soonest = NEVER
        """When the first of the files requested since `begin` settles."""
        self.out_of_time = False
        """Whether since `begin` there was no time left for some of the files requested."""

    def begin(self, budget_s: float) -> None:
        """Begin a scan, which may spend this long on looking at files."""
        self._budget_s, self._spent_s = budget_s, 0.0
        self.soonest, self.out_of_time = NEVER, False

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the time of the block as spent on looking at files.

        The time of other work does not count, so that each scan makes progress.
        """
        started = self._clock()
        try:
            yield
        finally:
            self._spent_s += self._clock() - started

    # ── events ──

    def note_event(self, path: str, event: FileEvent, at: float) -> bool:
        """Note an event, from the watcher's thread.

        Returns whether it is a reason to scan.
        """
        name = path[path.rfind("/") + 1 :]
        layout = self._layout
        if is_temporary(name) or not (
            layout.is_prompt(name) or layout.is_picture(name) or is_mask_file(name)
        ):
            return False
        if self._layout.ignored.patterns and self._layout.ignored.file(self._below(path)):
            return False
        self._events.append((path, event, at))
        return event is not FileEvent.OPENED

    def take_events(self) -> bool:
        """Take in the events noted so far, and return whether any of them tells of a change."""
        any_change = False
        while self._events:
            where, event, at = self._events.popleft()
            if where.startswith(self._prefix):
                path = where[len(self._prefix) :]
            else:
                path = self._below(where)
            self._stability.note_event(path, event, at)
            if event is not FileEvent.OPENED:
                self._doubted.add(path)
                any_change = True
        return any_change

    def _below(self, where: str) -> str:
        return os.path.relpath(where, self._input.path).replace(os.sep, "/")

    # ── what is known ──

    def forget_all_but(self, paths: Collection[str]) -> None:
        """Forget files that are gone."""
        self._stability.forget_all_but(paths)
        self._doubted.intersection_update(paths)

    def doubt(self, paths: Iterable[str]) -> None:
        """Check these files again when they are next requested."""
        self._doubted.update(paths)

    def known(self, path: str) -> Signature | None:
        """Return a file's last signature; None where it was never looked at."""
        return self._stability.known(path)

    def all_known(self, paths: Iterable[str]) -> dict[str, Signature]:
        """Return the last signatures of those of these files that were ever looked at."""
        return {path: seen for path in paths if (seen := self.known(path))}

    def being_written(self, path: str) -> bool:
        """Return whether a writer has a file open, by the last event of it."""
        return self._stability.being_written(path)

    # ── looking ──

    def settled(self, path: str) -> bool:
        """Return whether a file has settled, looking at it if necessary.

        Returns False, too, where the file is gone or there is no time left in this scan.
        """
        left = None if path in self._doubted else self._stability.left(path, self._clock())
        if left is None:
            if self.is_out_of_time() or self.refresh(path) is None:
                return False
            left = self.left(path)
        if left > 0:
            self.soonest = min(self.soonest, self._clock() + left)
        return left <= 0

    def is_out_of_time(self) -> bool:
        """Return whether this scan has spent its time; what is left is then for the next scan."""
        if self._spent_s < self._budget_s:
            return False
        self.out_of_time = True
        return True

    def refresh(self, path: str) -> Signature | None:
        """Return a file's signature as it is now; None where the file is gone. Raises OSError."""
        started = self._clock()
        known = self._stability.known(path)
        try:
            signature = _signature(self._input / path)
            if self.closed:
                self.closed.discard(path.rpartition("/")[0])
        except PermissionError:  # a folder may permit listing, but not looking at its files
            signature = None
            self.closed.add(path.rpartition("/")[0])
        self._doubted.discard(path)
        if known not in (signature, None):
            self._changed(path)
        now = self._clock()
        self._spent_s += now - started
        if signature:
            # By the time of this very call: a scan of a slow share may have begun long ago.
            self._stability.note_signature(path, signature, now)
        return signature

    def changed(self, signatures: dict[str, Signature]) -> list[str]:
        """Return which of these files have changed. They must settle again."""
        return [path for path, seen in signatures.items() if self.refresh(path) != seen]

    def left(self, path: str) -> float:
        """Return the seconds until a file that was looked at has settled."""
        return self._stability.left(path, self._clock()) or 0.0


def file_signature(path: SafePath) -> Signature | None:
    """Return a regular file's signature.

    Returns None where it is not there, is something else, or is in a folder that is not permitted.
    Raises OSError.
    """
    try:
        return _signature(path)
    except PermissionError:
        return None


def _signature(path: SafePath) -> Signature | None:
    try:
        status = path.lstat()
    except OSError as error:
        if error.errno in NOT_THERE:
            return None
        raise
    if not stat.S_ISREG(status.st_mode):
        return None
    return Signature(status.st_ino, status.st_size, status.st_mtime_ns)
