"""Resumable, verified download of one large file over HTTP.

An interrupted download stays as `NAME.part` beside its destination and is continued by the next
call. The file gets its final name only when it is complete and has the expected SHA-256; otherwise
it is removed. Where no SHA-256 is published, that of the first download is written to
`NAME.sha256`, in the form of `sha256sum`, and later downloads must have it. A lock file keeps two
processes from writing the same part. Whatever length the server announces, at most the catalogue's
size plus a tolerance is accepted.

Limitations: `flock` has no effect on some network file systems. Two processes may then damage each
other's part, which the hash reveals.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import http.client
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from loguru import logger

from sam_poll.core.errors import ModelError
from sam_poll.core.safe_path import SafePath
from sam_poll.core.validation import quoted

CHUNK = 1 << 20  # bytes read at a time
TIMEOUT_S = 60.0  # for the next bytes, not for the whole file
# Reconnections in one call; each connection must have brought at least one byte.
RETRIES = 5

RECORD = ".sha256"  # ending of the file that keeps the hash of a first download

Progress = Callable[[int, int], None]


class _CutError(Exception):
    """The connection ended before the file did."""


def fetch(
    url: str, final: Path, *, sha256: str | None, size_hint: int, progress: Progress | None = None
) -> Path:
    """Download `url` into the file `final` and return it. If the file exists, do nothing.

    The folder is created if need be. `size_hint` is the expected length in bytes; a tenth more is
    accepted (`max_bytes`). `sha256` None: none is published. `progress` is called with the bytes
    done and the bytes in total. Raises ModelError.
    """
    if final.is_file():
        return final
    if not url.startswith(("http://", "https://")):
        raise ModelError("only http and https are downloaded", place=url)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        folder = _Folder(final.parent)
        with folder.locked(final.name + ".lock"):
            if not final.is_file():  # another process may have finished it while we waited
                folder.check_free(final.name)
                with folder.part(final.name + ".part") as part:
                    _fill(url, part, size_hint, progress)
                    if sha256:
                        _verify(part, sha256, size_hint, url)
                    else:
                        _verify_by_record(part, final, folder, size_hint, url)
                    folder.rename(part.name, final.name)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(final.parent) from error
        raise ModelError(
            f"cannot write the download: {error}", place=str(final.parent), remedy=_OTHER_CACHE
        ) from error
    return final


_OTHER_CACHE = "make the folder writable, or set SAM_POLL_CACHE to one that is"
_OTHER_SERVER = "try again; a proxy or a login page may have answered instead"
_MAX_DIGITS = 15  # of a Content-Length; longer numbers are refused before they are parsed
# Errors of opening a link (O_NOFOLLOW), a folder, and a socket or FIFO without a reader.
_NOT_A_FILE = {errno.ELOOP, errno.EISDIR, errno.ENXIO}


def max_bytes(size_hint: int) -> int:
    """Return the largest accepted length, in bytes, of a file of about `size_hint` bytes.

    The lengths in the catalogue are approximate: published copies differ by less than a
    thousandth. The limit keeps a wrong server from filling the disk.
    """
    return size_hint + size_hint // 10


def sha256_of(path: Path) -> str:
    """Return the file's SHA-256 in hex, reading the file in chunks."""
    with path.open("rb") as file:
        return _sha256(file)


def recorded_sha256(path: Path) -> str | None:
    """Return the SHA-256 in hex that the first download of the file `path` had.

    None where it was downloaded with a published hash, or not at all.
    """
    try:
        text = path.with_name(path.name + RECORD).read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.match(r"[0-9a-f]{64}\b", text)
    return found.group() if found else None


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _fill(url: str, part: Part, size_hint: int, progress: Progress | None) -> None:
    """Continue `part` until it is complete, reconnecting where a connection is cut."""
    for _ in range(RETRIES + 1):
        before = part.size()
        try:
            return _continue(url, part, before, size_hint, progress)
        except _CutError as error:
            reason = str(error)
        if part.size() <= before:
            break
        logger.warning("{}: {}; continuing at {} bytes", url, reason, part.size())
    raise ModelError(
        f"the download was cut: {reason}",
        place=url,
        remedy="run the download again; it continues where it stopped",
    )


def _continue(url: str, part: Part, start: int, size_hint: int, progress: Progress | None) -> None:
    """Send one request for the bytes from `start` on and append the response to `part`."""
    with _opened(url, start, part.folder) as response:
        if response is None:
            return
        cannot_resume = response.status != http.HTTPStatus.PARTIAL_CONTENT
        if start and cannot_resume:
            start = 0
            part.cut()
        total = _announced_length(response, start, size_hint, url)
        _check_space(part.folder, (total or size_hint) - start)
        done = _copy(response, part, start, total, size_hint, progress)
    if total is not None and done < total:
        raise _CutError(f"received {done} of {total} bytes")


def _announced_length(
    response: http.client.HTTPResponse, start: int, size_hint: int, url: str
) -> int | None:
    """Return the length of the whole file in bytes, by the response's Content-Length.

    Returns None where there is no such header. Raises ModelError where its value is invalid or too
    large.
    """
    values = {value.strip() for value in response.headers.get_all("Content-Length") or ()}
    if not values:
        return None
    value = values.pop()
    if values or not (value.isascii() and value.isdigit() and len(value) <= _MAX_DIGITS):
        reason = f"the server announces an invalid length (Content-Length: {quoted(value)})"
        raise ModelError(reason, place=url, remedy=_OTHER_SERVER)
    total = start + int(value)
    if total > max_bytes(size_hint):
        reason = f"the server announces {total:,} bytes of a file that has about {size_hint:,}"
        raise ModelError(reason, place=url, remedy=_OTHER_SERVER)
    return total


@contextlib.contextmanager
def _opened(url: str, start: int, folder: Path) -> Iterator[http.client.HTTPResponse | None]:
    """Yield the response to a request for the bytes from `start` on.

    Yields None where the server has no bytes after `start`; the hash then shows whether the part
    is complete. Raises ModelError, or `_CutError` where the connection breaks.
    """
    headers = {"Range": f"bytes={start}-"} if start else {}
    # `fetch` accepts http and https only.
    request = urllib.request.Request(url, headers=headers)  # noqa: S310
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)  # noqa: S310
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and start:
            yield None
            return
        remedy = "try again later"
        if error.code == http.HTTPStatus.NOT_FOUND:
            remedy = "the publisher may have moved the file: look for a newer version of sam_poll"
        raise ModelError(
            f"the server answers {error.code} {error.reason}", place=url, remedy=remedy
        ) from error
    except urllib.error.URLError as error:
        remedy = (
            f"check the network and the proxy (HTTPS_PROXY), or put the file into {folder} by hand"
        )
        raise ModelError(
            f"the server cannot be reached: {error.reason}", place=url, remedy=remedy
        ) from error
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise _CutError(str(error) or type(error).__name__) from error
    with response:
        yield response


def _copy(
    response: http.client.HTTPResponse,
    part: Part,
    done: int,
    total: int | None,
    size_hint: int,
    progress: Progress | None,
) -> int:
    """Append the response to `part`, which holds `done` bytes, and return its length in bytes.

    Raises `_CutError` where the connection breaks; the bytes received so far are kept. Raises
    ModelError where more bytes arrive than announced; the part is then emptied.
    """
    limit = max_bytes(size_hint) if total is None else total
    while True:
        try:
            chunk = response.read(CHUNK)
        except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
            raise _CutError(str(error) or type(error).__name__) from error
        if not chunk:
            break
        done += len(chunk)
        if done > limit:
            part.cut()
            expected = f"about {size_hint:,}" if total is None else f"the {total:,} announced"
            raise ModelError(
                f"the server sends more bytes than {expected}; the download was discarded",
                place=response.url,
                remedy=_OTHER_SERVER,
            )
        part.append(chunk)
        if progress:
            progress(done, max(done, total or size_hint))
    part.sync()
    return done


def _check_space(folder: Path, needed: int) -> None:
    if shutil.disk_usage(folder).free < needed:
        raise _disk_full(folder)


def _disk_full(folder: Path) -> ModelError:
    return ModelError(
        "there is no room for the download",
        place=str(folder),
        remedy="free disk space, or set SAM_POLL_CACHE to a folder on another disk",
    )


def _verify(part: Part, sha256: str, size_hint: int, url: str) -> None:
    actual = part.sha256()
    size = part.size()
    if actual != sha256:
        part.cut()
        reason = f"the download has the SHA-256 {actual} instead of {sha256} and was removed"
        if size != size_hint:
            reason += f"; it had {size:,} bytes instead of about {size_hint:,}"
        raise ModelError(reason, place=url, remedy=_OTHER_SERVER)


def _verify_by_record(part: Part, final: Path, folder: _Folder, size_hint: int, url: str) -> None:
    """Check a download for which no hash is published: by its length, and the first one's hash.

    Keeps the hash of the first download. Raises ModelError.
    """
    size = part.size()
    if size < size_hint - size_hint // 10:
        part.cut()
        raise ModelError(
            f"the download has {size:,} bytes instead of about {size_hint:,} and was removed",
            place=url,
            remedy=_OTHER_SERVER,
        )
    if known := recorded_sha256(final):
        _verify(part, known, size_hint, url)
        return
    actual = part.sha256()
    with folder.part(final.name + RECORD) as record:
        record.cut()
        record.append(f"{actual}  {final.name}\n".encode())
        record.sync()
    logger.warning(
        "{}: not verified, because no SHA-256 is published; it has {}, which is kept in {} and "
        "which further downloads must have",
        final.name,
        actual,
        final.name + RECORD,
    )


# ── the folder ──


class _Folder:
    """The folder of downloaded models, opened safely although other users may write to it.

    Only regular files of this user are opened: a link is never followed, a FIFO never waited for,
    another user's file never written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names = SafePath.at(path)

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold an exclusive lock on the file `name`, waiting for it if need be.

        The lock file is kept: after its removal a third process could lock another file of the
        same name.
        """
        with self._open(name) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info(
                    "waiting for another process that is downloading {}",
                    name.removesuffix(".lock"),
                )
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[Part]:
        """Open the file that collects a download. An empty one is removed in the end."""
        with self._open(name) as file:
            part = Part(self.path, name, file)
            try:
                yield part
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    part.cut()
                raise
            finally:
                if not part.size():
                    with contextlib.suppress(FileNotFoundError):
                        (self._names / name).unlink()

    def check_free(self, name: str) -> None:
        """Raise ModelError where the final name is taken, for example by a link or a folder."""
        try:
            (self._names / name).lstat()
        except FileNotFoundError:
            return
        raise self._refusal(name, "is in the way")

    def rename(self, name: str, final: str) -> None:
        """Rename a file to its final name. Raises ModelError where that name is taken."""
        self.check_free(final)
        (self._names / name).rename(self._names / final)

    def _open(self, name: str) -> IO[bytes]:
        """Open or create a regular file of this user. Raises ModelError for anything else."""
        try:
            handle = (self._names / name).open_file(os.O_RDWR | os.O_CREAT)
        except OSError as error:
            if error.errno in _NOT_A_FILE:
                raise self._refusal(name, "is a link or not a regular file") from error
            raise
        file = os.fdopen(handle, "r+b", buffering=0)
        status = os.fstat(handle)
        # On mounts that report one owner for all files, that user owns the folder, too.
        owners = (os.geteuid(), self._names.lstat().st_uid)
        reason = None
        if status.st_nlink != 1:
            reason = "is a file with more than one hard link"
        elif status.st_uid not in owners:
            reason = "belongs to another user"
        if reason:
            file.close()
            raise self._refusal(name, reason)
        return file

    def _refusal(self, name: str, reason: str) -> ModelError:
        return ModelError(
            f"{name} {reason}",
            place=str(self.path),
            remedy=f"nothing was written; move {name} away and try again",
        )


class Part:
    """The open file that collects a download, whatever happens to its name."""

    def __init__(self, folder: Path, name: str, file: IO[bytes]) -> None:
        self.folder = folder
        self.name = name
        self._file = file

    def size(self) -> int:
        """Return the file's length in bytes."""
        return os.fstat(self._file.fileno()).st_size

    def append(self, chunk: bytes) -> None:
        """Write all of `chunk` at the end of the file."""
        self._file.seek(0, os.SEEK_END)
        left = memoryview(chunk)
        while left:
            left = left[self._file.write(left) :]

    def cut(self) -> None:
        """Truncate the file to zero bytes."""
        self._file.truncate(0)

    def sync(self) -> None:
        """Flush the file to disk."""
        os.fsync(self._file.fileno())

    def sha256(self) -> str:
        """Return the file's SHA-256 in hex."""
        self._file.seek(0)
        return _sha256(self._file)
