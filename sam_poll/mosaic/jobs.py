"""A mosaic as a job of the pipeline: one tile at a time on the device thread, put together on the finish pool.

What is done lies in the job's scratch folder, where other daemons and devices may take tiles, too, and where it is
found again when the job is given back, taken over or tried again.

What can still go wrong here: a picture that is replaced while it is at work, by one of the same length and time.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from loguru import logger

from sam_poll import bytesof, prompts
from sam_poll.errors import PictureError
from sam_poll.fs import NO_FILE, shown
from sam_poll.mosaic.passes import Passes
from sam_poll.mosaic.source import Source, opened
from sam_poll.mosaic.state import How
from sam_poll.mosaic.tiles import Area
from sam_poll.mosaic.work import GEOJSON, GEOPACKAGE, RASTER, Step, Taken, Wish, Work
from sam_poll.safe_path import SafePath
from sam_poll.types import ADVANCED, Bitmap, Document, Engine, Job, Mosaic, Pixels

T = TypeVar("T")

_KINDS = {
    RASTER: "image/tiff; application=geotiff",
    GEOPACKAGE: "application/geopackage+sqlite3",
    GEOJSON: "application/geo+json",
}
_BREATH_S = 0.5


def begin(job: Job, between: Callable[[], None], *, model: str) -> MosaicPieces:
    """The mosaic that a job asks for, taken up where it was left. `between` is called between two steps, and may raise
    what ends the work; `model` names the weights. PictureError, UnfinishedError, OSError."""
    with _by_name(job):
        return MosaicPieces(job, between, model)


@contextmanager
def _by_name(job: Job) -> Iterator[None]:
    """Errors name the picture, or a file beside it, and not where they lie while they are at work."""
    try:
        yield
    except PictureError as error:
        assert isinstance(job.picture, SafePath)
        folder = f"{job.picture.parent}/"
        error.reason = error.reason.replace(folder, "")
        error.place = shown((error.place or job.picture.name).replace(folder, ""))
        raise


class _Read:
    """A job's picture, checked, opened, read and closed in one thread of its own: GDAL's settings are a thread's, and
    the stages of a job run in many. `between` is called as long as any of it takes."""

    def __init__(self, job: Job, between: Callable[[], None]) -> None:
        self._thread, self._stack, self._between = ThreadPoolExecutor(1, "windows"), ExitStack(), between
        try:
            self._source = source = self._there(lambda: self._opened(job))
        except BaseException:
            self.close()
            raise
        self.size, self.crs, self.transform, self.nodata = source.size, source.crs, source.transform, source.nodata
        self._notes: list[str] | None = None
        self.gcps, self.rpcs, self.beside = source.gcps, source.rpcs, source.beside

    def _opened(self, job: Job) -> Source:
        assert isinstance(job.picture, SafePath)
        try:
            bytesof.check_file(job)
        except OSError as error:
            if error.errno not in NO_FILE:
                raise
            raise bytesof.unreadable(error) from error
        source = self._stack.enter_context(opened(job.picture))
        prompts.check_size(job.image_size, source.size)
        return source

    def _there(self, act: Callable[[], T]) -> T:
        future = self._thread.submit(act)
        while not wait([future], _BREATH_S).done:
            self._between()
        return future.result()

    def read(self, area: Area) -> tuple[Pixels, Bitmap]:
        return self._there(lambda: self._source.read(area))

    def notes(self) -> list[str]:
        if self._notes is None:
            self._notes = self._there(self._source.notes)
        return self._notes

    def close(self) -> None:
        self._thread.submit(self._stack.close)
        self._thread.shutdown(wait=False)  # a share that hangs must not hold the end up


class MosaicPieces:
    """`types.Pieces` of one mosaic."""

    def __init__(self, job: Job, between: Callable[[], None], model: str) -> None:
        asked = job.prompts
        assert isinstance(asked, Mosaic)
        assert isinstance(job.picture, SafePath)
        assert job.scratch is not None
        self._job, self._between, self._tenth, self._advanced = job, between, 0, job.helps
        self.found = 0
        wish = Wish(asked.tile, asked.padding, Passes(asked.first, asked.passes, asked.target_coverage), model)
        self._source: _Read | None = _Read(job, between)
        try:
            for note in () if job.helps else self._source.notes():
                logger.warning("job {}: {}", shown(job.id), note)
            how: How = "join" if job.helps else "anew"
            self._work = Work(self._source, job.picture, wish, job.scratch, self._on_step, how=how, between=between)
            try:
                self._work.look()
            except FileNotFoundError as error:
                raise _gone(error) from error
        except BaseException:
            self.close()
            raise

    def take(self, engine: Engine) -> bool | None:
        """Make one tile. None: others are at what is left. OSError: what was done is gone."""
        try:
            with _by_name(self._job):
                taken = self._work.take(lambda: engine)
            if taken is Taken.TILE and not self._advanced:
                (self._work.state.folder / ADVANCED).touch()
                self._advanced = True
        except FileNotFoundError as error:
            if self._job.helps:  # whose it is has finished it
                return False
            raise _gone(error) from error
        return None if taken is Taken.WAIT else taken is Taken.TILE

    def documents(self) -> Sequence[Document]:
        """labels.tif, labels.gpkg, labels.geojson as files in the scratch folder, and stats.json."""
        state = self._work.state
        try:
            # Held by who has lost the job to us, and does not know it yet, or hangs: what we make lies beside that.
            with state.held("end") as ours:
                made = state.fresh(alone=ours)
                stats = self._work.put_together(made)
        except FileNotFoundError as error:
            raise _gone(error) from error
        self.found = stats["labels"]
        files = [Document(f".{name}", kind, b"", made / name) for name, kind in _KINDS.items()]
        return [*files, Document(".stats.json", "application/json", json.dumps(stats, indent=2).encode())]

    def close(self) -> None:
        """Let go of the picture."""
        source, self._source = self._source, None
        if source:
            source.close()

    def _on_step(self, step: Step) -> None:
        tenth = step.done * 10 // step.total
        if step.stage == "tiles" and tenth != self._tenth:
            self._tenth = tenth
            line = "job {}: {} of {} tiles, {:.1%} covered"
            logger.info(line, shown(self._job.id), step.done, step.total, step.coverage)
        self._between()


def _gone(error: OSError) -> OSError:
    return OSError(errno.ESTALE, "what was done of the mosaic has been taken away", error.filename)
