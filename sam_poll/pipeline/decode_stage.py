"""The decode stage: read the picture, check it and its prompts, prepare it for the network."""

from __future__ import annotations

from sam_poll.core.errors import PictureError, PromptError
from sam_poll.core.safe_path import SafePath
from sam_poll.core.types import ConceptRequest, Job, ModelInfo, Mosaic, Size
from sam_poll.imaging import decode, source_file
from sam_poll.pipeline.embedding_cache import CachedEmbedding
from sam_poll.pipeline.rough_masks import with_masks
from sam_poll.pipeline.run_context import RunContext
from sam_poll.pipeline.task import StageTimer, Task
from sam_poll.pipeline.tiled_jobs import TiledJobs
from sam_poll.prompts import parser


class DecodeStage:
    """Prepares tasks for the device; on the decode pool."""

    def __init__(self, context: RunContext, tiled_jobs: TiledJobs) -> None:
        self._context = context
        self._tiled_jobs = tiled_jobs
        self._engine = context.engine
        self._embeddings = context.embeddings
        self._stored = context.stored
        self._options = context.options
        self._device_queue = context.device_queue

    def run(self, task: Task) -> None:
        """Decode the picture of a task, or open its mosaic, and queue it for the device."""
        job = task.job
        if job.error:
            raise job.error
        if isinstance(job.prompts, Mosaic):
            self._check_texts(job)
            self._tiled_jobs.open(task)
            return
        if isinstance(job.prompts, ConceptRequest):
            self._engine.check_concept(job.prompts)
        with StageTimer(task, "decode"):
            if isinstance(job.picture, SafePath):
                data, stamp = source_file.read(job.picture)
            else:
                data, stamp = job.picture, None
            self._context.read_failures.reset()
            source_file.check(job, data)
            try:
                self._prepare(task, data)
            except PictureError as error:
                error.place = error.place or source_file.name(job)
                raise
            finally:
                if isinstance(job.picture, SafePath):
                    source_file.check_unchanged(job.picture, stamp)
            assert task.size is not None
            parser.check_size(job.image_size, task.size, lambda: source_file.header_of(data).stored)
            self._fit(task, task.size)
        self._device_queue.put(task)

    def _check_texts(self, job: Job) -> None:
        """Check the texts of a mosaic; those of a helper's job were checked by the job's owner."""
        assert isinstance(job.prompts, Mosaic)
        if job.prompts.concept is None or job.is_helper:
            return
        try:
            self._engine.check_concept(job.prompts.concept)
        except PromptError as error:
            error.place = f"mosaic.{error.place}"
            raise

    def _fit(self, task: Task, size: Size) -> None:
        """Check the request against the picture's size; keep it as it applies to the picture."""
        request = with_masks(task.job.prompts, size, self._options.max_pixels)
        fitted = parser.fit_request(request, size)
        if isinstance(fitted, tuple):
            task.prompts = fitted
        elif isinstance(fitted, ConceptRequest):
            task.concept = fitted

    def _prepare(self, task: Task, data: bytes) -> None:
        """Decode the picture and prepare it for the network.

        Skipped when its embedding is cached and nothing needs the picture itself.
        """
        info = self._engine.info
        needs_picture = bool(self._options.keeps_picture(task.job) or task.crops)
        min_decode_side = self._options.decode_side(task.job)
        task.key = decode.digest_of(data), info.side
        cached = self._cached(task, info)
        if cached and not needs_picture:
            task.embedding = cached.embedding
            task.size = cached.embedding.frame.size
            task.notes = cached.notes
            return
        if task.crops:
            min_decode_side = max(min_decode_side, info.side << task.crops)
        picture = decode.decode_for(
            data,
            info,
            min_decode_side=min_decode_side,
            max_pixels=self._options.max_pixels,
            digest=task.key[0],
        )
        task.size = picture.size
        task.notes = picture.notes
        task.prepared = self._engine.prepare(picture)
        task.key = picture.digest, task.prepared.frame.side
        task.picture = picture if needs_picture else None

    def _cached(self, task: Task, info: ModelInfo) -> CachedEmbedding | None:
        """Return the picture's embedding from memory, else from the disk; None if it is not there.

        A job that is to keep it on the disk looks there only.
        """
        cached = None if task.job.keep else self._embeddings.get(task.key)
        if cached:
            return cached
        task.stored = self._stored.find(task.key[0], info, self._options.max_pixels)
        if task.stored is None:
            return None
        self._embeddings.put(task.key, *task.stored.cached)
        return task.stored.cached
