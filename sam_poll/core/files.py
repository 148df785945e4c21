"""Basic file operations on a share: atomic writes, moves that do not overwrite, free names.

All of them take `SafePath`s, so that none follows a planted symbolic link.

Limitations: `move_new` checks and then renames, so two processes that move *different* files to the
same new name at the same time may overwrite one; claims ensure that a file has one owner. Some
network shares do not support fsync of a folder, which is then skipped: a crash of the *server* may
undo a rename there.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from typing import Any

from sam_poll.core.safe_path import SafePath
from sam_poll.core.text import cut

TEMP_PREFIX = ".sam_poll-"
NAME_MAX = 255  # bytes; ext4, XFS, and most others
MASK_FILE_ENDING = ".rough.png"
"""The ending of the names of rough masks beside a picture, in lower case."""
_AUX = ".aux.xml"
_serial = itertools.count()
NO_FILE = {errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EACCES, errno.EPERM}
NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}
_NO_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.ENOSYS}


def write_whole(path: SafePath, body: bytes) -> None:
    """Write a file atomically: temporary name in the same folder, flush to disk, rename.

    Raises OSError, after removing the temporary file. The folder itself is flushed by
    `sync_folder`, once for many files.
    """
    with AtomicFiles() as files:
        files.write(path, body)
        files.show()


def write_synced(path: SafePath, body: bytes) -> None:
    """Replace a file by a new one, and flush it to disk.

    The old file is removed, never written into: it may be a link, or a second name of another file.
    """
    path.unlink(missing_ok=True)
    write_new(path, body)


def write_new(path: SafePath, body: bytes) -> None:
    """Write a new file, and flush it to disk. Raises FileExistsError where the name is taken."""
    with path.create() as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())


class AtomicFiles:
    """Several files written atomically: `write` each, then `show` them all.

    Temporary files are written in `folder`, which must be on the same file system; None: each in
    the folder of its final name. What has not been shown when the `with` block ends is removed.
    """

    def __init__(self, folder: SafePath | None = None) -> None:
        self._folder = folder
        self._files: list[tuple[SafePath, SafePath]] = []

    def write(self, path: SafePath, body: bytes) -> None:
        """Write a file under a temporary name, and flush it to disk."""
        write_new(self._temporary(path), body)

    def take(self, path: SafePath, file: SafePath) -> None:
        """Add a copy of an existing file of the same file system, as a hard link where possible."""
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
        unique = f"{os.getpid()}-{threading.get_ident()}-{next(_serial)}"
        temporary = folder / f"{TEMP_PREFIX}{unique}.tmp"
        self._files.append((temporary, path))
        return temporary

    def show(self) -> None:
        """Rename the files to their final names, in the order in which they were added."""
        while self._files:
            temporary, path = self._files[0]
            temporary.rename(path)
            self._files.pop(0)

    def __enter__(self) -> AtomicFiles:
        return self

    def __exit__(self, *exc: object) -> None:
        for temporary, _ in self._files:
            with contextlib.suppress(OSError):
                temporary.unlink()


def sync_folder(folder: SafePath) -> None:
    """Flush the renames in a folder to disk, where the file system supports that."""
    try:
        folder.sync()
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise


def rename(source: SafePath, target: SafePath) -> None:
    """Rename a file; on an error, check whether the rename took place nevertheless.

    On a network share the reply may be lost although the rename was done; the client repeats the
    request, and the server then answers that there is no such file.
    """
    before = source.lstat()
    try:
        source.rename(target)
    except OSError:
        with contextlib.suppress(OSError):
            after = target.lstat()
            if (after.st_ino, after.st_dev) == (before.st_ino, before.st_dev) and not exists(
                source
            ):
                return
        raise


def move_new(source: SafePath, target: SafePath) -> None:
    """Rename a file within one file system, creating the target's folder.

    Raises FileExistsError if the target exists.
    """
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
    """Read an untrusted JSON file of the share.

    Raises OSError; ValueError where the file is not JSON, longer than `most` bytes, or nested too
    deep.
    """
    return parse_json(path.read_bytes(most))


def parse_json(body: bytes) -> Any:
    """Parse untrusted JSON. Raises ValueError, as `read_json`."""
    try:
        return json.loads(body)
    except RecursionError:
        raise ValueError("nested too deep") from None


def exists(path: SafePath) -> bool:
    """Return whether a name is taken, by a broken link too.

    Raises OSError for every error other than "not there".
    """
    try:
        path.lstat()
    except OSError as error:
        if error.errno in NOT_THERE:
            return False
        raise
    return True


def same_content(one: SafePath, other: SafePath) -> bool:
    """Return whether two files have the same content. Raises OSError."""
    with one.open() as first, other.open() as second:
        while True:
            block = first.read(1 << 20)
            if block != second.read(1 << 20):
                return False
            if not block:
                return True


def free_suffix(
    candidates: Iterable[SafePath], is_taken: Callable[[str], bool] = lambda suffix: False
) -> str:
    """Return the first of "", "~2", "~3" … with which all the paths are free (see `suffixed`).

    One suffix for all keeps the names of a pair alike. `is_taken` tells suffixes that may not be
    used for another reason.
    """
    paths = list(candidates)
    for number in itertools.count(1):
        suffix = "" if number == 1 else f"~{number}"
        if not any(exists(with_suffix(path, suffix)) for path in paths) and not is_taken(suffix):
            return suffix
    raise AssertionError("unreachable")


def with_suffix(path: SafePath, suffix: str) -> SafePath:
    """Add a suffix to a path's stem: `cam1/dog.jpg` and `~2` → `cam1/dog~2.jpg`; see `suffixed`."""
    return path.with_name(suffixed(path.name, suffix)) if suffix else path


def suffixed(name: str, suffix: str) -> str:
    """Add a suffix to a file name's stem: `dog.jpg` and `~2` → `dog~2.jpg`.

    `dog.jpg.aux.xml` becomes `dog~2.jpg.aux.xml`, to stay with its picture, and `dog.rough.png`
    becomes `dog~2.rough.png`. A stem that would make the name longer than 255 bytes is cut.
    """
    if not suffix:
        return name
    if name.lower().endswith(MASK_FILE_ENDING):
        stem, ending = name[: -len(MASK_FILE_ENDING)], name[-len(MASK_FILE_ENDING) :]
    else:
        aux = name[-len(_AUX) :] if name.lower().endswith(_AUX) else ""
        stem, ending = os.path.splitext(name[: len(name) - len(aux)])
        ending += aux
    ending = suffix + ending
    return cut(stem, NAME_MAX - len(os.fsencode(ending))) + ending


def remedy_of(error: OSError) -> str:
    """Return the remedy for an error of the operating system."""
    if error.errno in (errno.EACCES, errno.EPERM):
        return (
            f"this process runs as user {os.getuid()}, group {os.getgid()}; "
            "it must be able to read and write there"
        )
    if error.errno == errno.EROFS:
        return "mount the file system for writing (`rw`)"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space there"
    if error.errno in (
        errno.EIO,
        errno.ESTALE,
        errno.ENOTCONN,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ETIMEDOUT,
    ):
        return "check dmesg, the disk, the file server and the network; then mount the share again"
    return "check it with `ls -l`, and check dmesg"
