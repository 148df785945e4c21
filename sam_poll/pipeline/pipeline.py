"""The pipeline: decode pool → one device thread → finish pool, from a job source and back to it.

    source.jobs() ─▶ decode pool ─▶ device thread ─▶ finish pool ─▶ source.deliver() | reject()

The number of jobs in progress is bounded, so a slow share slows the intake down instead of filling
the memory.

Limitations: a picture library that crashes the process on hostile bytes ends the run. Its job and
those beside it stay claimed and are recovered; each is then run alone (`Job.attempt`), which tells
which one it was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from sam_poll.core.protocols import Engine, Format, JobSource
from sam_poll.core.stats import Stats
from sam_poll.core.telemetry import Telemetry
from sam_poll.core.types import Result
from sam_poll.pipeline.decode_stage import DecodeStage
from sam_poll.pipeline.device_loop import DeviceLoop
from sam_poll.pipeline.device_queue import DeviceQueue
from sam_poll.pipeline.disk_cache import DiskCache
from sam_poll.pipeline.embedding_cache import EmbeddingCache
from sam_poll.pipeline.finish_stage import FinishStage
from sam_poll.pipeline.intake import Intake
from sam_poll.pipeline.options import PipelineOptions
from sam_poll.pipeline.run_context import RunContext
from sam_poll.pipeline.stored_embeddings import StoredEmbeddings
from sam_poll.pipeline.tiled_jobs import TiledJobFactory, TiledJobs

_FAILED_DEVICE_JOIN_S = 0.1


class Pipeline:
    """Answers the jobs of a source with an engine.

    - `formats`: a sequence: every job gets all of them; a mapping by name: those in `Job.formats`,
      or all where it is None.
    - `on_result`: called with each delivered result.
    - `tiled_jobs`: opens jobs that are done tile by tile; None: such jobs are rejected.
    - `disk_cache`: embeddings that stay; None: none do.
    """

    def __init__(
        self,
        engine: Engine,
        formats: Sequence[Format] | Mapping[str, Format],
        *,
        options: PipelineOptions | None = None,
        telemetry: Telemetry | None = None,
        on_result: Callable[[Result], None] | None = None,
        tiled_jobs: TiledJobFactory | None = None,
        disk_cache: DiskCache | None = None,
    ) -> None:
        self.telemetry = telemetry or Telemetry()
        if not isinstance(formats, Mapping):
            formats = {str(number): make for number, make in enumerate(formats)}
        self._formats = formats
        self._engine = engine
        self._on_result = on_result
        self._tiled_job_factory = tiled_jobs
        self._options = options or PipelineOptions()
        self._embeddings = EmbeddingCache(self._options.cache_mib << 20)
        engine.on_memory_pressure(self._embeddings.evict)
        self._stored = StoredEmbeddings(engine, disk_cache, self.telemetry.stats.cached)
        self._device_queue = DeviceQueue()
        self._abort = threading.Event()

    @property
    def stats(self) -> Stats:
        """The counts of `telemetry`."""
        return self.telemetry.stats

    @property
    def device_count(self) -> int:
        """How many devices may work on one tiled job; 0: tiled jobs are rejected."""
        return int(self._tiled_job_factory is not None)

    @property
    def capacity(self) -> int:
        """Maximum number of jobs in progress, at present."""
        return self._options.capacity(self._engine.batch)

    def run(self, source: JobSource, stop: threading.Event) -> None:
        """Answer jobs until the source ends or `stop` is set, then finish those in progress.

        Jobs that have not finished `drain_s` after `stop` are requeued.
        Raises DeviceError when the device has failed: the jobs that were on it stay claimed, the
        others have been requeued.
        """
        options = self._options
        context = RunContext(
            source,
            self._engine,
            options,
            self.telemetry,
            embeddings=self._embeddings,
            stored=self._stored,
            device_queue=self._device_queue,
            stop=stop,
            abort=self._abort,
        )
        with (
            ThreadPoolExecutor(options.decode_threads, "decode") as decoders,
            ThreadPoolExecutor(options.finish_threads, "finish") as finishers,
        ):
            tiled_jobs = TiledJobs(context, self._tiled_job_factory, finishers)
            finish = FinishStage(context, self._formats, self._on_result)
            device = DeviceLoop(context, tiled_jobs, finish, finishers)
            intake = Intake(context, DecodeStage(context, tiled_jobs), decoders)
            device.start()
            try:
                intake.run()
                intake.drain(options.drain_s)
            finally:
                self._abort.set()
                decoders.shutdown()
                self._device_queue.close()
                device.join(_FAILED_DEVICE_JOIN_S if context.fatal else options.drain_s)
        if context.fatal:
            raise context.fatal
