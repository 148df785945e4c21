"""Paths of the share that cannot be used now: each one waits alone, for a pause that grows; everything else goes on.

A file that may not be moved, a folder of another user, a mount, a link where a folder belongs: that is one path's
trouble. A share that is gone, read-only or full concerns every path. What tells the two apart is a write of our own:
where it succeeds, the trouble is the path's.

Limitations: in a folder whose files cannot be moved each for itself (sticky, of another user), each one is tried.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from loguru import logger

from sam_poll.doors.claims import PATH_ERRORS, Found
from sam_poll.doors.layout import Layout
from sam_poll.doors.looks import NEVER
from sam_poll.fs import TEMP_PREFIX, remedy_of, shown
from sam_poll.safe_path import SafePath

FIRST_S, LONGEST_S = 2.0, 300.0
_EACH_S = 0.01
_FORGET_S = 60.0  # after its pause a path that nothing has failed on for so long is no trouble any more
_PROVED_S = 1.0  # how long a write of our own is proof
_LOGGED = 20  # so many paths are named in the log, further ones are counted
_NAMED = 5  # … and by `status`
_COMPARED = 100  # held paths that are looked at for changes each time
_OF_FOLDERS = {errno.EACCES, errno.EROFS, errno.EXDEV, errno.ENOTDIR, errno.ELOOP}  # a file's folder is meant
_IN_THE_WAY = {errno.EEXIST, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENOTEMPTY}


@dataclass(slots=True)
class _Entry:
    """`where` is what cannot be used. `answers`: answers of jobs below this folder cannot be put away. `taking`: what
    ends the trouble is that a job can be claimed."""

    where: SafePath
    reason: str
    remedy: str
    stamp: tuple[int, ...]
    seconds: float
    until: float
    answers: bool = False
    taking: bool = False


class PathHolds:
    """The paths of one share that are left alone for now. Thread-safe; times are of one monotonic clock.

    Paths in `in/` are told by their names below it; a folder's hold is one on all that lies in it. A claim has a hold
    of its own. With `once` every hold is for ever, because nobody waits for its end.
    """

    def __init__(self, layout: Layout, *, once: bool = False) -> None:
        self._layout, self._once = layout, once
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._held = self._undeliverable = frozenset[str]()
        self._proved: dict[str, float] = {}
        self._logged = 0
        self._changed = False
        self.due = NEVER
        """When the first hold ends."""

    def __len__(self) -> int:
        with self._lock:
            return len({entry.where for entry in self._entries.values()})

    # ── asking ──

    def blocks(self, *paths: str) -> bool:
        """Return whether one of these paths below `in/`, or a folder that it lies in, is held."""
        held = self._held
        return bool(held) and any(above in held for path in paths for above in _upwards(path))

    def pause(self, path: str) -> float:
        """Return the seconds of the longest hold that keeps a path below `in/` from being claimed."""
        with self._lock:
            return max((self._entries[p].seconds for p in _upwards(path) if p in self._entries), default=0.0)

    def blocks_claim(self, found: Found) -> bool:
        """Return whether a claim is held, or its answers could not be put away."""
        if _key(found.outer) in self._held:
            return True
        return bool(self._undeliverable) and any(above in self._undeliverable for above in _upwards(found.folder))

    @property
    def undelivered(self) -> str:
        """What to say of the folders that answers cannot be put into; empty: there are none."""
        with self._lock:
            found = [entry for entry in self._entries.values() if entry.answers]
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        return f"{_said(found[0])}{more}; jobs below wait" if found else ""

    def report(self) -> dict[str, Any]:
        """Return what `status` tells: how many paths are held, and the first of them."""
        with self._lock:
            found = {str(one.where): one for one in self._entries.values()}
        first = itertools.islice(found.items(), _NAMED)
        paths = [{"path": path, "reason": one.reason, "remedy": one.remedy} for path, one in first]
        return {"count": len(found), "paths": paths}

    # ── what has failed ──

    def failed_to_take(self, error: OSError, files: list[str], now: float) -> bool:
        """Hold what files of one folder of `in/` could not be claimed for. False: it is the share."""
        where = self._path_meant(error)
        if where is None:
            return False
        folder, rel = os.path.dirname(files[0]), where.rel
        of_folder = error.errno in _OF_FOLDERS
        if where.root.path == self._layout.input.root.path and rel in files:
            key = folder if of_folder and folder else rel
            where = self._layout.input / key
        elif rel in _upwards(folder):
            key = rel
        elif where.root.path == self._layout.work.root.path and not of_folder:
            key = files[0]  # what has the name of its claim
        else:
            key = folder or files[0]
            where = where.parent if of_folder and where.rel else where
        self._add(key, where, error, now, taking=True)
        return True

    def failed_claim(self, error: OSError, outer: SafePath, now: float) -> bool:
        """Hold a claim that could not be taken over, or ended. False: it is the share."""
        where = self._path_meant(error)
        if where is None:
            return False
        if not self._hold_answers(where, outer, now):
            self._add(_key(outer), where, error, now)
        return True

    def failed_to_deliver(self, error: OSError, outer: SafePath, files: list[str], now: float) -> bool:
        """Hold what an answer or a refusal could not be put away for: a folder where nothing can be written, else this
        job, whose files in `in/` these are, and its claim. False: it is the share."""
        where = None if error.errno == errno.EISDIR else self._path_meant(error)
        if where is None:  # EISDIR: a folder has the very name of an output, which is this job's own fault
            return False
        if not self._hold_answers(where, outer, now):
            self._add(files[0], where, error, now)
            self._add(_key(outer), where, error, now)
        return True

    def _hold_answers(self, where: SafePath, outer: SafePath, now: float) -> bool:
        """Hold the folder of a claim, and the claim, where nothing can be written below `out/` or `done/`. False: it
        can."""
        folder = outer.parent.rel
        for root in (self._layout.output, self._layout.done) if folder else ():
            trouble = _unwritable(root / folder) if where.root.path == root.root.path else None
            if trouble:
                known = where.rel in _upwards(folder)
                place = where if known else root / folder
                self._add(where.rel if known else folder, place, trouble, now, answers=True)
                self._add(_key(outer), place, trouble, now)
                return True
        return False

    def failed_stray(self, error: OSError, path: str, now: float) -> bool:
        """Hold a file in `work/` that belongs to no claim. False: it is the share."""
        where = self._path_meant(error)
        if where is not None:
            self._add(_key(self._layout.work / path), where, error, now)
        return where is not None

    def blocks_stray(self, path: str) -> bool:
        """Return whether a file in `work/` is held."""
        return bool(self._held) and _key(self._layout.work / path) in self._held

    def closed(self, folder: SafePath, now: float, *, told: bool = False) -> None:
        """Take note of a folder that may not be read. `told`: the log has it already."""
        error = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        key = folder.rel if folder.root.path == self._layout.input.root.path else _key(folder)
        self._add(key, folder, error, now, told=told)

    # ── what has worked ──

    def worked(self, *paths: str) -> None:
        """Forget the holds on these paths, and on the folders that they lie in: they could be claimed."""
        if self._entries:
            above = {up for path in paths for up in _upwards(path)}
            with self._lock:
                keys = [key for key in above if key in self._entries and self._entries[key].taking]
            self._forget(keys)

    def ended(self, outer: SafePath, path: str = "") -> None:
        """Forget the hold on a claim that has ended, and on its job, named after this path below `in/`."""
        if self._entries:
            self._forget([_key(outer), path])

    def refresh(self, now: float) -> bool:
        """Look which holds are over: their time has come, or what they are on has changed. True: some are, since this
        was last asked. Where answers could not be put away, a write tells whether they can be."""
        if not self._entries:
            changed, self._changed = self._changed, False
            return changed
        with self._lock:
            some = dict(itertools.islice(self._entries.items(), _COMPARED))
        for key, entry in some.items():
            if _stamp(entry.where) != entry.stamp:
                self._forget([key])
            elif entry.answers and now >= entry.until:
                self._try_again(key, entry, now)
            elif now > entry.until + max(_FORGET_S, entry.seconds):
                self._forget([key])
            else:
                with self._lock:  # the others have their turn next time
                    if self._entries.pop(key, None) is entry:
                        self._entries[key] = entry
        return self._count(now)

    def _try_again(self, key: str, entry: _Entry, now: float) -> None:
        trouble = _unwritable(self._layout.output / key)
        if not trouble and not self._layout.delete_input:
            trouble = _unwritable(self._layout.done / key)
        if trouble:
            self._add(key, entry.where, trouble, now, answers=True)
        else:
            self._forget([key])

    # ── the book ──

    def _add(
        self,
        key: str,
        where: SafePath,
        error: OSError,
        now: float,
        *,
        answers: bool = False,
        taking: bool = False,
        told: bool = False,
    ) -> None:
        with self._lock:
            known = self._entries.get(key)
            still = known is not None and now < known.until
            seconds = min(max(FIRST_S, len(self._entries) * _EACH_S), LONGEST_S)  # many need time to be tried again
            if known:
                seconds = known.seconds if still else min(2 * known.seconds, LONGEST_S)
            until = NEVER if self._once else known.until if known and still else now + seconds
            reason = error.strerror or str(error)
            entry = _Entry(where, reason, _remedy(error), _stamp(where), seconds, until, answers, taking)
            self._entries[key] = entry
            said = told or any(one.where == where for other, one in self._entries.items() if other != key)
        if known is None and not said:
            self._log(entry)
        self._count(now)

    def _log(self, entry: _Entry) -> None:
        self._logged += 1
        if self._logged <= _LOGGED:
            logger.warning("{}; it waits, and nothing else does", _said(entry))
        elif self._logged == _LOGGED + 1:
            logger.warning("further paths cannot be used either; `sam-poll status` counts them")

    def _forget(self, keys: list[str]) -> None:
        if not keys:
            return
        for key in keys:
            with self._lock:
                entry = self._entries.pop(key, None)
                more = entry and any(one.where == entry.where for one in self._entries.values())
                self._changed = self._changed or entry is not None
                self._logged = self._logged if self._entries else 0
            if entry and not more:
                logger.info("{} is held no more", shown(entry.where))
        self._count(None)

    def _count(self, now: float | None) -> bool:
        """Note what is held now; whether something has come free since this was last told."""
        with self._lock:
            # Answers wait until a write has told that they need not: the end of the pause alone tells nothing.
            held = {key for key, one in self._entries.items() if now is None or one.answers or now < one.until}
            if now is None:
                held &= self._held
            self._changed = self._changed or bool(self._held - held)
            self._held = frozenset(held)
            self._undeliverable = frozenset(key for key in held if self._entries[key].answers)
            self.due = min((self._entries[key].until for key in held), default=NEVER)
            if now is None:
                return False
            changed, self._changed = self._changed, False
            return changed

    # ── telling a path from the share ──

    def _path_meant(self, error: OSError) -> SafePath | None:
        """Return which path of the share an error is about; None where it is about the share as a whole."""
        if error.errno not in PATH_ERRORS:
            return None
        found = [path for name in (error.filename, error.filename2) if (path := self._path(name))]
        # Of the two of a rename, one mostly lies in a claim, which is ours.
        found.sort(key=lambda path: path.root.path == self._layout.work.root.path)
        return found[0] if found and self._share_works(found[0], error) else None

    def _path(self, name: object) -> SafePath | None:
        for folder in self._layout.folders.values():
            if isinstance(name, str) and name.startswith(f"{folder}/"):
                return folder / name[len(str(folder)) + 1 :]
        return None

    def _share_works(self, where: SafePath, error: OSError) -> bool:
        """Return whether a write of our own succeeds where this one did not."""
        work, input_ = self._layout.work, self._layout.input
        root = SafePath(where.root)
        roots = {str(work): work}
        if root != input_:
            roots[str(root)] = root
        elif "/" not in where.rel and error.errno in _OF_FOLDERS:
            roots[str(input_)] = input_  # only then, because it makes a large folder be listed anew
        now = time.monotonic()
        try:
            for name, folder in roots.items():
                if now - self._proved.get(name, -_PROVED_S) >= _PROVED_S:
                    _write_into(folder)
                    self._proved[name] = now
            if error.errno == errno.EXDEV and now - self._proved.get("", -_PROVED_S) >= _PROVED_S:
                _write_into(work, by_way_of=input_)
                self._proved[""] = now
        except OSError:
            return False
        return True


def _upwards(path: str) -> Iterator[str]:
    """Yield a path and the folders that it lies in, without the root."""
    while path:
        yield path
        path = path.rpartition("/")[0]


def _key(path: SafePath) -> str:
    """What a path in `work/` is called here; no name in `in/` is like it."""
    return f"\0{path.rel}"


def _said(entry: _Entry) -> str:
    return f"{shown(entry.where)} cannot be used: {entry.reason} ({entry.remedy})"


def _stamp(path: SafePath) -> tuple[int, ...]:
    """What changes when somebody mends a path. Not a folder's times: they change with each file that comes."""
    try:
        found = path.lstat()
        times = () if path.is_dir() else (found.st_ctime_ns, found.st_mtime_ns)
    except OSError as error:
        return (-(error.errno or 0),)
    return (found.st_dev, found.st_ino, found.st_mode, found.st_uid, found.st_gid, *times)


def _unwritable(folder: SafePath) -> OSError | None:
    """Return what is in the way of writing into a folder, which is made where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_into(folder)
    except OSError as error:
        return error
    return None


def _write_into(folder: SafePath, by_way_of: SafePath | None = None) -> None:
    """Make a file and remove it, moving it `by_way_of` another folder. Raises OSError."""
    probe = folder / f"{TEMP_PREFIX}try-{uuid4().hex[:12]}.tmp"  # a janitor sweeps such names in `work/`
    probe.create().close()
    try:
        if by_way_of is not None:
            there = by_way_of / probe.name
            probe.rename(there)
            probe = there
    finally:
        with contextlib.suppress(FileNotFoundError):
            probe.unlink()


def _remedy(error: OSError) -> str:
    user = f"user {os.geteuid()}"
    if error.errno == errno.EACCES:
        return f"let {user} read and write there: chown or chmod it; or take it away"
    if error.errno == errno.EPERM:
        return (
            f"it is immutable, or another user's in a sticky folder: chown it to {user}, `chattr -i`; or take it away"
        )
    if error.errno == errno.EXDEV:
        return "it is a mount of its own: copy what lies in it into the share, and unmount it"
    if error.errno == errno.EBUSY:
        return "something is mounted on it, or a server keeps it: unmount it, or close it there"
    if error.errno in _IN_THE_WAY:
        return "take away what lies in the place of a folder: a file, a link, or somebody's files"
    return remedy_of(error)
