"""The watcher: starts scans early, and says what happened to a file.

An event is only a hint: the scan decides. It runs every `rescan_s` in any case, and never needs to
know whether the watcher works.

Limitations: the kernel drops events without notice when its queue overflows. Network shares report
only what this machine did. A folder that is deleted and made again is not watched before the next
scan.
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

from sam_poll.share.intake.stability import FileEvent

# File systems on which another machine's writing raises no event here (inotify(7)). FUSE covers
# sshfs, rclone, SMB through gvfs, and Docker Desktop's bind mounts.
_NETWORK = (
    "nfs",
    "cifs",
    "smb",
    "fuse",
    "9p",
    "virtiofs",
    "ceph",
    "gluster",
    "lustre",
    "afs",
    "vboxsf",
    "prl_fs",
)
_MAX_WATCHES = 64  # each costs two threads in watchdog; the scan finds files in further subfolders
_MOUNTS = Path("/proc/self/mountinfo")
_JOIN_S = 5

NoteEvent = Callable[[str, FileEvent, float], object]


def file_system(path: Path, mounts: Path = _MOUNTS) -> str:
    """Return the type of a path's file system (`ext4`, `nfs4`, `fuse.sshfs`).

    Returns "" where the system does not tell.
    """
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
    """Return whether this type of file system gives no events of other machines."""
    return kind.lower().startswith(_NETWORK)


class Watcher:
    """Watches a folder and some of its subfolders, each by itself.

    Recursive watches are not used, because they reach the system's limits without notice.

    `note_event` is called with path, event and monotonic time of every event of a file. `wake` is
    set unless it returns False, and when a folder comes or goes. A file that goes, or is read, does
    not set it. `close` ends the threads; after `end`, which a thread other than that of `watch` may
    call, none is started any more.
    """

    def __init__(self, root: Path, wake: threading.Event, note_event: NoteEvent) -> None:
        self._root = root
        self._wake = wake
        self._note_event = note_event
        self._watched: dict[Path, Any] = {}
        self._gone: deque[Path] = deque()
        self._observer: Any = None
        self._ended = False

    @property
    def stale(self) -> bool:
        """Return whether a watched folder has gone, or been replaced; `watch` then renews it."""
        return bool(self._gone)

    def watch(self, folders: set[Path]) -> None:
        """Watch these folders and no others: the root first, and as many as the limits permit.

        One below the root that has just gone is passed over, and makes the watcher stale.
        """
        wanted = sorted(folders, key=lambda f: (len(f.parts), f))[:_MAX_WATCHES]
        try:
            # Both stay those of this call, whatever another thread does to the attributes.
            observer, watched = self._started(), self._watched
            if observer is None:
                return
            gone = {self._gone.popleft() for _ in range(len(self._gone))}
            for folder in [f for f in watched if f not in wanted or f in gone]:
                with contextlib.suppress(KeyError, OSError):
                    observer.unschedule(watched.pop(folder))
            for folder in wanted:
                if folder not in watched:
                    try:
                        watched[folder] = observer.schedule(
                            _Handler(self), str(folder), recursive=False
                        )
                    except (FileNotFoundError, NotADirectoryError):
                        if folder == self._root:
                            raise
                        self._gone.append(folder)
        except OSError as error:
            # inotify's limits are reached, or the root has just gone: the scan finds all files.
            logger.warning(
                "cannot watch {} for events ({}); it is scanned every rescan_s", self._root, error
            )

    def close(self) -> None:
        """End the threads."""
        observer, self._observer = self._observer, None
        self._watched = {}
        if observer is not None:
            observer.stop()
            observer.join(_JOIN_S)

    def end(self) -> None:
        """End the threads for good."""
        self._ended = True
        self.close()

    def _started(self) -> Any:
        """Return the running observer; None after `end`."""
        observer = self._observer
        if observer is None and not self._ended:
            from watchdog.observers import Observer

            # It writes to stderr that an event came while it was stopped: nothing can be done then.
            logging.getLogger("watchdog").setLevel(logging.CRITICAL)
            _do_not_wait_for_partners()
            observer = Observer()
            observer.daemon = True
            observer.start()
            self._observer = observer
        return observer

    def on_file(self, kind: str, path: str) -> None:
        """Handle an event of a file; `kind` is watchdog's word for it."""
        event = _EVENTS.get(kind)
        if event is not None and self._note_event(path, event, time.monotonic()) is not False:
            self._wake.set()

    def on_folder(self, gone: str = "") -> None:
        """Handle the coming or going of a folder; `gone` is a path that it does not have now."""
        if Path(gone) in self._watched:
            self._gone.append(Path(gone))
        self._wake.set()


def _do_not_wait_for_partners() -> None:
    """Make watchdog pass on a lone "moved from" at once.

    watchdog holds each back for 0.5 s, and every event behind it, too, to wait for the "moved to"
    that would make the two one move. A claim is such a lone move, so that after each claim new
    files would be noticed half a second late (measured: median 524 ms from rename to claim; 32 ms
    without the wait). Such pairs are not needed here: a name that appears is enough.
    """
    for module, holder in _PARTNER_WAITS:
        with contextlib.suppress(ImportError, AttributeError):
            getattr(importlib.import_module(module), holder).delay = 0.0


_PARTNER_WAITS = (
    ("watchdog.observers.inotify_move_event_grouper", "InotifyMoveEventGrouper"),  # watchdog 7
    ("watchdog.observers.inotify_buffer", "InotifyBuffer"),  # watchdog 4 to 6
)
_EVENTS = {
    "created": FileEvent.CREATED,
    "moved": FileEvent.RENAMED,
    "modified": FileEvent.WRITING,
    "opened": FileEvent.OPENED,
    "closed": FileEvent.CLOSED,
}


class _Handler:
    """What watchdog calls; it needs only `dispatch`."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def dispatch(self, event: Any) -> None:
        if event.is_directory:
            if event.event_type == "created":
                self._watcher.on_folder()
            elif event.event_type in ("moved", "deleted"):
                self._watcher.on_folder(os.fsdecode(event.src_path))
            return
        path = event.dest_path if event.event_type == "moved" else event.src_path
        self._watcher.on_file(event.event_type, os.fsdecode(path))
