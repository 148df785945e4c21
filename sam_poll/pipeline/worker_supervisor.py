"""Keeps a worker process running for one device, and receives its messages."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import wait
from multiprocessing.connection import Connection

from loguru import logger

from sam_poll.core.backoff import Backoff
from sam_poll.core.errors import ClaimLostError, DeviceError
from sam_poll.pipeline.channel import Channel, picklable
from sam_poll.pipeline.messages import (
    AlarmCleared,
    AlarmRaised,
    Beat,
    Configure,
    Ended,
    JobAnswered,
    JobCount,
    JobRejected,
    JobStarted,
    LogLine,
    Message,
    Ready,
    Reply,
    SourceCall,
    StatsEvent,
    WantJob,
)
from sam_poll.pipeline.worker_state import PoolState, WorkerHandle

GRACE_S = 5.0  # for a process that has nothing left to do, or is killed
_MAX_FAILURES = 5  # processes of one device that die in a row, without an answer between them
_LONG_LIFE_S = 600.0  # a process that has lived so long does not count as failed in a row
_LONGEST_PAUSE_S = 60.0


class WorkerSupervisor:
    """Supervises one device's processes, one after the other, on a thread of its own.

    - `command`: starts a process; the number of its end of the channel is appended.
    - `pause_s`: pause before a new process takes the place of the first one that has died.
    """

    def __init__(
        self, state: PoolState, handle: WorkerHandle, command: Sequence[str], pause_s: float
    ) -> None:
        self._state = state
        self._handle = handle
        self._command = list(command)
        self._pause_s = pause_s
        self._thread = threading.Thread(target=self._supervise, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def is_alive(self) -> bool:
        """Return whether processes are still started, or one runs."""
        return self._thread.is_alive()

    def join(self, timeout: float) -> None:
        """Wait at most `timeout` seconds for the end of the last process."""
        self._thread.join(timeout)

    # ── the processes ──

    def _supervise(self) -> None:
        """Keep a process running for one device; on a thread of its own."""
        handle = self._handle
        state = self._state
        failures = 0
        backoff = Backoff(self._pause_s, _LONGEST_PAUSE_S)
        while not state.ending:
            started = time.monotonic()
            try:
                if not self._start():
                    return
                try:
                    self._listen()
                finally:
                    reason = self._reap()
            except Exception as error:  # noqa: BLE001  without its supervisor the device is lost
                logger.opt(exception=True).critical("{}: {}", handle.spec.name, error)
                reason = str(error)
            if handle.finished or state.ending:
                return
            if handle.answered or time.monotonic() - started > _LONG_LIFE_S:
                failures = 1
                backoff.reset()
            else:
                failures += 1
            handle.answered = 0  # the next process may not even start
            if not state.ready or failures >= _MAX_FAILURES:
                self._give_up(reason, failures)
                return
            pause = backoff.next_s()
            logger.error(
                "{}: its process {}; the next one starts in {:g} s",
                handle.spec.name,
                reason,
                pause,
            )
            with state.changed:
                state.changed.wait_for(lambda: state.ending, pause)

    def _give_up(self, reason: str, failures: int) -> None:
        """End the run because a device's processes keep dying, or its first one cannot start."""
        state = self._state
        name = self._handle.spec.name
        remedy = "look at the log, at the driver (dmesg) and the card; or leave it out of `devices`"
        error: Exception
        if state.ready:
            error = DeviceError(
                f"{name} has ended {failures} processes in a row; the last {reason}", remedy=remedy
            )
        else:
            error = self._handle.error or DeviceError(
                f"the process of {name} {reason}", remedy=remedy
            )
        with state.changed:
            state.fatal = state.fatal or error
            state.changed.notify_all()

    def _start(self) -> bool:
        """Start a process. Returns False if the pool is ending."""
        handle = self._handle
        ours, theirs = socket.socketpair()
        # Locked, so that `WorkerPool` either sees the process or keeps it from being started.
        with theirs, self._state.changed:
            if self._state.ending:
                ours.close()
                return False
            number = theirs.fileno()
            try:
                handle.process = subprocess.Popen(  # noqa: S603  our own module
                    [*self._command, str(number)],
                    pass_fds=[number],
                    env=dict(handle.spec.env),
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is for this process only
                )
            except OSError:
                ours.close()
                raise
        handle.error = None
        handle.finished = False
        handle.channel = Channel(Connection(ours.detach()))
        handle.channel.send(Configure(handle.spec.equip, handle.spec.log_level))
        return True

    def _listen(self) -> None:
        assert self._handle.channel is not None
        with contextlib.suppress(EOFError):
            while True:
                self._receive(self._handle.channel.receive())

    def _reap(self) -> str:
        """Settle the jobs of a process that has ended, and return how it ended.

        Jobs that it had begun are offered again, as a further attempt; the others are requeued.
        """
        handle = self._handle
        state = self._state
        assert handle.process is not None
        assert handle.channel is not None
        try:
            code = handle.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:  # its channel is closed: what it still does is lost
            handle.process.kill()
            code = handle.process.wait()
        wait(list(handle.calls.values()))  # an output may be on its way into the share
        handle.channel.close()
        with state.changed:
            jobs, handle.jobs = handle.jobs, {}
            started, handle.started = handle.started, set()
            ended, handle.ended_uncounted = handle.ended_uncounted, {}
            uncounted = handle.uncounted - len(ended)
            handle.uncounted = 0
            handle.wants_job = False
            handle.info = None
            handle.calls = {}
            handle.pictures.clear()
            state.past_ooms += handle.ooms
            handle.ooms = 0
        for number, job in jobs.items():
            if number in started and not handle.killed:
                state.fail_attempt(job)
            else:
                state.requeue(job)
        for count in ended.values():
            count.add_to(state.telemetry.stats)
        for _ in range(uncounted):
            state.telemetry.stats.released(getattr(handle.error, "code", "device"))
        for kind in list(handle.alarms):
            self._on_alarm_cleared(kind)
        return _exit_reason(code, handle.error)

    # ── messages of the worker ──

    def _receive(self, message: Message) -> None:
        handle = self._handle
        match message:
            case Ready():
                self._on_ready(message)
            case WantJob():
                self._on_want_job()
            case JobStarted(number=number):
                handle.started.add(number)
            case SourceCall():
                self._on_call(message)
            case JobCount():
                self._on_count(message)
            case StatsEvent():
                message.add_to(self._state.telemetry.stats)
            case Beat():
                self._on_beat(message)
            case AlarmRaised(kind=kind, message=text):
                handle.alarms.add(kind)
                self._state.telemetry.alarms.raise_(kind, text)
            case AlarmCleared(kind=kind):
                self._on_alarm_cleared(kind)
            case LogLine(level=level, text=text, extra=extra):
                logger.bind(**extra, device=handle.spec.name).log(level, "{}", text)
            case Ended(error=error):
                handle.error = error
                handle.finished = error is None

    def _on_ready(self, message: Ready) -> None:
        state = self._state
        with state.changed:
            state.info = self._handle.info = message.info
            self._handle.last_moved = time.monotonic()
            state.changed.notify_all()

    def _on_want_job(self) -> None:
        with self._state.changed:
            self._handle.wants_job = True
            self._state.changed.notify_all()

    def _on_call(self, call: SourceCall) -> None:
        # Locked: else the call may be over, and struck off, before it is entered in `calls`.
        with self._state.changed:
            self._handle.calls[call.number] = self._state.writers.submit(self._call_source, call)

    def _call_source(self, call: SourceCall) -> None:
        """Make a worker's call to the job source and send it the outcome."""
        handle = self._handle
        state = self._state
        error: Exception | None = None
        number = call.number
        job, channel = handle.jobs[number], handle.channel
        assert channel is not None
        assert state.source is not None
        try:
            call.apply(state.source, job)
        except Exception as failure:  # noqa: BLE001  the worker's pipeline knows what to do
            error = picklable(failure)
        if error is None or isinstance(error, ClaimLostError) or call.last:
            with state.changed:  # the job has ended: no further call for it comes
                handle.jobs.pop(number, None)
                handle.started.discard(number)
                handle.calls.pop(number, None)
                count = call.count(job) if error is None else None
                if count:  # it is counted even if the process does not live to count it
                    handle.ended_uncounted[job.id] = count
        channel.send(Reply(number, error))

    def _on_count(self, count: JobCount) -> None:
        handle = self._handle
        with self._state.changed:
            handle.uncounted -= 1
            if isinstance(count, (JobAnswered, JobRejected)):
                handle.ended_uncounted.pop(count.job_id, None)
        if isinstance(count, JobAnswered):
            handle.answered += 1
        count.add_to(self._state.telemetry.stats)

    def _on_alarm_cleared(self, kind: str) -> None:
        self._handle.alarms.discard(kind)
        if not any(kind in other.alarms for other in self._state.handles):
            self._state.telemetry.alarms.clear(kind)

    def _on_beat(self, beat: Beat) -> None:
        handle = self._handle
        state = self._state
        now = time.monotonic()
        state.info = handle.info = beat.info
        handle.last_moved = now - beat.age
        handle.ooms = beat.ooms
        oldest = min(other.last_moved for other in state.handles if other.info)
        state.telemetry.device.beat(now - oldest)


def _exit_reason(code: int, error: Exception | None) -> str:
    if error:
        return f"ended: {error}"
    if code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            cause = " (out of main memory?)" if name == "SIGKILL" else ""
            return f"was ended by {name}{cause}"
    return f"ended with {code}"
