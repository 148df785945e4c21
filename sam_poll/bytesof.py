"""The bytes of a job's picture: read with care, and compared with what the prompt says of them.

What can still go wrong here: a writer that changes a file between two looks and puts its size and time back.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import sys
from typing import BinaryIO, TypeAlias

from sam_poll.errors import ChangedError, PictureError, UnfinishedError
from sam_poll.fs import NO_FILE, shown
from sam_poll.headers import Header, read_header
from sam_poll.safe_path import SafePath
from sam_poll.types import Job

_MAX_BYTES = 2 << 30
_HEAD = 1 << 18  # bytes in which most pictures say their size
_LENGTH = "has {:,} bytes, but the prompt's image_bytes says {:,}"
_HASH = "is not the file whose SHA-256 the prompt's image_sha256 names"
_Seen: TypeAlias = tuple[int, int, int]  # inode, bytes, time of change


def read(path: SafePath) -> tuple[bytes, _Seen]:
    """A picture's bytes, and what its file was before; never through a link, never blocking on a pipe.

    OSErrors other than those of a file that is no picture mean a sick share.
    """
    with _opened(path) as file:
        found = os.fstat(file.fileno())
        if found.st_size > _MAX_BYTES:
            raise PictureError(
                f"the file has {found.st_size >> 20} MiB; at most {_MAX_BYTES >> 20} are read",
                place=shown(path.name),
                remedy="save it as a smaller file",
            )
        return file.read(), _seen(found)


def openable(path: SafePath) -> None:
    """Raise what `read` would raise where the file cannot even be opened."""
    _opened(path).close()


def _opened(path: SafePath) -> BinaryIO:
    try:
        return path.open()
    except OSError as error:
        if error.errno in NO_FILE:
            raise unreadable(error, shown(path.name)) from error
        raise


def unreadable(error: OSError, place: str | None = None) -> PictureError:
    """The refusal of a picture that cannot be opened, with the remedy that its error number suggests."""
    if error.errno == errno.ELOOP:
        return PictureError("cannot be read: it is a link", place=place, remedy="put the file itself there")
    if error.errno in (errno.EACCES, errno.EPERM):
        remedy = "give the user that sam-poll runs as permission to read it"
        return PictureError(f"cannot be read: {error.strerror}", place=place, remedy=remedy, retriable=True)
    return PictureError(f"cannot be read: {error.strerror or error}", place=place)


def header(path: SafePath) -> Header:
    """Read what a picture's file says about itself, from its beginning where that tells. PictureError."""
    try:
        with path.open() as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise PictureError(f"cannot be read: {error.strerror}", remedy="let it be readable") from None
    with contextlib.suppress(PictureError):
        return read_header(head)
    return read_header(read(path)[0])


def header_of(data: bytes) -> Header:
    """Read what a picture says about itself, whatever its size. PictureError."""
    return read_header(data, max_pixels=sys.maxsize)


def _seen(found: os.stat_result) -> _Seen:
    return found.st_ino, found.st_size, found.st_mtime_ns


def check_unchanged(path: SafePath, seen: _Seen | None) -> None:
    """ChangedError when somebody has written into the file since it was opened; whatever else was found wrong with
    it then counts for nothing."""
    try:
        changed = _seen(path.lstat()) != seen
    except FileNotFoundError:
        return  # taken over, or deleted; the door will say
    if changed:
        raise ChangedError("was changed while it was read", place=shown(path.name), remedy="copy it again")


def check(job: Job, data: bytes) -> None:
    """Whether the picture is the very file that the prompt names, if it does."""
    differs = None
    if job.nbytes is not None and job.nbytes != len(data):
        differs = _LENGTH.format(len(data), job.nbytes)
    elif job.sha256 is not None and job.sha256 != hashlib.sha256(data).hexdigest():
        differs = _HASH
    _refuse(job, differs)


def check_file(job: Job) -> None:
    """As `check`, of a picture that is not to be read whole; OSError."""
    assert isinstance(job.picture, SafePath)
    differs = None
    with job.picture.open() as file:
        nbytes = os.fstat(file.fileno()).st_size
        if job.nbytes is not None and job.nbytes != nbytes:
            differs = _LENGTH.format(nbytes, job.nbytes)
        elif job.sha256 is not None and job.sha256 != _digest(file):
            differs = _HASH
    _refuse(job, differs)


def _digest(file: BinaryIO) -> str:
    found = hashlib.sha256()
    while block := file.read(1 << 20):
        found.update(block)
    return found.hexdigest()


def _refuse(job: Job, differs: str | None) -> None:
    if differs:
        raise UnfinishedError(differs, place=name(job), remedy="copy the picture again, or mend the prompt")


def name(job: Job) -> str | None:
    """A picture's file name, to be shown; None where it has none."""
    return shown(job.picture.name) if isinstance(job.picture, SafePath) else None
