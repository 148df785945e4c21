"""State that the stages of one run share, and what an error in a stage does to its job.

One job's error never stops the others; only a device that has failed for good (`DeviceError`) ends
the run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from loguru import logger

from sam_poll.core.backoff import Backoff
from sam_poll.core.errors import (
    ClaimLostError,
    DeviceError,
    IncompleteFileError,
    InputError,
    InternalError,
    SamPollError,
)
from sam_poll.core.protocols import Engine, JobSource
from sam_poll.core.telemetry import Telemetry
from sam_poll.core.text import shown
from sam_poll.core.types import OutputFile
from sam_poll.pipeline.completion import JobCompletion
from sam_poll.pipeline.device_queue import DeviceQueue
from sam_poll.pipeline.embedding_cache import EmbeddingCache
from sam_poll.pipeline.exclusive_job import ExclusiveJob
from sam_poll.pipeline.options import PipelineOptions
from sam_poll.pipeline.stored_embeddings import StoredEmbeddings
from sam_poll.pipeline.task import JobInterrupted, StageTimer, Task

_FAILURES = 3  # pictures in a row that cannot be read: the share is to blame, not the pictures
_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0


class ReadFailures:
    """Counts pictures in a row that cannot be read; after a few, the intake pauses."""

    def __init__(self) -> None:
        self._count = 0
        self._backoff = Backoff(_PAUSE_S, _LONGEST_PAUSE_S)
        self._resume_at = 0.0

    @property
    def pausing(self) -> bool:
        """Whether the intake should pause now."""
        return time.monotonic() < self._resume_at

    def reset(self) -> None:
        """Record that a picture has been read."""
        self._count = 0
        self._backoff.reset()

    def add(self) -> None:
        """Record a picture that cannot be read."""
        self._count += 1
        if self._count >= _FAILURES:
            self._resume_at = self._backoff.retry_at(time.monotonic())


class RunContext:
    """What the stages of one run share.

    - `stop`: take no further jobs, finish those in progress.
    - `abort`: requeue everything that has not finished.
    - `fatal`: the error of a device that has failed for good.
    - `slots`: bounds the jobs in progress to `capacity`.
    - `device_thread`: the only thread that calls the network.
    """

    def __init__(
        self,
        source: JobSource,
        engine: Engine,
        options: PipelineOptions,
        telemetry: Telemetry,
        *,
        embeddings: EmbeddingCache,
        stored: StoredEmbeddings,
        device_queue: DeviceQueue,
        stop: threading.Event,
        abort: threading.Event,
    ) -> None:
        self.source = source
        self.engine = engine
        self.options = options
        self.telemetry = telemetry
        self.embeddings = embeddings
        self.stored = stored
        self.device_queue = device_queue
        self.stop = stop
        self.abort = abort
        self.exclusive = ExclusiveJob()
        self.capacity = options.capacity(engine.batch)
        self.slots = threading.BoundedSemaphore(self.capacity)
        self.completion = JobCompletion(source, self.slots.release, telemetry, stop, abort)
        self.read_failures = ReadFailures()
        self.fatal: DeviceError | None = None
        self.device_thread: threading.Thread | None = None

    @property
    def share_failing(self) -> bool:
        """Whether outputs cannot be written, or pictures not be read, at the moment."""
        return self.completion.blocked or self.read_failures.pausing

    def run_stage(self, stage: Callable[[Task], None], task: Task) -> None:
        """Run a stage of a task. An error ends this task only."""
        if task.on_failed_device:
            return
        if self.abort.is_set() or self.fatal or task.cancelled:
            self.completion.requeue(task)
            return
        job = task.job
        try:
            with logger.contextualize(job=job.id, generation=job.generation, attempt=job.attempt):
                self._run_stage(stage, task)
        except Exception:  # noqa: BLE001  a thread of the pools must not end with it
            logger.exception("job {}: an error while another was handled", shown(job.id))

    def _run_stage(self, stage: Callable[[Task], None], task: Task) -> None:
        completion = self.completion
        try:
            stage(task)
        except JobInterrupted:
            completion.requeue(task)
        except ClaimLostError as error:
            completion.lost(task, error)
        except IncompleteFileError as error:
            if error is task.job.error:  # the source has waited long enough for the file
                completion.reject(task, error)
                return
            completion.give_back(task, partial(self.source.defer, task.job, error), error)
        except SamPollError as error:
            completion.reject(task, error)
        except MemoryError:
            remedy = "a smaller picture, or fewer objects at once"
            completion.reject(
                task, InputError("not enough main memory for this job", remedy=remedy)
            )
        except OSError as error:
            # The share fails, not the job, which is requeued and waits. A file that is not there
            # was taken over or taken away, which says nothing about the share.
            if not isinstance(error, FileNotFoundError):
                self.read_failures.add()
            completion.give_back(task, partial(self.source.requeue, task.job, error), error)
        except Exception as error:  # noqa: BLE001  one job's bug must not end the daemon
            logger.opt(exception=True).error(
                "job {}: unexpected {}", shown(task.job.id), type(error).__name__
            )
            reason = f"unexpected {type(error).__name__}: {error}"
            completion.reject(task, InternalError(reason, remedy="please report this with the log"))

    def step(self, task: Task) -> None:
        """Mark a step of a long job: beat and count it. Raises JobInterrupted when it must end."""
        if threading.current_thread() is self.device_thread:
            self.telemetry.device.beat()
        self.telemetry.stats.progressed()
        if self.abort.is_set() or self.fatal or task.cancelled:
            raise JobInterrupted

    def deliver(self, task: Task, documents: Sequence[OutputFile], objects: int) -> bool:
        """Deliver the outputs of a task and count it. Returns False if it has ended another way."""
        with StageTimer(task, "deliver"):
            delivered = self.completion.persist(
                lambda: self.source.deliver(task.job, documents), task
            )
        task.harmless.set()
        if delivered:
            task.timings["total"] = (time.monotonic() - task.started) * 1000
            self.telemetry.stats.answered(task.job.id, objects, task.timings)
        return delivered

    def fail_device(self, error: DeviceError, tasks: list[Task]) -> None:
        """End the run because the device has failed.

        The jobs that were on it stay claimed: each of them may be the cause, so this run counts as
        an attempt.
        """
        logger.critical("{}", error)
        self.fatal = error
        for task in tasks:
            task.on_failed_device = True
            task.harmless.set()
            self.completion.release(error.code)
