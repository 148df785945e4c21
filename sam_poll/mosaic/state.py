"""What is done of a mosaic, on disk: one file a tile, written whole. Started again, the work goes on behind the last.

What can still go wrong here: a picture changed without its length and time of change cannot be told from the old one.
"""

from __future__ import annotations

import fcntl
import io
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sam_poll.errors import ShareError, UsageError
from sam_poll.fs import write_whole
from sam_poll.mosaic.passes import Numbers

FOLDER = ".sam_poll-mosaic"
_JOB, _LOCK = "job.json", "lock"


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


class State:
    """The folder of finished tiles, and of outputs that are being made."""

    def __init__(self, output: Path) -> None:
        self.folder = output / FOLDER

    @contextmanager
    def held(self, job: Mapping[str, Any]) -> Iterator[None]:
        """Ours alone, made for `job`. UsageError where another job has been left here; ShareError where one runs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ShareError("another run is writing here", place=str(self.folder.parent)) from None
            path = self.folder / _JOB
            if path.is_file() and (left := json.loads(path.read_text())) != job:
                changed = ", ".join(sorted(key for key in {*left, *job} if left.get(key) != job.get(key)))
                raise UsageError(
                    f"an unfinished mosaic of another kind lies here ({changed} differ)",
                    place=str(self.folder.parent),
                    remedy=f"take another folder, go on with what it was begun with, or remove {self.folder}",
                )
            if not path.is_file():
                for tile in self.folder.glob("*.npz"):  # what is left of a finished one, killed while it was cleared
                    tile.unlink()
                write_whole(path, json.dumps(job, indent=2).encode())
            yield

    def path(self, number: int) -> Path:
        return self.folder / f"tile-{number:05d}.npz"

    def has(self, number: int) -> bool:
        return self.path(number).is_file()

    def keep(self, number: int, done: Done) -> None:
        """Write a finished tile, so that it is there whole or not at all. OSError."""
        body = io.BytesIO()
        bands: dict[str, Any] = {f"band_{side}": band for side, band in done.bands.items()}
        counts = np.array([done.valid, done.skipped], np.int64)
        np.savez_compressed(body, numbers=done.numbers, scores=done.scores, areas=done.areas, counts=counts, **bands)
        write_whole(self.path(number), body.getvalue())

    def table(self, number: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], int, bool]:
        """Of a finished tile: scores, areas, valid pixels, whether it was skipped. Its labels are not read."""
        with np.load(self.path(number), allow_pickle=False) as file:
            valid, skipped = file["counts"].tolist()
            return file["scores"], file["areas"], valid, bool(skipped)

    def numbers(self, number: int) -> Numbers:
        """Of a finished tile: the labels of its core."""
        with np.load(self.path(number), allow_pickle=False) as file:
            return np.asarray(file["numbers"])

    def bands(self, number: int, *sides: str) -> dict[str, Numbers]:
        """Of a finished tile: its view of the areas along some of its seams."""
        with np.load(self.path(number), allow_pickle=False) as file:
            return {side: file[f"band_{side}"] for side in sides}

    def clear(self) -> None:
        """Everything is done: the name of the job goes first, so that what may be left counts for nothing."""
        (self.folder / _JOB).unlink(missing_ok=True)
        shutil.rmtree(self.folder)
