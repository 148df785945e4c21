"""Paths of the share that cannot be used now: each is held for a pause that grows.

All other jobs go on. `path_errors` decides whether an error concerns a path or the share as a
whole.

Limitations: in a folder whose files cannot be moved individually (sticky, of another user), each
file is tried.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from loguru import logger

from sam_poll.core.safe_path import SafePath
from sam_poll.core.text import shown
from sam_poll.share.claims.model import ClaimEntry, claim_folder
from sam_poll.share.intake.stat_cache import NEVER
from sam_poll.share.layout import Layout
from sam_poll.share.path_errors import FOLDER_ERRORS, PathErrorClassifier, path_remedy, write_error

FIRST_S = 2.0
LONGEST_S = 300.0
_EACH_S = 0.01  # lengthens the first pause for each path that is held already
_FORGET_S = 60.0  # without a further error after its pause, a hold ends
_MAX_LOGGED = 20  # further paths are only counted in the log
_MAX_REPORTED = 5  # … and by `sam-poll status`
_MAX_COMPARED = 100  # held paths that one `refresh` checks for changes


class _End(Enum):
    """What ends a hold, besides a change of the path."""

    PAUSE = "pause"
    """Its pause, and some time without a further error."""
    CLAIM = "claim"
    """As PAUSE; also a job that could be claimed below the path."""
    WRITE = "write"
    """A test write to the folder, in which answers cannot be put, after the pause."""


@dataclass(slots=True)
class _Hold:
    """The hold on a path. `where`: what cannot be used. `stamp`: see `_stamp`.

    `pause_s`: the length of the pause, which ends at `until`.
    """

    where: SafePath
    reason: str
    remedy: str
    stamp: tuple[int, ...]
    pause_s: float
    until: float
    end: _End


class PathHolds:
    """The paths of one share that are held. Thread-safe; times are of one monotonic clock.

    A key of the table is a path below `in/`, where a folder's hold blocks all its contents; or,
    for `work/`, the result of `_key`. Keys of `_End.WRITE` are folders below `in/` too: those whose
    answers cannot be put away. With `once` a hold has no end, because nothing waits for it.
    """

    def __init__(self, layout: Layout, *, once: bool = False) -> None:
        self._layout = layout
        self._once = once
        self._errors = PathErrorClassifier(layout)
        self._lock = threading.Lock()
        self._holds: dict[str, _Hold] = {}
        self._blocking = frozenset[str]()
        self._undeliverable = frozenset[str]()
        self._logged = 0
        self._changed = False
        self.due = NEVER
        """When the first pause ends."""

    def __len__(self) -> int:
        with self._lock:
            return len({hold.where for hold in self._holds.values()})

    # ── queries ──

    def blocks(self, *paths: str) -> bool:
        """Return whether one of these paths below `in/`, or one of its parent folders, is held."""
        blocking = self._blocking
        return bool(blocking) and any(up in blocking for path in paths for up in _upwards(path))

    def pause(self, path: str) -> float:
        """Return the longest pause in seconds that keeps a path below `in/` from being claimed."""
        with self._lock:
            return max(
                (self._holds[up].pause_s for up in _upwards(path) if up in self._holds),
                default=0.0,
            )

    def blocks_claim(self, entry: ClaimEntry) -> bool:
        """Return whether a claim is held, or its answers could not be put away."""
        return self._blocks_claim(entry.outer, entry.folder)

    def blocks_claim_of(self, path: str) -> bool:
        """Return whether this is so of the claim that is made for a file below `in/`."""
        return bool(self._blocking) and self._blocks_claim(
            claim_folder(self._layout.work, path), os.path.dirname(path)
        )

    def _blocks_claim(self, outer: SafePath, folder: str) -> bool:
        if _key(outer) in self._blocking:
            return True
        return bool(self._undeliverable) and any(
            up in self._undeliverable for up in _upwards(folder)
        )

    def blocks_stray(self, path: str) -> bool:
        """Return whether a file in `work/` that belongs to no claim is held."""
        return bool(self._blocking) and _key(self._layout.work / path) in self._blocking

    @property
    def undelivered(self) -> str:
        """Return a message on the folders that answers cannot be put into; empty: none.

        As long as the same folders are held, the message is the same.
        """
        with self._lock:
            folders = {hold.where: hold for hold in self._holds.values() if hold.end is _End.WRITE}
        if not folders:
            return ""
        more = f" (and {len(folders) - 1} more)" if len(folders) > 1 else ""
        return f"{_message(folders[min(folders)])}{more}; jobs below it wait"

    def report(self) -> dict[str, Any]:
        """Return for `sam-poll status` how many paths are held, and the first of them."""
        with self._lock:
            holds = {str(hold.where): hold for hold in self._holds.values()}
        first = itertools.islice(holds.items(), _MAX_REPORTED)
        paths = [
            {"path": path, "reason": hold.reason, "remedy": hold.remedy} for path, hold in first
        ]
        return {"count": len(holds), "paths": paths}

    # ── failures ──

    def failed_to_take(self, error: OSError, files: list[str], now: float) -> bool:
        """Hold the path for which files of one folder of `in/` could not be claimed.

        False: the error concerns the share.
        """
        where = self._errors.path_of(error)
        if where is None:
            return False
        folder, rel = os.path.dirname(files[0]), where.rel
        of_folder = error.errno in FOLDER_ERRORS
        if where.root.path == self._layout.input.root.path and rel in files:
            key = folder if of_folder and folder else rel
            where = self._layout.input / key
        elif rel in _upwards(folder):
            key = rel
        elif where.root.path == self._layout.work.root.path and not of_folder:
            key = files[0]  # something else has the name of its claim
        else:
            key = folder or files[0]
            where = where.parent if of_folder and where.rel else where
        self._add(key, where, error, now, _End.CLAIM)
        return True

    def failed_claim(self, error: OSError, outer: SafePath, now: float) -> bool:
        """Hold a claim that could not be taken over, or ended.

        False: the error concerns the share.
        """
        where = self._errors.path_of(error)
        if where is None:
            return False
        if not self._hold_undeliverable(where, outer, now):
            self._add(_key(outer), where, error, now)
        return True

    def failed_to_deliver(
        self, error: OSError, outer: SafePath, files: list[str], now: float
    ) -> bool:
        """Hold the path for which an answer or a rejected job could not be put away.

        It is a folder in which nothing can be written; else the job, whose files in `in/` are
        `files`, and its claim. False: the error concerns the share.
        """
        # EISDIR: a folder has the very name of an output, which is the job's own error.
        where = None if error.errno == errno.EISDIR else self._errors.path_of(error)
        if where is None:
            return False
        if not self._hold_undeliverable(where, outer, now):
            self._add(files[0], where, error, now)
            self._add(_key(outer), where, error, now)
        return True

    def _hold_undeliverable(self, where: SafePath, outer: SafePath, now: float) -> bool:
        """Hold a claim and its folder where nothing can be written below `out/` or `done/`.

        False: the folder is writable.
        """
        folder = outer.parent.rel
        if not folder:
            return False
        for root in (self._layout.output, self._layout.done):
            if where.root.path != root.root.path:
                continue
            error = write_error(root / folder)
            if error:
                is_above = where.rel in _upwards(folder)
                place = where if is_above else root / folder
                self._add(where.rel if is_above else folder, place, error, now, _End.WRITE)
                self._add(_key(outer), place, error, now)
                return True
        return False

    def failed_stray(self, error: OSError, path: str, now: float) -> bool:
        """Hold a file in `work/` that belongs to no claim.

        False: the error concerns the share.
        """
        where = self._errors.path_of(error)
        if where is not None:
            self._add(_key(self._layout.work / path), where, error, now)
        return where is not None

    def closed(self, folder: SafePath, now: float, *, logged: bool = False) -> None:
        """Hold a folder that cannot be read. `logged`: the log has the folder already."""
        error = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        key = folder.rel if folder.root.path == self._layout.input.root.path else _key(folder)
        self._add(key, folder, error, now, logged=logged)

    # ── ends ──

    def worked(self, *paths: str) -> None:
        """End the holds on these paths and their folders: files there could be claimed."""
        if self._holds:
            above = {up for path in paths for up in _upwards(path)}
            with self._lock:
                keys = [
                    key
                    for key in above
                    if key in self._holds and self._holds[key].end is _End.CLAIM
                ]
            self._remove(keys)

    def ended(self, outer: SafePath, path: str = "") -> None:
        """End the hold on a claim that has ended, and on its job (its path below `in/`)."""
        if self._holds:
            self._remove([_key(outer), path])

    def refresh(self, now: float) -> bool:
        """End the holds whose pause is over or whose path has changed.

        Where answers could not be put away, a test write decides. Returns whether any hold ended
        since the last call.
        """
        if not self._holds:
            return self._take_changed()
        with self._lock:
            some = dict(itertools.islice(self._holds.items(), _MAX_COMPARED))
        for key, hold in some.items():
            if _stamp(hold.where) != hold.stamp:
                self._remove([key])
            elif hold.end is _End.WRITE and now >= hold.until:
                self._try_write(key, hold, now)
            elif now > hold.until + max(_FORGET_S, hold.pause_s):
                self._remove([key])
            else:
                with self._lock:  # to the end of the table: the others are compared next time
                    if self._holds.pop(key, None) is hold:
                        self._holds[key] = hold
        self._update(now)
        return self._take_changed()

    def _take_changed(self) -> bool:
        with self._lock:
            changed = self._changed
            self._changed = False
        return changed

    def _try_write(self, key: str, hold: _Hold, now: float) -> None:
        error = write_error(self._layout.output / key)
        if not error and not self._layout.delete_input:
            error = write_error(self._layout.done / key)
        if error:
            self._add(key, hold.where, error, now, _End.WRITE)
        else:
            self._remove([key])

    # ── the table ──

    def _add(
        self,
        key: str,
        where: SafePath,
        error: OSError,
        now: float,
        end: _End = _End.PAUSE,
        *,
        logged: bool = False,
    ) -> None:
        with self._lock:
            known = self._holds.get(key)
            reason = error.strerror or str(error)
            remedy, stamp = path_remedy(error), _stamp(where)
            pause_s, until = self._next_pause(known, now)
            hold = _Hold(where, reason, remedy, stamp, pause_s, until, end)
            self._holds[key] = hold
            logged = logged or any(
                other.where == where for other_key, other in self._holds.items() if other_key != key
            )
        if known is None and not logged:
            self._log(hold)
        self._update(now)

    def _next_pause(self, known: _Hold | None, now: float) -> tuple[float, float]:
        """Return the length and the end of the pause after an error.

        `known`: the previous hold of its key.
        """
        if known and now < known.until:
            pause_s, until = known.pause_s, known.until
        elif known:
            pause_s = min(2 * known.pause_s, LONGEST_S)
            until = now + pause_s
        else:
            # To try very many paths again takes long.
            pause_s = min(max(FIRST_S, len(self._holds) * _EACH_S), LONGEST_S)
            until = now + pause_s
        return pause_s, NEVER if self._once else until

    def _log(self, hold: _Hold) -> None:
        self._logged += 1
        if self._logged <= _MAX_LOGGED:
            logger.warning("{}; only the jobs that need it wait", _message(hold))
        elif self._logged == _MAX_LOGGED + 1:
            logger.warning("further paths cannot be used; `sam-poll status` counts them")

    def _remove(self, keys: list[str]) -> None:
        if not keys:
            return
        for key in keys:
            with self._lock:
                hold = self._holds.pop(key, None)
                more = hold and any(other.where == hold.where for other in self._holds.values())
                self._changed = self._changed or hold is not None
                self._logged = self._logged if self._holds else 0
            if hold and not more:
                logger.info("the hold on {} has ended", shown(hold.where))
        self._update(None)

    def _update(self, now: float | None) -> None:
        """Update which keys block, and note whether any has stopped.

        `now` None: only keys that were removed stop.
        """
        with self._lock:
            # Where answers could not be put away, only a test write ends the hold, not the end of
            # the pause.
            blocking = {
                key
                for key, hold in self._holds.items()
                if now is None or hold.end is _End.WRITE or now < hold.until
            }
            if now is None:
                blocking &= self._blocking
            self._changed = self._changed or bool(self._blocking - blocking)
            self._blocking = frozenset(blocking)
            self._undeliverable = frozenset(
                key for key in blocking if self._holds[key].end is _End.WRITE
            )
            self.due = min((self._holds[key].until for key in blocking), default=NEVER)


def _upwards(path: str) -> Iterator[str]:
    """Yield a path and its parent folders, without the root."""
    while path:
        yield path
        path = path.rpartition("/")[0]


def _key(path: SafePath) -> str:
    """Return the key of a path in `work/`; no path below `in/` equals it."""
    return f"\0{path.rel}"


def _message(hold: _Hold) -> str:
    return f"{shown(hold.where)} cannot be used: {hold.reason} ({hold.remedy})"


def _stamp(path: SafePath) -> tuple[int, ...]:
    """Return what changes when a user repairs a path.

    A folder's times are left out: they change with each new file.
    """
    try:
        status = path.lstat()
        times = () if path.is_dir() else (status.st_ctime_ns, status.st_mtime_ns)
    except OSError as error:
        return (-(error.errno or 0),)
    return (
        status.st_dev,
        status.st_ino,
        status.st_mode,
        status.st_uid,
        status.st_gid,
        *times,
    )
