"""How a run's jobs end: answered, refused, given back, lost; and who waits while answers cannot be put away.

What can still go wrong here: while a share is sick every thread that has an answer waits with it; the bounded number of
jobs is what keeps the memory from filling.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from functools import partial

from loguru import logger

from sam_poll.alarms import Alarms
from sam_poll.errors import InputError, LostError, SamPollError
from sam_poll.fs import shown
from sam_poll.stats import Stats
from sam_poll.tasks import Task
from sam_poll.types import Door

_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_BAD_NAME = {errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL, errno.EISDIR, errno.ENOTDIR, errno.EEXIST}


class Endings:
    """Ends the tasks of one run at its door. `free` gives a task's place to the next one; when `stop` or `hurry` is
    set, what cannot be put away is given back."""

    def __init__(
        self,
        door: Door,
        free: Callable[[], None],
        stats: Stats,
        alarms: Alarms,
        stop: threading.Event,
        hurry: threading.Event,
    ) -> None:
        self._door, self._free, self._stats, self._alarms = door, free, stats, alarms
        self._stop, self._hurry = stop, hurry
        self._lock = threading.Lock()
        self._unwritten: set[Task] = set()

    @property
    def sick(self) -> bool:
        """Whether there is something that cannot be put away."""
        return bool(self._unwritten)

    def reject(self, task: Task, error: SamPollError) -> None:
        """Refuse the job, with the reason; what only helps with another's is none of its own to refuse."""
        if task.job.helps:
            logger.warning("no more help with {}: {}", shown(task.job.id), shown(error))
            self.release(task)
            return
        self._close(task)
        task.refused = True  # if that cannot be written either, it must wait
        try:
            if not self.persist(lambda: self._door.reject(task.job, error), task):
                return
        except Exception as failure:  # noqa: BLE001  nothing is lost: the inputs are still in work/
            logger.opt(exception=True).critical("job {} cannot be rejected: {}", shown(task.job.id), failure)
            self.gone(error.code)
            return
        logger.warning("job {} rejected: {}", shown(task.job.id), shown(error))
        self._stats.rejected(task.job.id, error.code)
        self._free()

    def release(self, task: Task) -> None:
        """Give the job back as if it had not been taken."""
        self.give_back(task, partial(self._door.release, task.job), None)

    def give_back(self, task: Task, give: Callable[[], None], why: Exception | None) -> None:
        """Give the job back by calling `give`."""
        name = shown(task.job.id)
        self._close(task)
        try:
            self._door.release(task.job) if task.job.helps else give()
            if why:
                logger.warning("job {} goes back: {}", name, shown(why))
        except LostError as error:
            logger.warning("job {}: {}", name, error)
        except OSError as error:
            logger.warning("job {} stays in work/, to be taken over: {}", name, error)
        self.gone(getattr(why, "code", ""))

    def lost(self, task: Task, error: LostError) -> None:
        """The job is somebody else's."""
        if task.job.helps:
            self.release(task)
            return
        self._close(task)
        logger.warning("job {}: {}", shown(task.job.id), error)
        self.gone(error.code)

    @staticmethod
    def _close(task: Task) -> None:
        task.proved.set()
        if task.pieces:
            task.pieces.close()

    def gone(self, code: str = "") -> None:
        """A job has ended here without an answer or a refusal."""
        self._stats.released(code)
        self._free()

    def persist(self, act: Callable[[], None], task: Task) -> bool:
        """Deliver or reject, again and again while the surroundings are sick. False: the job is over another way."""
        pause = _PAUSE_S
        try:
            while True:
                try:
                    act()
                    return True
                except OSError as error:
                    if error.errno in _BAD_NAME and not task.refused:
                        task.refused = True
                        reason = f"its outputs cannot be written: {error.strerror}"
                        raise InputError(
                            reason, place=shown(error.filename2 or error.filename or task.job.id), remedy="another name"
                        ) from error
                    if self._hurry.is_set() or self._stop.is_set():
                        self.release(task)
                        return False
                    self._note_unwritten(task, error)
                self._stop.wait(pause)
                pause = min(pause * 2, _LONGEST_PAUSE_S)
        except LostError as error:
            self.lost(task, error)
            return False
        finally:
            self._note_written(task)

    def _note_unwritten(self, task: Task, error: OSError) -> None:
        with self._lock:
            self._unwritten.add(task)
            waiting = len(self._unwritten)
        # Without the file's name, which differs from job to job: one trouble, one alarm.
        self._alarms.raise_(
            "output", f"answers cannot be put away ({error.strerror or error}); they are kept and tried again"
        )
        logger.debug("job {} cannot be put away ({}); {} wait", shown(task.job.id), error, waiting)

    def _note_written(self, task: Task) -> None:
        with self._lock:
            self._unwritten.discard(task)
            over = not self._unwritten
        if over:
            self._alarms.clear("output")
