"""Fetches one large file over HTTP: resumes, verifies, and gives it its name only when it is whole and right.

A cut download stays as `NAME.part` beside its destination and is continued by the next try; what does not have the
promised SHA-256 in the end is removed. A lock file keeps two processes from writing the same part. No more is taken
than the catalogue's size and some slack, whatever the server says.

What can still go wrong here: `flock` does nothing on some network file systems; two processes may then spoil each
other's part, which the hash finds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import http.client
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from loguru import logger

from sam_poll.complaints import quoted
from sam_poll.errors import ModelError
from sam_poll.safe_path import SafePath

CHUNK = 1 << 20
TIMEOUT_S = 60.0  # for the next bytes, not for the whole file
RETRIES = 5  # of cut connections in one call, each of which must have brought something

Progress = Callable[[int, int], None]


class _CutError(Exception):
    """The connection ended before the file did."""


def fetch(url: str, final: Path, *, sha256: str, size_hint: int, progress: Progress | None = None) -> Path:
    """Download `url` into the file `final`, whose folder is made if need be. Already there: nothing is done.

    `size_hint` is the expected length in bytes; a tenth more is accepted (`most`). `progress` gets bytes done and bytes
    in all. Raises ModelError.
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
                    _verify(part, sha256, size_hint, url)
                    folder.rename(part.name, final.name)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(final.parent) from error
        raise ModelError(f"cannot write the download: {error}", place=str(final.parent), remedy=_OTHER_CACHE) from error
    return final


_OTHER_CACHE = "make the folder writable, or set SAM_POLL_CACHE to one that is"
_OTHER_SERVER = "try again; a proxy or a login page may have answered instead"
_DIGITS = 15  # of a length; more are no file
_NO_FILE = {errno.ELOOP, errno.EISDIR, errno.ENXIO}


def most(size_hint: int) -> int:
    """Return the number of bytes that a file may have whose published copies are said to have `size_hint`.

    The copies' lengths are hints: they differ by less than a thousandth. The limit keeps a wrong server from filling
    the disk.
    """
    return size_hint + size_hint // 10


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hex, read in pieces."""
    with path.open("rb") as file:
        return _sha256(file)


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _fill(url: str, part: Part, size_hint: int, progress: Progress | None) -> None:
    """Continues `part` until it is whole."""
    for _ in range(RETRIES + 1):
        before = part.size()
        try:
            return _continue(url, part, before, size_hint, progress)
        except _CutError as error:
            reason = str(error)
        if part.size() <= before:
            break
        logger.warning("{}: {}; continuing at {} bytes", url, reason, part.size())
    raise ModelError(f"the download was cut: {reason}", place=url, remedy="run it again: it continues where it stopped")


def _continue(url: str, part: Part, start: int, size_hint: int, progress: Progress | None) -> None:
    """One request, from byte `start` on, appended to `part`."""
    with _reached(url, start, part.folder) as response:
        if response is None:
            return
        if start and response.status != http.HTTPStatus.PARTIAL_CONTENT:  # a server that cannot resume
            start = 0
            part.cut()
        total = _announced(response, start, size_hint, url)
        _check_space(part.folder, (total or size_hint) - start)
        done = _copy(response, part, start, total, size_hint, progress)
    if total is not None and done < total:
        raise _CutError(f"{done} of {total} bytes came")


def _announced(response: http.client.HTTPResponse, start: int, size_hint: int, url: str) -> int | None:
    """Return the file's length by the server's word, in bytes; None where it says none. ModelError for nonsense."""
    values = {value.strip() for value in response.headers.get_all("Content-Length") or ()}
    if not values:
        return None
    value = values.pop()
    if values or not (value.isascii() and value.isdigit() and len(value) <= _DIGITS):
        reason = f"the server announces a length that is none (Content-Length: {quoted(value)})"
        raise ModelError(reason, place=url, remedy=_OTHER_SERVER)
    total = start + int(value)
    if total > most(size_hint):
        reason = f"the server announces {total:,} bytes of a file that has about {size_hint:,}"
        raise ModelError(reason, place=url, remedy=_OTHER_SERVER)
    return total


@contextlib.contextmanager
def _reached(url: str, start: int, folder: Path) -> Iterator[http.client.HTTPResponse | None]:
    """The server's answer; None if it says that nothing comes after `start`: the hash decides if that is the whole."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})  # noqa: S310 - see fetch
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)  # noqa: S310 - only http and https come here
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and start:
            yield None
            return
        remedy = "the publisher may have moved the file: look for a newer version" if error.code == 404 else "try later"
        raise ModelError(f"the server answers {error.code} {error.reason}", place=url, remedy=remedy) from error
    except urllib.error.URLError as error:
        remedy = f"check the network and the proxy (HTTPS_PROXY), or put the file into {folder} by hand"
        raise ModelError(f"the server cannot be reached: {error.reason}", place=url, remedy=remedy) from error
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
    """Bytes in the file at the end; `_CutError` keeps what came. ModelError where too much comes: nothing is kept."""
    limit = most(size_hint) if total is None else total
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
                f"the server sends more bytes than {expected}; nothing of it is kept",
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
    return ModelError("there is no room for the download", place=str(folder), remedy="free some, or set SAM_POLL_CACHE")


def _verify(part: Part, sha256: str, size_hint: int, url: str) -> None:
    found, size = part.sha256(), part.size()
    if found != sha256:
        part.cut()
        reason = f"the download has the SHA-256 {found} instead of {sha256}, and was removed"
        if size != size_hint:
            reason += f"; it had {size:,} bytes instead of about {size_hint:,}"
        raise ModelError(reason, place=url, remedy=_OTHER_SERVER)


# ── the folder ──


class _Folder:
    """The models' folder. Names in it are opened as regular files of our own, or refused.

    Others may write to it: a link there is never followed, a FIFO never waited for, a foreign file never written to.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._names = path, SafePath.at(path)

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """The lock file stays: removing it would let a third process lock another file of the same name."""
        with self._own(name) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("another process is downloading {}: waiting for it", name.removesuffix(".lock"))
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[Part]:
        """Open the file that a download is collected in. It is removed at the end if nothing is in it."""
        with self._own(name) as file:
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
        """Refuse to replace what a finished download would replace: a link, a folder, a FIFO. ModelError."""
        try:
            (self._names / name).lstat()
        except FileNotFoundError:
            return
        raise self._foreign(name, "is in the way")

    def rename(self, name: str, final: str) -> None:
        """Give a file its final name, over no other."""
        self.check_free(final)
        (self._names / name).rename(self._names / final)

    def _own(self, name: str) -> IO[bytes]:
        try:
            handle = (self._names / name).open_file(os.O_RDWR | os.O_CREAT)
        except OSError as error:
            if error.errno in _NO_FILE:
                raise self._foreign(name, "is no file, or a link") from error
            raise
        file = os.fdopen(handle, "r+b", buffering=0)
        found = os.fstat(handle)
        # On mounts that give all files to one user, that user has the folder, too.
        owners = (os.geteuid(), self._names.lstat().st_uid)
        reason = None
        if found.st_nlink != 1:
            reason = "is a file that has other names, too"
        elif found.st_uid not in owners:
            reason = "belongs to another user"
        if reason:
            file.close()
            raise self._foreign(name, reason)
        return file

    def _foreign(self, name: str, reason: str) -> ModelError:
        return ModelError(
            f"{name} {reason}", place=str(self.path), remedy="nothing was written; move it away, and try again"
        )


class Part:
    """The open file that a download is collected in, whatever happens to its name."""

    def __init__(self, folder: Path, name: str, file: IO[bytes]) -> None:
        self.folder, self.name, self._file = folder, name, file

    def size(self) -> int:
        """Return its length in bytes."""
        return os.fstat(self._file.fileno()).st_size

    def append(self, chunk: bytes) -> None:
        """Write all of `chunk` at the end."""
        self._file.seek(0, os.SEEK_END)
        left = memoryview(chunk)
        while left:
            left = left[self._file.write(left) :]

    def cut(self) -> None:
        """Empty it."""
        self._file.truncate(0)

    def sync(self) -> None:
        """Flush it to disk."""
        os.fsync(self._file.fileno())

    def sha256(self) -> str:
        """Return its SHA-256 in hex."""
        self._file.seek(0)
        return _sha256(self._file)
