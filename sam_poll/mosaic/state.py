"""What is done of a mosaic, on disk: one file a tile, written whole. Started again, the work goes on behind the last.

Several may work on one mosaic, on this machine or on others that see the folder. A tile is held by a lock, which ends
with its holder however that ends. It says who works on what and is no fence: a tile made twice is kept once, and the
first one stands.

What can still go wrong here: a picture changed without its length and time of change cannot be told from the old one.
Where a share has no locks tiles are made by each, and two that finish at once may get into each other's way.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import time
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from sam_poll.errors import UsageError
from sam_poll.fs import TEMP_PREFIX, move_new, read_json, write_synced, write_whole
from sam_poll.mosaic.passes import Numbers
from sam_poll.safe_path import SafePath

FOLDER = ".sam_poll-mosaic"
POLL_S = 0.1
BEGIN_S = 10.0  # who has the lock for the moment in which a mosaic is begun hangs if that takes so long
_BEAT_S = 1.0
How = Literal["refuse", "anew", "join"]
_JOB = "job.json"
_MADE = "made-"
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


@dataclass(frozen=True, slots=True, eq=False)
class Done:
    """A finished tile. `numbers`: uint16, its core's labels; `bands`: its view of the areas along its seams, by side;
    `scores`: of label 1, 2 …; `areas`: their pixels in the core; `valid`: pixels of the core that hold anything."""

    numbers: Numbers
    bands: Mapping[str, Numbers]
    scores: npt.NDArray[np.float32]
    areas: npt.NDArray[np.int64]
    valid: int
    skipped: bool


class Finished(Protocol):
    """Finished tiles, as they are put together; `State` says what each is."""

    def table(self, number: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], int, bool]: ...
    def numbers(self, number: int) -> Numbers: ...
    def bands(self, number: int, *sides: str) -> dict[str, Numbers]: ...


class State:
    """The finished tiles of one mosaic, and its outputs while they are made, in a folder made for it.

    `job` is what the tiles depend on, as JSON has it. Where an unfinished one of another kind lies there: UsageError,
    or with `how` "anew" it is dropped. "join": UsageError where none of this kind has been begun.
    """

    def __init__(self, folder: SafePath, job: Mapping[str, Any], how: How = "refuse") -> None:
        self.folder = folder
        text = json.dumps(job, indent=2, sort_keys=True)
        # Of its own for each kind, so that who comes late with a tile of another kind does no harm.
        self._tiles = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._beaten = 0.0
        waits_until = time.monotonic() + BEGIN_S
        while True:
            # not there: cleared just now by who has finished it
            with contextlib.suppress(FileNotFoundError):
                self._tiles.mkdir(parents=how != "join", exist_ok=True)
                with self.held("begin") as ours:
                    if ours or time.monotonic() > waits_until:  # whoever has it hangs
                        self._agree(job, text, how)
                        return
            if how == "join" and not self.folder.is_dir():
                raise UsageError("it is over", place=str(self.folder))
            time.sleep(POLL_S)

    def _agree(self, job: Mapping[str, Any], text: str, how: How) -> None:
        path = self.folder / _JOB
        left = None
        if path.is_file():
            with contextlib.suppress(ValueError):
                left = read_json(path)
            left = left if isinstance(left, dict) else {}  # of none that we know
        if left == job:
            return
        if how == "anew" or (left is None and how == "refuse"):
            for old in map(self.folder.__truediv__, self.folder.names()):
                if old.is_dir() and old != self._tiles:
                    _removed(old)
            write_whole(path, text.encode())
        elif left is None:
            raise UsageError("it is not begun yet, or over", place=str(self.folder))
        else:
            self._tiles.remove_tree()
            changed = ", ".join(sorted(key for key in {*left, *job} if left.get(key) != job.get(key)))
            raise UsageError(
                f"an unfinished mosaic of another kind lies here ({changed} differ)",
                place=str(self.folder.parent),
                remedy=f"take another folder, go on with what it was begun with, or remove {self.folder}",
            )

    @contextmanager
    def held(self, name: str | int) -> Iterator[bool]:
        """Whether a name, or a tile, is ours alone until the end of the `with`. FileNotFoundError: all has been cleared
        away."""
        path = self._tiles / f"tile-{name:05d}.lock" if isinstance(name, int) else self.folder / f"{name}.lock"
        with os.fdopen(path.open_own(), "rb+") as lock:  # which leaves its time alone
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            if not os.path.samestat(path.lstat(), os.fstat(lock.fileno())):  # of a folder that has been made anew
                raise FileNotFoundError(errno.ENOENT, "cleared away meanwhile", str(path))
            yield True

    def path(self, number: int) -> SafePath:
        return self._tiles / f"tile-{number:05d}.npz"

    def has(self, number: int) -> bool:
        return self.path(number).is_file()

    def keep(self, number: int, done: Done) -> None:
        """Write a finished tile, so that it is there whole or not at all; the first one of a number stays. OSError;
        FileNotFoundError as `held`."""
        body = io.BytesIO()
        bands: dict[str, Any] = {f"band_{side}": band for side, band in done.bands.items()}
        counts = np.array([done.valid, done.skipped], np.int64)
        np.savez_compressed(body, numbers=done.numbers, scores=done.scores, areas=done.areas, counts=counts, **bands)
        temporary = self._tiles / f"{TEMP_PREFIX}{uuid.uuid4().hex}.tmp"
        try:
            write_synced(temporary, body.getvalue())
            move_new(temporary, self.path(number))
        except FileExistsError:
            temporary.unlink(missing_ok=True)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            error.filename = error.filename or str(self._tiles)
            raise

    def table(self, number: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], int, bool]:
        """Of a finished tile: scores, areas, valid pixels, whether it was skipped. Its labels are not read."""
        with self._read(number) as file:
            valid, skipped = file["counts"].tolist()
            return file["scores"], file["areas"], valid, bool(skipped)

    def numbers(self, number: int) -> Numbers:
        """Of a finished tile: the labels of its core."""
        with self._read(number) as file:
            return np.asarray(file["numbers"])

    def bands(self, number: int, *sides: str) -> dict[str, Numbers]:
        """Of a finished tile: its view of the areas along some of its seams."""
        with self._read(number) as file:
            return {side: file[f"band_{side}"] for side in sides}

    @contextmanager
    def _read(self, number: int) -> Iterator[Any]:
        """One that is spoilt, by a disk or a power cut, is removed: OSError says so, and the next try makes it anew."""
        path = self.path(number)
        try:
            with path.open() as raw, np.load(raw, allow_pickle=False) as file:
                yield file
        except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            path.unlink(missing_ok=True)
            said = "a finished tile is spoilt; it is removed, and made anew when this is started again"
            raise OSError(errno.EIO, said, str(path)) from error

    # ── outputs ──

    def fresh(self, *, alone: bool) -> SafePath:
        """A new folder for outputs. `alone`: nobody else makes any, so what others have begun is removed. OSError."""
        for name in self.folder.names() if alone else ():
            if name.startswith(_MADE):
                _removed(self.folder / name)
        made = self.folder / f"{_MADE}{uuid.uuid4().hex}"
        made.mkdir()
        return made

    def beat(self, name: str) -> None:
        """Who holds a name is at work."""
        if time.monotonic() - self._beaten > _BEAT_S:
            self._beaten = time.monotonic()
            with contextlib.suppress(OSError):
                (self.folder / f"{name}.lock").touch()

    def beaten_ns(self, name: str) -> int:
        """A number that changes as long as who holds a name is at work. FileNotFoundError as `held`."""
        return (self.folder / f"{name}.lock").lstat().st_mtime_ns

    def clear(self) -> None:
        """Everything is done: the name of the job goes first, so that what may be left counts for nothing."""
        (self.folder / _JOB).unlink(missing_ok=True)
        _removed(self.folder)  # not an error: somebody's late tile may come in between


def clear_after(folder: SafePath, job: Mapping[str, Any]) -> None:
    """Remove what is left of a mosaic that is finished, unless another one has been begun there."""
    try:
        left = read_json(folder / _JOB)
    except FileNotFoundError:
        left = job
    except ValueError:  # of none that we know
        left = None
    if left == job:
        _removed(folder)


def _removed(folder: SafePath) -> None:
    """Remove a folder as far as it goes: what is left counts for nothing."""
    with contextlib.suppress(OSError):
        folder.remove_tree()
