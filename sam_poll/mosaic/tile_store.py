"""Storage of a mosaic's finished tiles on disk: one file per tile, written atomically.

A mosaic that is started again continues after the last finished tile. Several processes may work
on one mosaic, on this machine or on others that see the folder. A process holds a lock on the tile
that it computes; the lock ends with the process, however that ends. The lock only distributes the
work and is not relied on for correctness: where a tile is computed twice, the first result is kept.

Limitations: a picture that was changed without a change of its length and modification time cannot
be distinguished from the old one. On a share without locks every process computes all tiles, and
two that finish at the same moment may interfere.
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
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from sam_poll.core.errors import UsageError
from sam_poll.core.files import TEMP_PREFIX, move_new, read_json, write_synced, write_whole
from sam_poll.core.safe_path import SafePath
from sam_poll.mosaic.segment_tile import Numbers

FOLDER = ".sam_poll-mosaic"
POLL_S = 0.1  # between two tries to get a lock
# Longest wait for the lock under which a mosaic is begun. It is held for a moment only; a process
# that holds it longer hangs.
BEGIN_S = 10.0
_HEARTBEAT_S = 1.0  # between two updates of a lock file's time
# What to do where an unfinished mosaic of another job is in the folder: raise UsageError, or drop
# it; or join a mosaic that has been begun already.
How = Literal["refuse", "replace", "join"]
_JOB = "job.json"
_OUTPUT_PREFIX = "made-"  # of the folders in which outputs are written
# Errors of `flock` on file systems without locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


@dataclass(frozen=True, slots=True, eq=False)
class TileResult:
    """A finished tile, or one layer of it.

    - `numbers`: the labels of its core, uint16, 0 is none.
    - `bands`: its labels of the bands along its seams, by side.
    - `scores`: predicted IoU of label 1, 2 ….
    - `areas`: pixels of label 1, 2 … in the core.
    - `valid`: pixels of the core that hold data.
    - `skipped`: whether the network was not run, because the tile is empty or of one colour.
    """

    numbers: Numbers
    bands: Mapping[str, Numbers]
    scores: npt.NDArray[np.float32]
    areas: npt.NDArray[np.int64]
    valid: int
    skipped: bool


class TileTable(NamedTuple):
    """A layer of a finished tile without its pixels; the fields are those of `TileResult`."""

    scores: npt.NDArray[np.float32]
    areas: npt.NDArray[np.int64]
    valid: int
    skipped: bool


class TileReader(Protocol):
    """A layer of the finished tiles; `TileStore` documents the methods."""

    def table(self, number: int) -> TileTable:
        """Return scores, areas and counts of a finished tile."""
        ...

    def numbers(self, number: int) -> Numbers:
        """Return the labels of a finished tile's core."""
        ...

    def bands(self, number: int, *sides: str) -> dict[str, Numbers]:
        """Return a finished tile's labels of the bands along some of its seams."""
        ...


class TileStore:
    """The finished tiles of one mosaic, and its outputs while they are written, in a folder.

    A mosaic of everything has one layer of labels, the layer 0; one of texts has a layer for each.
    `job` is what the tiles depend on, as JSON values. Where the folder holds an unfinished mosaic
    of another job, UsageError is raised, or with `how` "replace" that mosaic is dropped. With
    "join" UsageError is raised where no mosaic of this job has been begun.
    """

    def __init__(self, folder: SafePath, job: Mapping[str, Any], how: How = "refuse") -> None:
        self.folder = folder
        text = json.dumps(job, indent=2, sort_keys=True)
        # Each job has a folder of its own, so that a process which is late with a tile of another
        # job does no harm.
        self._tiles = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._last_heartbeat = 0.0
        deadline = time.monotonic() + BEGIN_S
        while True:
            # Not found: another process has just finished the mosaic and removed the folder.
            with contextlib.suppress(FileNotFoundError):
                self._tiles.mkdir(parents=how != "join", exist_ok=True)
                with self.held("begin") as locked:
                    if locked or time.monotonic() > deadline:  # the holder of the lock hangs
                        self._agree(job, text, how)
                        return
            if how == "join" and not self.folder.is_dir():
                raise UsageError("the mosaic is over", place=str(self.folder))
            time.sleep(POLL_S)

    def _agree(self, job: Mapping[str, Any], text: str, how: How) -> None:
        """Compare `job` with the job of the mosaic in the folder, and write it where it is new."""
        path = self.folder / _JOB
        earlier = None
        if path.is_file():
            with contextlib.suppress(ValueError):
                earlier = read_json(path)
            earlier = earlier if isinstance(earlier, dict) else {}  # unreadable: of another job
        if earlier == job:
            return
        if how == "replace" or (earlier is None and how == "refuse"):
            for old in map(self.folder.__truediv__, self.folder.names()):
                if old.is_dir() and old != self._tiles:
                    _remove(old)
            write_whole(path, text.encode())
        elif earlier is None:
            raise UsageError("the mosaic is not begun yet, or over", place=str(self.folder))
        else:
            self._tiles.remove_tree()
            changed = ", ".join(
                sorted(key for key in {*earlier, *job} if earlier.get(key) != job.get(key))
            )
            raise UsageError(
                f"the folder holds an unfinished mosaic of another kind ({changed} differ)",
                place=str(self.folder.parent),
                remedy="choose another folder, repeat the call with the earlier picture and flags, "
                f"or remove {self.folder}",
            )

    @contextmanager
    def held(self, name: str | int) -> Iterator[bool]:
        """Try to lock a name, or a tile by its number, and yield whether it is locked.

        The lock ends with the context. FileNotFoundError is raised where the mosaic's folder has
        been removed or replaced.
        """
        if isinstance(name, int):
            path = self._tiles / f"tile-{name:05d}.lock"
        else:
            path = self.folder / f"{name}.lock"
        # Opening it does not change the file's time, which is the heartbeat.
        with os.fdopen(path.open_own(), "rb+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            # The locked file may belong to a folder that has been replaced meanwhile.
            if not os.path.samestat(path.lstat(), os.fstat(lock.fileno())):
                raise FileNotFoundError(errno.ENOENT, "removed meanwhile", str(path))
            yield True

    def path(self, number: int) -> SafePath:
        """Return the path of a tile's file."""
        return self._tiles / f"tile-{number:05d}.npz"

    def has(self, number: int) -> bool:
        """Return whether a tile is finished."""
        return self.path(number).is_file()

    def keep(self, number: int, *layers: TileResult) -> None:
        """Write a finished tile atomically. Where the tile exists already, that one is kept.

        Its layers have the same valid pixels, and all or none of them are skipped. Raises OSError,
        and FileNotFoundError as `held` does.
        """
        body = io.BytesIO()
        arrays: dict[str, Any] = {
            "counts": np.array([layers[0].valid, layers[0].skipped], np.int64)
        }
        for index, layer in enumerate(layers):
            end = _suffix(index)
            arrays[f"numbers{end}"] = layer.numbers
            arrays[f"scores{end}"] = layer.scores
            arrays[f"areas{end}"] = layer.areas
            arrays |= {f"band_{side}{end}": band for side, band in layer.bands.items()}
        if len(layers) > 1:
            labelled = np.zeros(layers[0].numbers.shape, bool)
            for layer in layers:
                labelled |= layer.numbers > 0
            arrays["labelled"] = np.array(np.count_nonzero(labelled), np.int64)
        np.savez_compressed(body, **arrays)
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

    def table(self, number: int, *, layer: int = 0) -> TileTable:
        """Return scores, areas and counts of a finished tile, without reading its labels."""
        end = _suffix(layer)
        with self._open(number) as file:
            valid, skipped = file["counts"].tolist()
            return TileTable(file[f"scores{end}"], file[f"areas{end}"], valid, bool(skipped))

    def numbers(self, number: int, *, layer: int = 0) -> Numbers:
        """Return the labels of a finished tile's core."""
        with self._open(number) as file:
            return np.asarray(file[f"numbers{_suffix(layer)}"])

    def bands(self, number: int, *sides: str, layer: int = 0) -> dict[str, Numbers]:
        """Return a finished tile's labels of the bands along some of its seams."""
        with self._open(number) as file:
            return {side: file[f"band_{side}{_suffix(layer)}"] for side in sides}

    def covered(self, number: int) -> tuple[int, int]:
        """Return how many pixels of a finished tile's core have a label, and how many are valid."""
        with self._open(number) as file:
            # Labels of one layer do not overlap, those of several may.
            labelled = file["labelled"] if "labelled" in file else file["areas"].sum()
            return int(labelled), int(file["counts"][0])

    @contextmanager
    def _open(self, number: int) -> Iterator[Any]:
        """Open a finished tile.

        A file that is damaged, by the disk or by a power cut, is removed, so that the next try
        computes the tile again. OSError reports that.
        """
        path = self.path(number)
        try:
            with path.open() as raw, np.load(raw, allow_pickle=False) as file:
                yield file
        except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            path.unlink(missing_ok=True)
            reason = (
                "a finished tile is damaged and was removed; "
                "it is computed again when the mosaic is started again"
            )
            raise OSError(errno.EIO, reason, str(path)) from error

    # ── outputs ──

    def fresh(self, *, alone: bool) -> SafePath:
        """Create and return a new folder for outputs.

        With `alone` no other process writes any, so that folders of earlier ones are removed.
        Raises OSError.
        """
        if alone:
            for name in self.folder.names():
                if name.startswith(_OUTPUT_PREFIX):
                    _remove(self.folder / name)
        outputs = self.folder / f"{_OUTPUT_PREFIX}{uuid.uuid4().hex}"
        outputs.mkdir()
        return outputs

    def beat(self, name: str) -> None:
        """Write a heartbeat: show other processes that the holder of the lock `name` is alive."""
        if time.monotonic() - self._last_heartbeat > _HEARTBEAT_S:
            self._last_heartbeat = time.monotonic()
            with contextlib.suppress(OSError):
                (self.folder / f"{name}.lock").touch()

    def beaten_ns(self, name: str) -> int:
        """Return the time of the last heartbeat for the lock `name`, in nanoseconds.

        Compare it with earlier values only: it is the file server's clock. Raises
        FileNotFoundError as `held` does.
        """
        return (self.folder / f"{name}.lock").lstat().st_mtime_ns

    def clear(self) -> None:
        """Remove the folder of a finished mosaic.

        job.json is removed first: without it, files that could not be removed are ignored.
        """
        (self.folder / _JOB).unlink(missing_ok=True)
        _remove(self.folder)  # may fail where another process writes a late tile


class TileLayer:
    """One layer of a `TileStore`, as a `TileReader`."""

    def __init__(self, tiles: TileStore, layer: int) -> None:
        self._tiles = tiles
        self._layer = layer

    def table(self, number: int) -> TileTable:
        """Return scores, areas and counts of a finished tile."""
        return self._tiles.table(number, layer=self._layer)

    def numbers(self, number: int) -> Numbers:
        """Return the labels of a finished tile's core."""
        return self._tiles.numbers(number, layer=self._layer)

    def bands(self, number: int, *sides: str) -> dict[str, Numbers]:
        """Return a finished tile's labels of the bands along some of its seams."""
        return self._tiles.bands(number, *sides, layer=self._layer)


def _suffix(layer: int) -> str:
    """Return the end of the names that a layer's arrays have in the file of a tile."""
    return f"_{layer}" if layer else ""


def clear_after(folder: SafePath, job: Mapping[str, Any]) -> None:
    """Remove the rest of a finished mosaic's folder, unless another mosaic has been begun there."""
    try:
        current = read_json(folder / _JOB)
    except FileNotFoundError:
        current = job
    except ValueError:  # unreadable: of another job
        current = None
    if current == job:
        _remove(folder)


def _remove(folder: SafePath) -> None:
    """Remove a folder as far as possible; files that remain are ignored by later mosaics."""
    with contextlib.suppress(OSError):
        folder.remove_tree()
