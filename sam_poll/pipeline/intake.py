"""Takes jobs from the source, as many as may be in progress, and hands them to the decode pool.

While the share fails (outputs cannot be written, pictures not be read) no further jobs are taken.
"""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import Executor

from loguru import logger

from sam_poll.pipeline.decode_stage import DecodeStage
from sam_poll.pipeline.run_context import RunContext
from sam_poll.pipeline.task import CombinedEvent, Task

_POLL_S = 0.1


class Intake:
    """The intake of one run; used from the thread that runs the pipeline."""

    def __init__(self, context: RunContext, stage: DecodeStage, decoders: Executor) -> None:
        self._context = context
        self._stage = stage
        self._decoders = decoders
        self._device_queue = context.device_queue
        self._exclusive = context.exclusive
        self._heartbeat = context.telemetry.intake

    def run(self) -> None:
        """Take jobs until the source ends, `stop` is set or the device has failed."""
        context = self._context
        ending = CombinedEvent(context.stop, lambda: context.fatal is not None)
        with contextlib.closing(context.source.jobs(ending)) as jobs:  # type: ignore[arg-type]
            while not ending.is_set():
                self._heartbeat.beat()
                if context.share_failing:
                    ending.wait(_POLL_S)
                    continue
                if not context.slots.acquire(timeout=_POLL_S):
                    continue
                job = next(jobs, None)
                if job is None:
                    context.slots.release()
                    return
                context.telemetry.stats.started()
                task = Task(job)
                if job.attempt > 1:
                    self._run_alone(task, ending)
                else:
                    self._device_queue.decoding_started()
                    self._decoders.submit(self._decode, task)

    def drain(self, limit_s: float) -> None:
        """Wait until no job is in progress; after `stop`, at most `limit_s` seconds, then abort."""
        context = self._context
        deadline: float | None = None
        free = 0
        while free < context.capacity:
            self._heartbeat.beat()
            free += context.slots.acquire(timeout=_POLL_S)
            if not (context.stop.is_set() or context.fatal):
                continue
            deadline = deadline or time.monotonic() + limit_s
            if time.monotonic() > deadline and not context.abort.is_set():
                logger.warning(
                    "{} jobs did not finish within {:.0f} s and are requeued",
                    context.capacity - free,
                    limit_s,
                )
                context.abort.set()

    def _decode(self, task: Task) -> None:
        try:
            self._context.run_stage(self._stage.run, task)
        finally:
            self._device_queue.decoding_ended()

    def _run_alone(self, task: Task, ending: CombinedEvent) -> None:
        """Run a job whose earlier attempt ended with a process, with nothing else in progress.

        All other slots are taken first. Of a tiled job, its first remaining tile is run alone.
        """
        context = self._context
        taken = 0
        self._exclusive.begin(task)
        while not self._is_alone(taken) and not ending.is_set():
            taken += context.slots.acquire(timeout=_POLL_S)
            self._heartbeat.beat()
        # If the run ends before the job is alone, it is left for another time.
        stage = self._stage.run if self._is_alone(taken) else context.completion.requeue
        self._decoders.submit(context.run_stage, stage, task)
        while not (task.harmless.wait(_POLL_S) or ending.is_set()):
            self._heartbeat.beat()
        self._exclusive.end()
        if taken:
            context.slots.release(taken)

    def _is_alone(self, taken: int) -> bool:
        return taken + self._exclusive.paused_count >= self._context.capacity - 1
