"""Fetches one large file over HTTP: resumes, verifies, and gives it its name only when it is whole and right.

A cut download stays as `NAME.part` beside its destination and is continued by the next try; what does not have the
promised SHA-256 in the end is removed. A lock file keeps two processes from writing the same part.

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

from sam_poll.errors import ModelError

CHUNK = 1 << 20
TIMEOUT_S = 60.0  # for the next bytes, not for the whole file
RETRIES = 5  # of cut connections in one call, each of which must have brought something

Progress = Callable[[int, int], None]


class _CutError(Exception):
    """The connection ended before the file did."""


def fetch(url: str, final: Path, *, sha256: str, size_hint: int, progress: Progress | None = None) -> Path:
    """`url` in the file `final`, whose folder is made if need be. Already there: nothing is done.

    `progress` gets bytes done and bytes in all. Raises ModelError.
    """
    if final.is_file():
        return final
    if not url.startswith(("http://", "https://")):
        raise ModelError("only http and https are downloaded", place=url)
    part = final.with_name(final.name + ".part")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _locked(final.with_name(final.name + ".lock")):
            if not final.is_file():  # another process may have finished it while we waited
                _fill(url, part, size_hint, progress)
                _verify(part, sha256, url)
                part.replace(final)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            part.unlink(missing_ok=True)
            raise _disk_full(final.parent) from error
        raise ModelError(f"cannot write the download: {error}", place=str(final.parent), remedy=_OTHER_CACHE) from error
    return final


_OTHER_CACHE = "make the folder writable, or set SAM_POLL_CACHE to one that is"


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hex, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The lock file stays: removing it would let a third process lock another file of the same name."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is downloading {}: waiting for it", path.stem)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fill(url: str, part: Path, size_hint: int, progress: Progress | None) -> None:
    """Continues `part` until it is whole."""
    for _ in range(RETRIES + 1):
        before = _size(part)
        try:
            return _continue(url, part, before, size_hint, progress)
        except _CutError as error:
            reason = str(error)
        if _size(part) <= before:
            break
        logger.warning("{}: {}; continuing at {} bytes", url, reason, _size(part))
    raise ModelError(f"the download was cut: {reason}", place=url, remedy="run it again: it continues where it stopped")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _continue(url: str, part: Path, start: int, size_hint: int, progress: Progress | None) -> None:
    """One request, from byte `start` on, appended to `part`."""
    with _reached(url, start, part) as response, part.open("ab") as file:
        if response is None:
            return
        if start and response.status != http.HTTPStatus.PARTIAL_CONTENT:  # a server that cannot resume
            start = 0
            file.truncate(0)
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        _check_space(part.parent, (total or size_hint) - start)
        done = _copy(response, file, start, total or size_hint, progress)
    if total is not None and done < total:
        raise _CutError(f"{done} of {total} bytes came")


@contextlib.contextmanager
def _reached(url: str, start: int, part: Path) -> Iterator[http.client.HTTPResponse | None]:
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
        remedy = f"check the network and the proxy (HTTPS_PROXY), or put the file into {part.parent} by hand"
        raise ModelError(f"the server cannot be reached: {error.reason}", place=url, remedy=remedy) from error
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise _CutError(str(error) or type(error).__name__) from error
    with response:
        yield response


def _copy(response: http.client.HTTPResponse, file: IO[bytes], done: int, total: int, progress: Progress | None) -> int:
    """Bytes in the file at the end; `_CutError` keeps what came."""
    while True:
        try:
            chunk = response.read(CHUNK)
        except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
            raise _CutError(str(error) or type(error).__name__) from error
        if not chunk:
            break
        file.write(chunk)
        done += len(chunk)
        if progress:
            progress(done, max(done, total))
    file.flush()
    os.fsync(file.fileno())
    return done


def _check_space(folder: Path, needed: int) -> None:
    if shutil.disk_usage(folder).free < needed:
        raise _disk_full(folder)


def _disk_full(folder: Path) -> ModelError:
    return ModelError("there is no room for the download", place=str(folder), remedy="free some, or set SAM_POLL_CACHE")


def _verify(part: Path, sha256: str, url: str) -> None:
    found = sha256_of(part)
    if found != sha256:
        part.unlink()
        reason = f"the download has the SHA-256 {found} instead of {sha256}, and was removed"
        raise ModelError(reason, place=url, remedy="try again; a proxy or a login page may have answered instead")
