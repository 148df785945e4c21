"""The few file system moves everything else is made of: write whole, move without overwriting, show a name.

All of them work on `SafePath`s, so that none follows a link that somebody has planted.

What can still go wrong here: `move_new` looks and then renames, so two processes that move *different* files to the
same new name in the same instant may overwrite; claims see to it that a file has one owner. fsync of a folder is not
supported on some network shares and is then left out: a crash of the *server* may undo a rename there.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import threading
from collections.abc import Iterable
from typing import Any

from sam_poll.safe_path import SafePath

TEMP_PREFIX = ".sam_poll-"
NAME_MAX = 255  # bytes; ext4, XFS, and most others
_AUX = ".aux.xml"
_serial = itertools.count()
NO_FILE = {errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EACCES, errno.EPERM}
NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}
_NO_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.ENOSYS}


def write_whole(path: SafePath, body: bytes) -> None:
    """Write a file so that nobody ever sees half of it: temporary name in the same folder, flush to disk, rename.

    Raises OSError; the temporary file is gone then. The folder itself is flushed by `sync_folder`, once for many files.
    """
    with Whole() as files:
        files.write(path, body)
        files.show()


def write_synced(path: SafePath, body: bytes) -> None:
    """Write a new file in the place of whatever has its name, and flush it to disk.

    What had the name is removed, never written into: it may be somebody's link, or a second name of another file.
    """
    path.unlink(missing_ok=True)
    _write_new(path, body)


def _write_new(path: SafePath, body: bytes) -> None:
    with path.create() as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())


class Whole:
    """Several files that appear whole, and all at about the same time: `write` each, then `show` them.

    They are written in `folder`, which must be on the same file system; None: each where it is to appear. What has not
    been shown when the `with` ends is removed.
    """

    def __init__(self, folder: SafePath | None = None) -> None:
        self._folder = folder
        self._files: list[tuple[SafePath, SafePath]] = []

    def write(self, path: SafePath, body: bytes) -> None:
        """Write under a temporary name, and flush to disk."""
        _write_new(self._temporary(path), body)

    def take(self, path: SafePath, file: SafePath) -> None:
        """A file that is written already, on the same file system; it stays where it is, too."""
        temporary = self._temporary(path)
        try:
            file.link(temporary)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with file.open() as source, temporary.create() as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
                copy.flush()
                os.fsync(copy.fileno())

    def _temporary(self, path: SafePath) -> SafePath:
        folder = path.parent if self._folder is None else self._folder
        temporary = folder / f"{TEMP_PREFIX}{os.getpid()}-{threading.get_ident()}-{next(_serial)}.tmp"
        self._files.append((temporary, path))
        return temporary

    def show(self) -> None:
        """Give the files their names."""
        while self._files:
            temporary, path = self._files[0]
            temporary.rename(path)
            self._files.pop(0)

    def __enter__(self) -> Whole:
        return self

    def __exit__(self, *exc: object) -> None:
        for temporary, _ in self._files:
            with contextlib.suppress(OSError):
                temporary.unlink()


def sync_folder(folder: SafePath) -> None:
    """Make the renames in a folder survive a power cut, where the file system can."""
    try:
        folder.sync()
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise


def rename(source: SafePath, target: SafePath) -> None:
    """Rename, and look again where it fails: on a network share the answer may be lost, not the deed.

    A server that is asked a second time, because its first answer did not arrive, says that there is no such file.
    """
    before = source.lstat()
    try:
        source.rename(target)
    except OSError:
        with contextlib.suppress(OSError):
            after = target.lstat()
            if (after.st_ino, after.st_dev) == (before.st_ino, before.st_dev) and not exists(source):
                return
        raise


def move_new(source: SafePath, target: SafePath) -> None:
    """Rename within one file system, creating the target's folder; FileExistsError if the target is taken."""
    if exists(target):
        raise FileExistsError(errno.EEXIST, "already there", str(target))
    try:
        rename(source, target)
    except FileNotFoundError:
        if exists(target.parent) or not exists(source):
            raise
        target.parent.mkdir(parents=True, exist_ok=True)
        rename(source, target)


def read_json(path: SafePath, most: int = 1 << 20) -> Any:
    """Return what a JSON file on the share says, which anybody may have written.

    Raises OSError; ValueError where it is no JSON, longer than `most` bytes, or nested too deep.
    """
    return json_of(path.read_bytes(most))


def json_of(body: bytes) -> Any:
    """As `read_json`."""
    try:
        return json.loads(body)
    except RecursionError:
        raise ValueError("nested too deep") from None


def exists(path: SafePath) -> bool:
    """Whether a name is taken, a broken link included; OSError other than "not there" is raised, not read as no."""
    try:
        path.lstat()
    except OSError as error:
        if error.errno in NOT_THERE:
            return False
        raise
    return True


def same(one: SafePath, other: SafePath) -> bool:
    """Whether two files have the same bytes. OSError."""
    with one.open() as first, other.open() as second:
        while True:
            block = first.read(1 << 20)
            if block != second.read(1 << 20):
                return False
            if not block:
                return True


def free_suffix(candidates: Iterable[SafePath]) -> str:
    """The first of "", "~2", "~3" … that makes every path free when put behind its stem: `dog.jpg` → `dog~2.jpg`.

    One suffix for all keeps a pair a pair.
    """
    paths = list(candidates)
    for number in itertools.count(1):
        suffix = "" if number == 1 else f"~{number}"
        if not any(exists(with_suffix(path, suffix)) for path in paths):
            return suffix
    raise AssertionError("unreachable")


def with_suffix(path: SafePath, suffix: str) -> SafePath:
    """`cam1/dog.jpg` and `~2` → `cam1/dog~2.jpg`; see `suffixed`."""
    return path.with_name(suffixed(path.name, suffix)) if suffix else path


def suffixed(name: str, suffix: str) -> str:
    """`dog.jpg` and `~2` → `dog~2.jpg`; `dog.jpg.aux.xml` → `dog~2.jpg.aux.xml`, as the picture that it belongs to.

    A stem that would make the name longer than 255 bytes is cut."""
    if not suffix:
        return name
    aux = name[-len(_AUX) :] if name.lower().endswith(_AUX) else ""
    stem, ending = os.path.splitext(name[: len(name) - len(aux)])
    ending += aux
    ending = suffix + ending
    return cut(stem, NAME_MAX - len(os.fsencode(ending))) + ending


def cut(name: str, nbytes: int) -> str:
    """As much of a name as fits into so many bytes, in whole characters."""
    while len(os.fsencode(name)) > nbytes:
        name = name[:-1]
    return name


def remedy_of(error: OSError) -> str:
    """What to do about an error of the system."""
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"this process runs as user {os.getuid()}, group {os.getgid()}; it must be able to read and write there"
    if error.errno == errno.EROFS:
        return "mount it for writing (`rw`)"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "make room there"
    if error.errno in (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ETIMEDOUT):
        return "look at dmesg, the disk, the file server and the network; then mount it again"
    return "look at it with `ls -l`, and at dmesg"


def shown(name: object) -> str:
    """A file name as it may go into a log or an error: line breaks, control and undecodable bytes escaped."""
    text = str(name)
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
