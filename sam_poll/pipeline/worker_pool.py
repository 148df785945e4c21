"""Several devices of one machine: one worker process for each, all fed from the one job source.

Seen from the source a pool is a pipeline: it takes jobs, and every job is answered, rejected or
requeued. The worker processes (`worker_process`) decode, run their network and make the outputs;
what touches the share is done in this process. `worker_supervisor` keeps the processes running and
receives their messages.

When a worker process dies, its jobs are offered again, each as a further attempt (so that a job
which kills every process is found out), and a new process takes its place. A device whose processes
keep dying ends the run with DeviceError.

Limitations: prompts of one picture that come one by one may reach two devices, and each encodes it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from sam_poll.core import child_process
from sam_poll.core.protocols import JobSource
from sam_poll.core.safe_path import SafePath
from sam_poll.core.stats import Stats
from sam_poll.core.telemetry import Telemetry
from sam_poll.core.types import Job, ModelInfo
from sam_poll.imaging import decode
from sam_poll.pipeline.messages import EndOfJobs, RunJob, Stop
from sam_poll.pipeline.options import PipelineOptions
from sam_poll.pipeline.task import CombinedEvent
from sam_poll.pipeline.worker_state import PoolState, WorkerHandle, WorkerSpec
from sam_poll.pipeline.worker_supervisor import GRACE_S, WorkerSupervisor

__all__ = ["WorkerPool", "WorkerSpec"]

_POLL_S = 0.1
_JOBS_PER_DEVICE = 16
_AFFINITY_WAIT_S = 0.05  # a picture's further prompts wait for the worker that has its embedding


class WorkerPool:
    """A pool of worker processes: `with WorkerPool(…) as pool: pool.run(source, stop)`.

    Entering starts the processes and waits until all are ready; it raises ModelError and the like
    when one of them cannot be made ready.

    - `writers`: threads that deliver outputs.
    - `drain_s`: time that jobs have to finish after `stop`.
    - `pause_s`: pause before a new process takes the place of the first one that has died.
    - `tiled_jobs`: the workers can do jobs tile by tile.

    The heartbeat `telemetry.device` is as old as that of the slowest worker.
    """

    def __init__(
        self,
        specs: Sequence[WorkerSpec],
        stop: threading.Event,
        *,
        telemetry: Telemetry | None = None,
        writers: int = 4,
        command: Sequence[str] | None = None,
        drain_s: float = PipelineOptions.drain_s,
        pause_s: float = 1.0,
        tiled_jobs: bool = False,
    ) -> None:
        self.telemetry = telemetry or Telemetry()
        handles = [WorkerHandle(spec) for spec in specs]
        self._state = PoolState(handles, self.telemetry, ThreadPoolExecutor(writers, "answers"))
        self._handles = handles
        self._changed = self._state.changed
        self._stop = stop
        self._drain_s = drain_s
        self._tiled_jobs = tiled_jobs
        self._last_number = 0  # of the jobs handed out
        command = command or child_process.command("sam_poll.pipeline.worker_process")
        self._supervisors = [
            WorkerSupervisor(self._state, handle, command, pause_s) for handle in handles
        ]

    # ── state for others ──

    @property
    def stats(self) -> Stats:
        """The counts of `telemetry`."""
        return self.telemetry.stats

    @property
    def info(self) -> ModelInfo:
        """The model as a worker has reported it last; `device` names all devices."""
        info = self._state.info
        assert info is not None, "not entered"
        return replace(info, device=", ".join(handle.spec.name for handle in self._handles))

    @property
    def ooms(self) -> int:
        """How many times the devices have run out of memory."""
        return self._state.past_ooms + sum(handle.ooms for handle in self._handles)

    @property
    def device_count(self) -> int:
        """How many devices may work on one tiled job."""
        return len(self._handles) if self._tiled_jobs else 0

    @property
    def capacity(self) -> int:
        """About how many jobs keep all devices busy."""
        return _JOBS_PER_DEVICE * len(self._handles)

    # ── start and end ──

    def __enter__(self) -> WorkerPool:
        for supervisor in self._supervisors:
            supervisor.start()
        with self._changed:
            while not (
                all(handle.info for handle in self._handles)
                or self._state.fatal
                or self._stop.is_set()
            ):
                self._changed.wait(_POLL_S)
            self._state.ready = self._state.fatal is None
        if self._state.fatal:
            self.__exit__()
            raise self._state.fatal
        return self

    def __exit__(self, *exc: object) -> None:
        self._end(Stop())
        at_once = self._state.fatal or not self._state.ready
        self._kill_after(0.0 if at_once else self._drain_s + GRACE_S)
        self._state.writers.shutdown(wait=False)

    def run(self, source: JobSource, stop: threading.Event) -> None:
        """As `Pipeline.run`."""
        self._state.source = source
        heartbeat = self.telemetry.intake
        ending = CombinedEvent(stop, lambda: self._state.fatal is not None)
        with contextlib.closing(source.jobs(ending)) as jobs:  # type: ignore[arg-type]
            while not ending.is_set():
                heartbeat.beat()
                if not self._wait_for_free_worker():
                    continue
                job = next(jobs, None)
                if job is None:
                    break
                self._hand_out(job, ending)
        self._end(Stop() if ending.is_set() else EndOfJobs())
        while any(supervisor.is_alive() for supervisor in self._supervisors):
            heartbeat.beat()
            if ending.wait(_POLL_S):
                self._end(Stop())
                self._kill_after(self._drain_s + GRACE_S)
        if self._state.fatal:
            raise self._state.fatal

    def _end(self, message: EndOfJobs | Stop) -> None:
        """Start no further processes, and tell those that run to end."""
        with self._changed:
            self._state.ending = True
            self._changed.notify_all()
        for handle in self._handles:
            if handle.info and handle.channel:
                handle.channel.send(message)
            elif handle.process:  # it is still loading its model, and has no job
                handle.process.kill()

    def _kill_after(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for handle, supervisor in zip(self._handles, self._supervisors, strict=True):
            supervisor.join(max(0.0, deadline - time.monotonic()))
            if supervisor.is_alive() and handle.process:
                handle.killed = True
                handle.process.kill()
                supervisor.join(GRACE_S)

    # ── handing jobs out ──

    def _wait_for_free_worker(self) -> bool:
        with self._changed:
            return self._changed.wait_for(self._has_free_worker, _POLL_S)

    def _has_free_worker(self) -> bool:
        return any(handle.wants_job for handle in self._handles)

    def _hand_out(self, job: Job, ending: CombinedEvent) -> None:
        self.stats.started()
        while not ending.is_set():
            self.telemetry.intake.beat()
            if self._assign(job):
                return
        self._state.requeue(job)
        self.stats.released()

    def _assign(self, job: Job) -> bool:
        """Send the job to a free worker. Returns False if there is none just now.

        A worker that has the picture's embedding comes first, then the one with the fewest jobs. A
        job that helps with a tiled job is for those workers that do not work on it yet.
        """
        # A picture that came as bytes may have a name that many have.
        picture = job.name if isinstance(job.picture, SafePath) else decode.digest_of(job.picture)
        # Locked to the end: a worker may die at any moment, and must then have the job or not.
        with self._changed:
            if not job.is_helper and any(picture in h.pictures for h in self._handles):
                self._changed.wait_for(
                    lambda: any(h.wants_job and picture in h.pictures for h in self._handles),
                    _AFFINITY_WAIT_S,
                )
            else:
                self._changed.wait_for(self._has_free_worker, _POLL_S)
            free = [handle for handle in self._handles if handle.wants_job]
            if not free:
                return False
            handle = min(
                free, key=lambda h: ((picture in h.pictures) == job.is_helper, len(h.jobs))
            )
            self._last_number += 1
            handle.jobs[self._last_number] = job
            handle.wants_job = False
            handle.uncounted += 1
            handle.remember(picture)
            assert handle.channel is not None
            # Only this process knows whether the client has left.
            sent = replace(job, source_ref=self._last_number, cancelled=None)
            handle.channel.send(RunJob(sent))
        return True
