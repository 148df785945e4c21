"""How the jobs of a run end (answered, rejected, requeued, lost), and how outputs are retried.

While the share fails, every thread that holds an output waits with it. The bounded number of jobs
keeps the memory from filling meanwhile.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from functools import partial

from loguru import logger

from sam_poll.core.backoff import Backoff
from sam_poll.core.errors import ClaimLostError, InputError, SamPollError
from sam_poll.core.protocols import JobSource
from sam_poll.core.telemetry import Telemetry
from sam_poll.core.text import shown
from sam_poll.pipeline.task import Task

_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_BAD_NAME = {
    errno.ENAMETOOLONG,
    errno.EILSEQ,
    errno.EINVAL,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
}


class JobCompletion:
    """Ends the tasks of one run at their source.

    `free` gives a task's slot to the next job. Once `stop` or `abort` is set, outputs that cannot
    be written are not retried any more; their jobs are requeued.
    """

    def __init__(
        self,
        source: JobSource,
        free: Callable[[], None],
        telemetry: Telemetry,
        stop: threading.Event,
        abort: threading.Event,
    ) -> None:
        self._source = source
        self._free = free
        self._stats = telemetry.stats
        self._alarms = telemetry.alarms
        self._stop = stop
        self._abort = abort
        self._lock = threading.Lock()
        self._unwritten: set[Task] = set()

    @property
    def blocked(self) -> bool:
        """Whether an output cannot be written at the moment."""
        return bool(self._unwritten)

    def reject(self, task: Task, error: SamPollError) -> None:
        """Reject the job with the reason `error`; a job that only helps another one is requeued."""
        if task.job.is_helper:
            logger.warning("no more help with {}: {}", shown(task.job.id), shown(error))
            self.requeue(task)
            return
        self._close(task)
        task.rejecting = True  # if the rejection cannot be written either, it is retried
        try:
            if not self.persist(lambda: self._source.reject(task.job, error), task):
                return
        except Exception as failure:  # noqa: BLE001  nothing is lost: the inputs are still in work/
            logger.opt(exception=True).critical(
                "job {} cannot be rejected: {}", shown(task.job.id), failure
            )
            self.release(error.code)
            return
        logger.warning("job {} rejected: {}", shown(task.job.id), shown(error))
        self._stats.rejected(task.job.id, error.code)
        self._free()

    def requeue(self, task: Task) -> None:
        """Requeue the job as if it had not been claimed."""
        self.give_back(task, partial(self._source.requeue, task.job), None)

    def give_back(self, task: Task, give: Callable[[], None], error: Exception | None) -> None:
        """Return the job to its source by calling `give`; `error` is the reason, if any."""
        name = shown(task.job.id)
        self._close(task)
        try:
            if not task.job.is_helper:
                give()
                if error:
                    logger.warning("job {} is requeued: {}", name, shown(error))
            else:
                self._source.requeue(task.job)
                # A file that is not there: the owner of the job has finished it.
                if error and not isinstance(error, FileNotFoundError):
                    logger.warning("no more help with {}: {}", name, shown(error))
        except ClaimLostError as lost:
            logger.warning("job {}: {}", name, lost)
        except OSError as failure:
            logger.warning("job {} stays in work/, to be taken over: {}", name, failure)
        self.release(getattr(error, "code", ""))

    def lost(self, task: Task, error: ClaimLostError) -> None:
        """Drop the job: another daemon has taken its claim over."""
        if task.job.is_helper:
            self.requeue(task)
            return
        self._close(task)
        logger.warning("job {}: {}", shown(task.job.id), error)
        self.release(error.code)

    @staticmethod
    def _close(task: Task) -> None:
        task.harmless.set()
        if task.tiled_job:
            task.tiled_job.close()

    def release(self, code: str = "") -> None:
        """Count a job that has ended here without an answer or a rejection, and free its slot."""
        self._stats.released(code)
        self._free()

    def persist(self, write: Callable[[], None], task: Task) -> bool:
        """Call `write` (deliver or reject), and retry it while the share fails.

        Returns False when the job has ended another way: requeued or lost.
        Raises InputError when the outputs can never have their names.
        """
        backoff = Backoff(_PAUSE_S, _LONGEST_PAUSE_S)
        try:
            while True:
                try:
                    write()
                    return True
                except OSError as error:
                    if error.errno in _BAD_NAME and not task.rejecting:
                        raise self._bad_name(task, error) from error
                    if self._abort.is_set() or self._stop.is_set():
                        self.requeue(task)
                        return False
                    self._note_unwritten(task, error)
                backoff.wait(self._stop)
        except ClaimLostError as error:
            self.lost(task, error)
            return False
        finally:
            self._note_written(task)

    @staticmethod
    def _bad_name(task: Task, error: OSError) -> InputError:
        task.rejecting = True
        return InputError(
            f"its outputs cannot be written: {error.strerror}",
            place=shown(error.filename2 or error.filename or task.job.id),
            remedy="another name",
        )

    def _note_unwritten(self, task: Task, error: OSError) -> None:
        with self._lock:
            self._unwritten.add(task)
            waiting = len(self._unwritten)
        # Without the file's name, which differs from job to job: one cause, one alarm.
        self._alarms.raise_(
            "output",
            f"outputs cannot be written ({error.strerror or error}); they are kept and retried",
        )
        logger.debug("job {} cannot be written ({}); {} wait", shown(task.job.id), error, waiting)

    def _note_written(self, task: Task) -> None:
        with self._lock:
            self._unwritten.discard(task)
            all_written = not self._unwritten
        if all_written:
            self._alarms.clear("output")
