"""A mosaic as a job of the pipeline: tiles on the device thread, outputs on the finish pool.

Finished tiles are in the job's scratch folder. There other daemons and devices may compute tiles,
too, and the job continues there after it was requeued, taken over or retried.

Limitations: a picture that is replaced during the job by one of the same length and modification
time is not detected.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from loguru import logger

from sam_poll.core.errors import PictureError
from sam_poll.core.files import NO_FILE
from sam_poll.core.protocols import Engine
from sam_poll.core.safe_path import SafePath
from sam_poll.core.text import shown
from sam_poll.core.types import ADVANCED, BoolArray, Job, Mosaic, OutputFile, RgbArray
from sam_poll.imaging import source_file
from sam_poll.mosaic.assembly import (
    GEOJSON,
    GEOPACKAGE,
    RASTER,
    MosaicAssembly,
    MosaicOptions,
    Step,
    Taken,
)
from sam_poll.mosaic.grid import Area
from sam_poll.mosaic.raster import Raster, opened
from sam_poll.mosaic.segment_tile import Passes
from sam_poll.mosaic.tile_store import How
from sam_poll.prompts import parser

T = TypeVar("T")

_MEDIA_TYPES = {
    RASTER: "image/tiff; application=geotiff",
    GEOPACKAGE: "application/geopackage+sqlite3",
    GEOJSON: "application/geo+json",
}
_ON_STEP_INTERVAL_S = 0.5  # between two calls of `on_step` while a read takes long


def begin(job: Job, on_step: Callable[[], None], *, model: str) -> MosaicPieces:
    """Return the mosaic that `job` requests, continued where an earlier attempt ended.

    `on_step` is called between two steps; its exceptions end the work. `model` names the weights.
    Raises PictureError, IncompleteFileError, OSError.
    """
    with _errors_by_name(job):
        return MosaicPieces(job, on_step, model)


@contextmanager
def _errors_by_name(job: Job) -> Iterator[None]:
    """Make errors name the picture, or a file beside it, without the folder of claimed jobs."""
    try:
        yield
    except PictureError as error:
        assert isinstance(job.picture, SafePath)
        folder = f"{job.picture.parent}/"
        error.reason = error.reason.replace(folder, "")
        error.place = shown((error.place or job.picture.name).replace(folder, ""))
        raise


class _ThreadedRaster:
    """A job's picture, opened, read and closed in one thread of its own.

    GDAL's settings are per thread, and the stages of a job run in many. `on_step` is called
    repeatedly while the thread works.
    """

    def __init__(self, job: Job, on_step: Callable[[], None]) -> None:
        self._thread = ThreadPoolExecutor(1, "windows")
        self._stack = ExitStack()
        self._on_step = on_step
        try:
            self._raster = raster = self._in_thread(lambda: self._open(job))
        except BaseException:
            self.close()
            raise
        self.size = raster.size
        self.crs = raster.crs
        self.transform = raster.transform
        self.nodata = raster.nodata
        self.gcps = raster.gcps
        self.rpcs = raster.rpcs
        self.beside = raster.beside
        self._notes: list[str] | None = None

    def _open(self, job: Job) -> Raster:
        """Check the picture and open it, in the thread."""
        assert isinstance(job.picture, SafePath)
        try:
            source_file.check_file(job)
        except OSError as error:
            if error.errno not in NO_FILE:
                raise
            raise source_file.unreadable_error(error) from error
        raster = self._stack.enter_context(opened(job.picture))
        parser.check_size(job.image_size, raster.size)
        return raster

    def _in_thread(self, function: Callable[[], T]) -> T:
        future = self._thread.submit(function)
        while not wait([future], _ON_STEP_INTERVAL_S).done:
            self._on_step()
        return future.result()

    def read(self, area: Area) -> tuple[RgbArray, BoolArray]:
        """Return the pixels of an area as RGB, and which of them are valid."""
        return self._in_thread(lambda: self._raster.read(area))

    def notes(self) -> list[str]:
        """Return warnings for the picture's owner."""
        if self._notes is None:
            self._notes = self._in_thread(self._raster.notes)
        return self._notes

    def close(self) -> None:
        """Close the picture, without waiting: a share that hangs must not delay the shutdown."""
        self._thread.submit(self._stack.close)
        self._thread.shutdown(wait=False)


class MosaicPieces:
    """One mosaic as a `core.protocols.TiledJob`."""

    def __init__(self, job: Job, on_step: Callable[[], None], model: str) -> None:
        request = job.prompts
        assert isinstance(request, Mosaic)
        assert isinstance(job.picture, SafePath)
        assert job.scratch is not None
        self._job = job
        self._on_step = on_step
        self._logged_tenths = 0  # of the tiles
        # Whether the marker file ADVANCED is written; a helper does not write it.
        self._advanced = job.is_helper
        self.found = 0
        self._outputs_lock = ExitStack()
        options = MosaicOptions(
            request.tile,
            request.padding,
            Passes(request.first, request.passes, request.target_coverage),
            model,
            request.concept,
        )
        self._source: _ThreadedRaster | None = _ThreadedRaster(job, on_step)
        try:
            if not job.is_helper:
                for note in self._source.notes():
                    logger.warning("job {}: {}", shown(job.id), note)
            how: How = "join" if job.is_helper else "replace"
            self._assembly = MosaicAssembly(
                self._source,
                job.picture,
                options,
                job.scratch,
                self._on_tile,
                how=how,
                on_step=on_step,
            )
            try:
                self._assembly.count_finished()
            except FileNotFoundError as error:
                raise _scratch_removed(error) from error
        except BaseException:
            self.close()
            raise

    def take(self, engine: Engine) -> bool | None:
        """Compute one tile on the device thread.

        Returns False where all tiles are finished, None where other processes are computing the
        remaining ones. Raises OSError where the finished tiles have been removed.
        """
        try:
            with _errors_by_name(self._job):
                taken = self._assembly.take(lambda: engine)
            if taken is Taken.TILE and not self._advanced:
                (self._assembly.tiles.folder / ADVANCED).touch()
                self._advanced = True
        except FileNotFoundError as error:
            if self._job.is_helper:  # the owner of the job has finished it
                return False
            raise _scratch_removed(error) from error
        if taken is Taken.WAIT:
            return None
        return taken is Taken.TILE

    def documents(self) -> Sequence[OutputFile]:
        """Write the outputs and return them: files in the scratch folder, and stats.json.

        The files are safe from other processes until `close`. Call it once.
        """
        tiles = self._assembly.tiles
        try:
            # Another process may hold this lock: one that has lost the job and has not noticed it,
            # or that hangs. The outputs are then written beside its own. Released before they are
            # delivered, it would be got by such a process, which would remove them.
            locked = self._outputs_lock.enter_context(tiles.held("end"))
            folder = tiles.fresh(alone=locked)
            stats = self._assembly.write_outputs(folder)
        except FileNotFoundError as error:
            raise _scratch_removed(error) from error
        self.found = stats["labels"]
        files = [
            OutputFile(f".{name}", media_type, b"", folder / name)
            for name, media_type in _MEDIA_TYPES.items()
        ]
        return [
            *files,
            OutputFile(".stats.json", "application/json", json.dumps(stats, indent=2).encode()),
        ]

    def close(self) -> None:
        """Close the picture, and let other processes remove the outputs.

        It may be called from any thread, and more than once.
        """
        self._outputs_lock.close()
        source, self._source = self._source, None
        if source:
            source.close()

    def _on_tile(self, step: Step) -> None:
        tenths = step.done * 10 // step.total
        if step.stage == "tiles" and tenths != self._logged_tenths:
            self._logged_tenths = tenths
            line = "job {}: {} of {} tiles, {:.1%} covered"
            logger.info(line, shown(self._job.id), step.done, step.total, step.coverage)
        self._on_step()


def _scratch_removed(error: OSError) -> OSError:
    return OSError(errno.ESTALE, "the finished tiles of the mosaic were removed", error.filename)
