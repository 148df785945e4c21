"""The watcher: wakes the folder door early, and says what it saw happen to a file. A hint, never the truth.

What can still go wrong here: the kernel drops events when its queue overflows and nobody is told; network shares report
only what this machine did; a folder that is deleted and made anew is no longer watched until the next scan. The door
therefore scans every `rescan_s` in any case, and never asks whether the watcher lives.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loguru import logger

from sam_poll.doors.settle import Hint

# File systems on which another machine's writing raises no event here (inotify(7)); FUSE covers sshfs, rclone, SMB
# through gvfs, and Docker Desktop's bind mounts.
_NETWORK = ("nfs", "cifs", "smb", "fuse", "9p", "virtiofs", "ceph", "gluster", "lustre", "afs", "vboxsf", "prl_fs")
_MAX_WATCHES = 64  # each costs two threads in watchdog; more subfolders than this are found by the scan
_MOUNTS = Path("/proc/self/mountinfo")

Hinted = Callable[[str, Hint, float], object]


def file_system(path: Path, mounts: Path = _MOUNTS) -> str:
    """The type of the file system a path lies on (`ext4`, `nfs4`, `fuse.sshfs`), "" where the system does not tell."""
    try:
        lines = mounts.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ""
    best, kind = -1, ""
    target = str(path.resolve())
    for line in lines:
        left, _, right = line.partition(" - ")
        point = left.split(" ")[4].replace("\\040", " ")
        inside = point == "/" or target == point or target.startswith(point + "/")
        if inside and len(point) >= best:
            best, kind = len(point), right.split(" ")[0]
    return kind


def is_network(kind: str) -> bool:
    """Whether events of other machines are missing on this type of file system."""
    return kind.lower().startswith(_NETWORK)


class Watcher:
    """Watches a folder and some of its subfolders, each by itself (recursive watches run out silently).

    `hinted` is told path, hint and monotonic time of every event of a file; `wake` is set unless it answers False, and
    when a folder comes or goes. That a file has gone, or was read, wakes nobody. `close` ends its threads.
    """

    def __init__(self, root: Path, wake: threading.Event, hinted: Hinted) -> None:
        self._root, self._wake, self._hinted = root, wake, hinted
        self._watched: dict[Path, Any] = {}
        self._gone: deque[Path] = deque()
        self._observer: Any = None

    @property
    def stale(self) -> bool:
        """Whether a watched folder has gone, or is another one by now: `look_at` watches what has its name then."""
        return bool(self._gone)

    def look_at(self, folders: set[Path]) -> None:
        """Watch these folders (the root first, as many as can be had), and no others any more."""
        wanted = sorted(folders, key=lambda f: (len(f.parts), f))[:_MAX_WATCHES]
        try:
            self._start()
            gone = {self._gone.popleft() for _ in range(len(self._gone))}
            for folder in [f for f in self._watched if f not in wanted or f in gone]:
                self._drop(folder)
            for folder in wanted:
                if folder not in self._watched:
                    self._watched[folder] = self._observer.schedule(_Handler(self), str(folder), recursive=False)
        except OSError as error:
            # inotify's limits are reached, or the folder has just gone: the scan finds everything anyway.
            logger.warning("cannot watch {} for events ({}); it is scanned every rescan_s", self._root, error)

    def close(self) -> None:
        """End the threads."""
        observer, self._observer = self._observer, None
        self._watched.clear()
        if observer is not None:
            observer.stop()
            observer.join(5)

    def _start(self) -> None:
        if self._observer is None:
            from watchdog.observers import Observer

            # It reports on stderr that an event came while it was being stopped; nobody can do anything about that.
            logging.getLogger("watchdog").setLevel(logging.CRITICAL)
            _do_not_wait_for_partners()
            self._observer = Observer()
            self._observer.daemon = True
            self._observer.start()

    def _drop(self, folder: Path) -> None:
        watch = self._watched.pop(folder)
        with contextlib.suppress(KeyError, OSError):
            self._observer.unschedule(watch)

    def seen(self, kind: str, path: str) -> None:
        """One event of the file `path`."""
        hint = _HINTS.get(kind)
        if hint is not None and self._hinted(path, hint, time.monotonic()) is not False:
            self.stirred()

    def stirred(self, left: str = "") -> None:
        """A folder has come or gone; `left` is a path that it does not have any more."""
        if Path(left) in self._watched:
            self._gone.append(Path(left))
        self._wake.set()


def _do_not_wait_for_partners() -> None:
    """Let watchdog pass on a lone "moved from" at once.

    It holds each back for 0.5 s, and every event behind it too, hoping for the "moved to" that would make it one move.
    Our claims are such lone moves, so that after each of them new files would start half a second late (measured:
    median 524 ms from rename to claim; 32 ms without the wait). We need no such pairs: a name that appears is enough.
    """
    for module, holder in _PARTNER_WAITS:
        with contextlib.suppress(ImportError, AttributeError):
            getattr(importlib.import_module(module), holder).delay = 0.0


_PARTNER_WAITS = (
    ("watchdog.observers.inotify_move_event_grouper", "InotifyMoveEventGrouper"),  # watchdog 7
    ("watchdog.observers.inotify_buffer", "InotifyBuffer"),  # watchdog 4 to 6
)
_HINTS = {
    "created": Hint.CREATED,
    "moved": Hint.RENAMED,
    "modified": Hint.WRITING,
    "opened": Hint.OPENED,
    "closed": Hint.CLOSED,
}


class _Handler:
    """What watchdog calls; it needs only `dispatch`."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def dispatch(self, event: Any) -> None:
        if event.is_directory:
            if event.event_type in ("created", "moved", "deleted"):
                self._watcher.stirred("" if event.event_type == "created" else os.fsdecode(event.src_path))
            return
        path = event.dest_path if event.event_type == "moved" else event.src_path
        self._watcher.seen(event.event_type, os.fsdecode(path))
