"""Read a job's picture file, and compare it with what the prompt says of it.

Limitations: a writer that changes a file between two checks and restores its size and time is not
detected.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import sys
from typing import BinaryIO, TypeAlias

from sam_poll.core.errors import FileChangedError, IncompleteFileError, PictureError
from sam_poll.core.files import NO_FILE
from sam_poll.core.safe_path import SafePath
from sam_poll.core.text import shown
from sam_poll.core.types import Job
from sam_poll.imaging.headers import Header, read_header

_MAX_BYTES = 2 << 30
_HEAD = 1 << 18  # bytes that contain the header of most pictures
_LENGTH = "has {:,} bytes, but the prompt's image_bytes says {:,}"
_HASH = "is not the file whose SHA-256 the prompt's image_sha256 names"
_Stamp: TypeAlias = tuple[int, int, int]  # inode, bytes, time of change


def read(path: SafePath) -> tuple[bytes, _Stamp]:
    """Return a picture's bytes, and the stamp of its file before reading.

    Links are not followed, and pipes do not block. Raises PictureError for a file that is not a
    regular, readable file; any other OSError means that the share is not available.
    """
    with _opened(path) as file:
        status = os.fstat(file.fileno())
        if status.st_size > _MAX_BYTES:
            raise PictureError(
                f"the file has {status.st_size >> 20} MiB; at most {_MAX_BYTES >> 20} are read",
                place=shown(path.name),
                remedy="save it as a smaller file",
            )
        return file.read(), _stamp(status)


def check_openable(path: SafePath) -> None:
    """Raise the error of `read` where the file cannot be opened."""
    _opened(path).close()


def _opened(path: SafePath) -> BinaryIO:
    try:
        return path.open()
    except OSError as error:
        if error.errno in NO_FILE:
            raise unreadable_error(error, shown(path.name)) from error
        raise


def unreadable_error(error: OSError, place: str | None = None) -> PictureError:
    """Return the error for a picture that cannot be opened, with a remedy by error number."""
    if error.errno == errno.ELOOP:
        return PictureError(
            "cannot be read: it is a link", place=place, remedy="put the file itself there"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        remedy = "give the user that sam-poll runs as permission to read it"
        return PictureError(
            f"cannot be read: {error.strerror}", place=place, remedy=remedy, retriable=True
        )
    return PictureError(f"cannot be read: {error.strerror or error}", place=place)


def header(path: SafePath) -> Header:
    """Read the header of a picture's file, from its first bytes where they suffice.

    Raises PictureError.
    """
    try:
        with path.open() as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise PictureError(
            f"cannot be read: {error.strerror}", remedy="make it readable for this user"
        ) from None
    with contextlib.suppress(PictureError):
        return read_header(head)
    return read_header(read(path)[0])


def header_of(data: bytes) -> Header:
    """Read a picture's header, of any size. Raises PictureError."""
    return read_header(data, max_pixels=sys.maxsize)


def _stamp(status: os.stat_result) -> _Stamp:
    return status.st_ino, status.st_size, status.st_mtime_ns


def check_unchanged(path: SafePath, seen: _Stamp | None) -> None:
    """Raise FileChangedError if the file was changed since it was opened.

    Any other error found in it is void then.
    """
    try:
        changed = _stamp(path.lstat()) != seen
    except FileNotFoundError:
        return  # taken over, or deleted; the job source reports that
    if changed:
        raise FileChangedError(
            "was changed while it was read", place=shown(path.name), remedy="copy it again"
        )


def check(job: Job, data: bytes) -> None:
    """Check that the picture is the file that the prompt names, if it names one.

    Raises IncompleteFileError.
    """
    differs = None
    if job.nbytes is not None and job.nbytes != len(data):
        differs = _LENGTH.format(len(data), job.nbytes)
    elif job.sha256 is not None and job.sha256 != hashlib.sha256(data).hexdigest():
        differs = _HASH
    _refuse(job, differs)


def check_file(job: Job) -> None:
    """Check a picture as `check`, without reading it into memory. Raises OSError."""
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
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _refuse(job: Job, differs: str | None) -> None:
    if differs:
        raise IncompleteFileError(
            differs, place=name(job), remedy="copy the picture again, or correct the prompt"
        )


def name(job: Job) -> str | None:
    """Return a picture's file name for messages; None for a picture without a file."""
    return shown(job.picture.name) if isinstance(job.picture, SafePath) else None
