"""The directories that `SafePath`s begin in: trusted as they are named, but for links that others may have planted.

Links in a root's path are resolved once, when it is first used. One that another user may have planted is refused; one
that is put there later is not followed.

What can still go wrong here: the owner of a directory above a root may put anything into its place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
"""How a folder is opened."""
_PASS = FOLDER | getattr(os, "O_PATH", os.O_RDONLY)  # to walk through: needs no permission to list
_RENEW_S = 1.0  # the longest that a handle is used
_MOST_FOLDERS = 64
_FRESH_S = 0.05  # where something is missing behind an older one, it is looked for again behind a new one
_MOST_LINKS = 40  # in one path, as Linux has it
_IN_THE_WAY = "a link or a file is in a folder's place; links are not followed"
_TOP = Path("/")
_roots: weakref.WeakValueDictionary[str, Root] = weakref.WeakValueDictionary()


class Handle:
    """A directory's descriptor, closed with the last reference: no thread loses the one that it is using.

    `folders` are handles of folders that lie in it, by their paths: a job's files are touched many times in a moment.
    """

    __slots__ = ("fd", "folders", "since")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.folders: dict[str, Handle] = {}
        self.since = time.monotonic()

    def __del__(self) -> None:
        os.close(self.fd)


class Root:
    """A directory that is trusted as it is named, and its handle. `Root.of(path)` is the same object while it is used.

    Links in its path are resolved once, at the beginning. The handle is opened again every second: a share may be
    mounted anew, or a folder replaced, and nothing about two mounts of one disk tells them apart.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._real: Path | None = None
        self._handle: Handle | None = None

    @staticmethod
    def of(path: Path) -> Root:
        """Return the root of this directory, which need not exist yet."""
        path = path.absolute()
        return _roots.setdefault(str(path), Root(path))

    @property
    def real(self) -> Path:
        """The directory without links in its path, as it was when the root was first found there. Raises OSError."""
        if self._real is not None:
            return self._real
        real = _resolved(self.path)
        with contextlib.suppress(OSError):
            if stat.S_ISDIR(real.lstat().st_mode):  # else it may still be made, or mounted
                self._real = real
        return real

    def lstat(self) -> os.stat_result:
        """Return what lies in the directory's place now, a link as a link. Raises OSError."""
        with self._around() as (fd, name):
            return os.stat(name, dir_fd=fd, follow_symlinks=False)

    @contextmanager
    def _around(self) -> Iterator[tuple[int, str]]:
        """Open the folder that the directory lies in; its descriptor, and the directory's name in there."""
        *folders, name = self.real.parts[1:] or (".",)
        handle, place = Handle(os.open(_TOP, _PASS)), ""
        try:
            for folder in folders:
                place = f"{place}/{folder}"
                handle = inner(handle.fd, folder, place)
            yield handle.fd, name
        except OSError as error:
            if not str(error.filename).startswith("/"):
                error.filename = str(self.path)
            raise in_the_way(error, error.filename) from None
        finally:
            del handle  # or who keeps the error keeps it open

    def handle(self, younger_than_s: float = _RENEW_S) -> Handle:
        """Return a handle of the directory that is not older than this. Raises OSError."""
        handle = self._handle
        if handle is None or time.monotonic() - handle.since >= younger_than_s:
            handle = self._handle = Handle(self._opened())
        return handle

    def _opened(self) -> int:
        with self._around() as (fd, name):
            return os.open(name, os.O_RDONLY | FOLDER, dir_fd=fd)

    def folder(self, rel: str) -> Handle:
        """Return a handle of a folder below the directory, opened within the last second. Raises OSError."""
        root = self.handle()
        if not rel:
            return root
        known = root.folders.get(rel)
        if known:
            return known
        handle, end = root, 0
        while end < len(rel):  # no recursion: a path may have two thousand folders
            start, end = end, rel.find("/", end + 1)
            end = len(rel) if end < 0 else end
            known = root.folders.get(rel[:end])
            if known is None:
                known = inner(handle.fd, rel[start:end].lstrip("/"), f"{self.path}/{rel[:end]}")
                if len(root.folders) >= _MOST_FOLDERS:
                    root.folders.clear()
                root.folders[rel[:end]] = known
            handle = known
        return handle

    def outdated(self, rel: str) -> bool:
        """Return whether what was opened on the way to a path is opened again next time: a folder that is gone, and
        whose name another one may have now; or the directory itself, where its handle is not quite new. Raises OSError.
        """
        before = self._handle
        while before and rel:
            rel = rel.rpartition("/")[0]
            known = before.folders.get(rel)
            if known and not os.fstat(known.fd).st_nlink:
                before.folders.clear()
                return True
        return self.handle(_FRESH_S) is not before

    def forget(self, rel: str) -> None:
        """Open a folder again next time, and what lies in it: it is removed, or renamed."""
        handle = self._handle
        if handle and handle.folders.pop(rel, None):
            for inner in [path for path in handle.folders.copy() if path.startswith(rel + "/")]:
                handle.folders.pop(inner, None)

    def renew(self) -> None:
        """Have the next operation open the directory that lies there then."""
        self._handle = None


def inner(fd: int, name: str, place: str) -> Handle:
    """Open a folder in that of a descriptor, to walk through; `place` is its path, to be shown. Raises OSError."""
    try:
        return Handle(os.open(name, _PASS, dir_fd=fd))
    except OSError as error:
        raise in_the_way(error, place) from None


def in_the_way(error: OSError, place: str) -> OSError:
    """Return what to raise where a folder could not be opened: the error itself, or one that tells of links."""
    if error.errno in (errno.ENOTDIR, errno.ELOOP):
        return NotADirectoryError(errno.ENOTDIR, _IN_THE_WAY, place)
    return error


def check_trusted(folder: Path) -> str | None:
    """Say which link in a directory's path another user may have planted. None: there is none."""
    try:
        _resolved(folder.absolute())
    except OSError as error:
        if error.errno == errno.ELOOP:
            return error.strerror
        raise
    return None


def _resolved(path: Path) -> Path:
    """Return an absolute path without the links in it. What is not there stays as it is.

    Raises OSError (ELOOP) for a link that another user may have planted: one that is neither root's nor ours nor of the
    owner of the folder that it lies in, where that folder may be written to by others than its owner.
    """
    real, left, links = _TOP, list(reversed(path.parts[1:])), 0
    while left:
        name = left.pop()
        if name == "..":
            real = real.parent
            continue
        here = real / name
        target = _target(here)
        if target is None:
            real = here
            continue
        links += 1
        if links > _MOST_LINKS:
            raise OSError(errno.ELOOP, f"{path} leads in a circle", str(path))
        real = _TOP if target.is_absolute() else real
        left += reversed(target.parts[1:] if target.is_absolute() else target.parts)
    return real


def _target(path: Path) -> Path | None:
    """Where a link leads to; None: it is none, or not there. Raises OSError (ELOOP) as `_resolved`."""
    opened = -1
    try:
        found = path.lstat()
        if not stat.S_ISLNK(found.st_mode):
            return None
        if hasattr(os, "O_PATH"):  # so that it is the same link whose owner and whose target are told
            opened = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            found = os.fstat(opened)
            target = Path(os.readlink("", dir_fd=opened))
        else:
            target = path.readlink()
        around = path.parent.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    finally:
        if opened >= 0:
            os.close(opened)
    if found.st_uid not in (0, os.geteuid(), around.st_uid) and around.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        what = f"{path} is a link that user {found.st_uid} has made in a folder that others may write to, too"
        raise OSError(errno.ELOOP, what, str(path))
    return target
