"""Whether a file is complete. Pure: clock and signatures are passed in.

A file has *settled* when its signature (inode, size, time of change) has been the same for a while
by the monotonic clock. How long that must be depends on the last event that the watcher saw:

- a rename puts a complete file in place: `RENAMED_S`;
- a name that appeared and has not been opened is a rename or hard link from outside, and waits
  as long. Where a process writes, "opened" follows "created" within 1 ms;
- a close ends the work of one writer: `CLOSED_S`, because some tools close a file twice;
- a file that is being written, or of which there was no event (polling, network shares, files
  found at the start), must not change for `settle_s`: `LOCAL_S`, or `NETWORK_S` on a network share
  (setting `watch.settle_s`).

No event makes a file wait longer than `settle_s`.

Limitations: a file whose writer pauses for longer than `settle_s` counts as complete. The check for
a picture's end marker when it is decoded catches most of these.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import IntEnum
from typing import NamedTuple

RENAMED_S = 0.03
"""Seconds after which a name that has not been opened counts as renamed."""
CLOSED_S = 0.3
"""Seconds within which tools that open and close a file twice do so."""
LOCAL_S = 2.0
"""`settle_s` on a local file system."""
NETWORK_S = 10.0
"""`settle_s` on a network share: other machines' writing raises no event; attributes are cached."""


class Signature(NamedTuple):
    """What changes when a file changes."""

    inode: int
    size: int
    mtime_ns: int


class FileEvent(IntEnum):
    """The last thing that the watcher saw happen to a file."""

    OPENED = 0
    """By a writer, or by a mere reader."""
    WRITING = 1
    CREATED = 2
    """A name appeared, and has not been opened yet."""
    CLOSED = 3
    RENAMED = 4


class StabilityTracker:
    """Keeps signatures and events of files, and says which files have settled.

    Times are of one monotonic clock, in seconds.
    """

    def __init__(
        self, settle_s: float = LOCAL_S, *, closed_s: float = CLOSED_S, renamed_s: float = RENAMED_S
    ) -> None:
        self._wait = {
            FileEvent.WRITING: settle_s,
            FileEvent.CREATED: min(renamed_s, settle_s),
            FileEvent.CLOSED: min(closed_s, settle_s),
            FileEvent.RENAMED: min(renamed_s, settle_s),
        }
        self._settle_s = settle_s
        # (inode, size, mtime_ns, since when): one flat tuple a file, because there may be many.
        self._seen: dict[str, tuple[int, int, int, float]] = {}
        self._events: dict[str, tuple[FileEvent, float]] = {}

    def note_event(self, path: str, event: FileEvent, now: float) -> None:
        """Note an event of a file.

        Writing after a rename makes the file one that is being written; reading does not.
        """
        if event is FileEvent.OPENED:
            if self._events.get(path, (None,))[0] is not FileEvent.CREATED:
                return
            event = FileEvent.WRITING
        self._events[path] = (event, now)

    def note_signature(self, path: str, signature: Signature, now: float) -> float:
        """Note a file's signature, and return the seconds until it has settled if nothing changes.

        0 or less means that it has settled.
        """
        seen = self._seen.get(path)
        if seen is None or seen[:3] != signature:
            seen = self._seen[path] = (*signature, now)
        return self._left(path, seen[3], now)

    def left(self, path: str, now: float) -> float | None:
        """Return what `note_signature` would, by the last signature; None where there is none."""
        seen = self._seen.get(path)
        return None if seen is None else self._left(path, seen[3], now)

    def _left(self, path: str, since: float, now: float) -> float:
        noted = self._events.get(path)
        if noted is None:
            return since + self._settle_s - now
        event, at = noted
        if event is FileEvent.WRITING:
            return max(since, at) + self._settle_s - now
        return at + self._wait[event] - now

    def being_written(self, path: str) -> bool:
        """Return whether the last event is that of a writer who has not closed the file since."""
        return self._events.get(path, (None,))[0] is FileEvent.WRITING

    def known(self, path: str) -> Signature | None:
        """Return a file's last signature; None where there is none."""
        seen = self._seen.get(path)
        return Signature(*seen[:3]) if seen else None

    def forget_all_but(self, paths: Collection[str]) -> None:
        """Forget other files, so that a year of file names does not pile up."""
        for known in (self._seen, self._events):
            for path in [p for p in known if p not in paths]:
                del known[path]
