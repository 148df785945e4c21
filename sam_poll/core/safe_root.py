"""Root directories of `SafePath`s: trusted as named, except for links planted by other users.

Links in a root's path are resolved once, when the root is first used. A link that another user may
have planted is refused; one that is planted later is not followed.

Limitations: the owner of a directory above a root can replace the root by anything.
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
# For folders on the way to a path: needs no permission to list them.
_PASS = FOLDER | getattr(os, "O_PATH", os.O_RDONLY)
_RENEW_S = 1.0  # maximum age of a handle
_MOST_FOLDERS = 64
# Where something is missing behind an older one, it is looked for again behind a new one
_FRESH_S = 0.05
_MOST_LINKS = 40  # in one path, as Linux has it
_IN_THE_WAY = "a link or a file is in a folder's place; links are not followed"
_TOP = Path("/")
_roots: weakref.WeakValueDictionary[str, Root] = weakref.WeakValueDictionary()


class Handle:
    """A directory's descriptor, closed with its last reference: no thread loses it while using it.

    `folders` are handles of subfolders, by path: the files of a job are accessed many times in a
    row.
    """

    __slots__ = ("fd", "folders", "since")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.folders: dict[str, Handle] = {}
        self.since = time.monotonic()

    def __del__(self) -> None:
        os.close(self.fd)


class Root:
    """A trusted directory and its handle.

    `Root.of(path)` returns the same object as long as it is referenced.

    Links in the path are resolved once, at the beginning. The handle is opened again when it is a
    second old, and by `refresh`: a share may be mounted again, or a folder replaced, and two mounts
    of one disk cannot be told apart.
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
        """The directory without links in its path, as it was when first found. Raises OSError."""
        if self._real is not None:
            return self._real
        real = _resolved(self.path)
        with contextlib.suppress(OSError):
            if stat.S_ISDIR(real.lstat().st_mode):  # else it may still be made, or mounted
                self._real = real
        return real

    def lstat(self) -> os.stat_result:
        """Return the status of the directory's path now, of a link as a link. Raises OSError.

        Only for looking: the files in it are reached through the handle.
        """
        real = self.real
        try:
            return real.lstat()
        except OSError as error:
            raise not_a_folder(error, error.filename) from None

    @contextmanager
    def _around(self) -> Iterator[tuple[int, str]]:
        """Open the directory's parent; yields its descriptor, and the directory's name in it."""
        *folders, name = self.real.parts[1:] or (".",)
        handle, place = Handle(os.open(_TOP, _PASS)), ""
        try:
            for folder in folders:
                place = f"{place}/{folder}"
                handle = open_subfolder(handle.fd, folder, place)
            yield handle.fd, name
        except OSError as error:
            if not str(error.filename).startswith("/"):
                error.filename = str(self.path)
            raise not_a_folder(error, error.filename) from None
        finally:
            del handle  # a stored error would otherwise keep it open

    def handle(self, younger_than_s: float = _RENEW_S) -> Handle:
        """Return a handle of the directory that is younger than this. Raises OSError."""
        handle = self._handle
        if handle is None or time.monotonic() - handle.since >= younger_than_s:
            handle = self._handle = Handle(self._opened())
        return handle

    def _opened(self) -> int:
        with self._around() as (fd, name):
            return os.open(name, os.O_RDONLY | FOLDER, dir_fd=fd)

    def folder(self, rel: str) -> Handle:
        """Return a handle of a subfolder, opened within the last second. Raises OSError."""
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
                name = rel[start:end].lstrip("/")
                known = open_subfolder(handle.fd, name, f"{self.path}/{rel[:end]}")
                if len(root.folders) >= _MOST_FOLDERS:
                    root.folders.clear()
                root.folders[rel[:end]] = known
            handle = known
        return handle

    def outdated(self, rel: str) -> bool:
        """Drop outdated handles on the way to a path, and return whether there were any.

        Outdated are handles of a removed folder, whose name another one may have now; and all of
        them where that of the root is older than `_FRESH_S`. Raises OSError.
        """
        before = self._handle
        if before is None:
            return True
        while rel:
            rel = rel.rpartition("/")[0]
            known = before.folders.get(rel)
            if known and not os.fstat(known.fd).st_nlink:
                before.folders.clear()
                return True
        if time.monotonic() - before.since < _FRESH_S:
            return False
        self.refresh()
        return True

    def forget(self, rel: str) -> None:
        """Drop the cached handles of a removed or renamed folder, and of its subfolders."""
        handle = self._handle
        if handle and handle.folders.pop(rel, None):
            for below in [path for path in handle.folders.copy() if path.startswith(rel + "/")]:
                handle.folders.pop(below, None)

    def device(self) -> int:
        """Return the number of the device that the directory is on. Raises OSError."""
        handle = self.handle()  # the reference keeps it open
        return os.fstat(handle.fd).st_dev

    def refresh(self) -> None:
        """Use from now on what has been mounted or created in the directory's place meanwhile.

        One `open` instead of one for each folder of the path, as long as it gives the directory
        that was reached without links before: nothing else has its numbers while that is open.
        """
        known = self._handle
        if known is None:
            return
        self._handle = None
        with contextlib.suppress(OSError):
            handle = Handle(os.open(self.real, os.O_RDONLY | FOLDER))
            if os.path.samestat(os.fstat(handle.fd), os.fstat(known.fd)):
                self._handle = handle

    def renew(self) -> None:
        """Open the directory again with the next operation."""
        self._handle = None


def open_subfolder(fd: int, name: str, place: str) -> Handle:
    """Open a folder inside that of a descriptor; `place` is its path in errors. Raises OSError."""
    try:
        return Handle(os.open(name, _PASS, dir_fd=fd))
    except OSError as error:
        raise not_a_folder(error, place) from None


def not_a_folder(error: OSError, place: str) -> OSError:
    """Return the error to raise where a folder could not be opened; it may mention links."""
    if error.errno in (errno.ENOTDIR, errno.ELOOP):
        return NotADirectoryError(errno.ENOTDIR, _IN_THE_WAY, place)
    return error


def check_trusted(folder: Path) -> str | None:
    """Describe a link in a directory's path that another user may have planted, if any."""
    try:
        _resolved(folder.absolute())
    except OSError as error:
        if error.errno == errno.ELOOP:
            return error.strerror
        raise
    return None


def _resolved(path: Path) -> Path:
    """Return an absolute path without the links in it; missing parts stay unchanged.

    Raises OSError (ELOOP) for a link that another user may have planted: one in a folder that
    others may write to, and that belongs neither to root, nor to this user, nor to the folder's
    owner.
    """
    real = _TOP
    left = list(reversed(path.parts[1:]))
    links = 0
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
            raise OSError(errno.ELOOP, f"{path} contains a circular link", str(path))
        real = _TOP if target.is_absolute() else real
        left += reversed(target.parts[1:] if target.is_absolute() else target.parts)
    return real


def _target(path: Path) -> Path | None:
    """Return the target of a link; None if it is no link, or missing.

    Raises OSError (ELOOP) as `_resolved`.
    """
    opened = -1
    try:
        status = path.lstat()
        if not stat.S_ISLNK(status.st_mode):
            return None
        # A handle, so that owner and target are those of the same link.
        if hasattr(os, "O_PATH"):
            opened = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            status = os.fstat(opened)
            target = Path(os.readlink("", dir_fd=opened))
        else:
            target = path.readlink()
        around = path.parent.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    finally:
        if opened >= 0:
            os.close(opened)
    trusted = (0, os.geteuid(), around.st_uid)
    if status.st_uid not in trusted and around.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        what = (
            f"{path} is a link created by user {status.st_uid} in a folder that others may write to"
        )
        raise OSError(errno.ELOOP, what, str(path))
    return target
