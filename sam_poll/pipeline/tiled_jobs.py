"""Jobs that are too long to be done in one go (mosaics): tile by tile, other jobs in between."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import TypeAlias

from sam_poll.core.errors import DeviceError, InputError
from sam_poll.core.protocols import TiledJob
from sam_poll.core.types import Job
from sam_poll.pipeline.run_context import RunContext
from sam_poll.pipeline.task import JobInterrupted, StageTimer, Task, log_tiled_answer

_RETRY_S = 0.25  # until a job looks again whether others have done the tiles that are left
_REMEDY = (
    "`sam-poll mosaic IMAGE -o DIR`, "
    "or drop it into the folder of a daemon that has the extra `geo`"
)

TiledJobFactory: TypeAlias = Callable[[Job, Callable[[], None]], TiledJob]
"""Opens a tiled job; its second argument is a function to be called between two steps."""


class TiledJobs:
    """Opens tiled jobs, does a tile at a time and delivers their outputs.

    Without a `factory` such jobs are rejected.
    """

    def __init__(
        self, context: RunContext, factory: TiledJobFactory | None, finishers: Executor
    ) -> None:
        self._context = context
        self._factory = factory
        self._finishers = finishers
        self._device_queue = context.device_queue

    def open(self, task: Task) -> None:
        """Open the tiled job of a task and queue it for the device; on the decode pool."""
        if task.job.scratch is None or self._factory is None:
            raise InputError(
                "pictures larger than memory are not answered this way",
                place="mosaic",
                remedy=_REMEDY,
            )
        with StageTimer(task, "open"):
            task.tiled_job = self._factory(task.job, partial(self._context.step, task))
        self._device_queue.put(task)

    def run_tile(self, task: Task) -> None:
        """Do one tile, then queue the task behind the others; on the device thread."""
        context = self._context
        assert task.tiled_job is not None
        if context.stop.is_set():
            raise JobInterrupted  # the tiles that are done are kept
        if context.exclusive.must_pause(task):
            self._queue_later(task)
            return
        try:
            with StageTimer(task, "predict", add=True):
                more = task.tiled_job.take(context.engine)
        except DeviceError as error:
            context.fail_device(error, [task])
            return
        if more:
            context.read_failures.reset()
            task.harmless.set()
            self._device_queue.put(task)
        elif task.job.is_helper:
            context.completion.requeue(task)
        elif more is None:
            task.harmless.set()  # others do the tiles that are left; nothing of it runs here
            context.step(task)  # the job waits for them, but not for ever
            self._queue_later(task)
        else:
            self._finishers.submit(context.run_stage, self._assemble, task)

    def _queue_later(self, task: Task) -> None:
        threading.Timer(_RETRY_S, self._device_queue.put, [task]).start()

    def _assemble(self, task: Task) -> None:
        """Put the tiles together and deliver the outputs; on the finish pool."""
        tiled_job = task.tiled_job
        assert tiled_job is not None
        with StageTimer(task, "assemble"):
            documents = tiled_job.documents()
        if self._context.deliver(task, documents, tiled_job.found):
            log_tiled_answer(task, tiled_job.found)
            tiled_job.close()
            self._context.slots.release()
