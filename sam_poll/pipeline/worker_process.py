"""One process of a worker pool: a pipeline whose source, counts, alarms and log are in its parent.

A bad picture may end this process. The parent has claimed its jobs, counts the attempt and starts a
new process in its place.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

from loguru import logger

from sam_poll.core.alarms import Alarms
from sam_poll.core.errors import ClaimLostError, ExitCode, SamPollError
from sam_poll.core.protocols import Engine, Format
from sam_poll.core.stats import CacheEvent, LoopHeartbeat, Stats
from sam_poll.core.telemetry import Telemetry
from sam_poll.core.text import shown
from sam_poll.core.types import Job, OutputFile
from sam_poll.pipeline.channel import Channel, picklable
from sam_poll.pipeline.disk_cache import DiskCache
from sam_poll.pipeline.messages import (
    AlarmCleared,
    AlarmRaised,
    Beat,
    Configure,
    Defer,
    Deliver,
    DiskCacheUsed,
    Ended,
    EndOfJobs,
    JobAnswered,
    JobProgressed,
    JobRejected,
    JobReleased,
    JobStarted,
    LogLine,
    Ready,
    Reject,
    Reply,
    Requeue,
    RunJob,
    SourceCall,
    Stop,
    WantJob,
)
from sam_poll.pipeline.options import PipelineOptions
from sam_poll.pipeline.pipeline import Pipeline
from sam_poll.pipeline.tiled_jobs import TiledJobFactory

BEAT_S = 0.5
_POLL_S = 0.1


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker process needs for its pipeline."""

    engine: Engine
    formats: Sequence[Format] | Mapping[str, Format]
    options: PipelineOptions
    tiled_jobs: TiledJobFactory | None = None
    disk_cache: DiskCache | None = None


Equip: TypeAlias = Callable[[], WorkerSetup]
"""Makes the setup in the worker. It is pickled: a function of a module, maybe with arguments."""


class RemoteStats(Stats):
    """Counts that are kept in the parent."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def started(self) -> None:
        """Do nothing: the parent counts a job when it hands it out."""

    def answered(self, job_id: str, objects: int, timings: Mapping[str, float]) -> None:
        self._channel.send(JobAnswered(job_id, objects, dict(timings)))

    def rejected(self, job_id: str, code: str) -> None:
        self._channel.send(JobRejected(job_id, code))

    def released(self, code: str = "") -> None:
        self._channel.send(JobReleased(code))

    def progressed(self) -> None:
        self._channel.send(JobProgressed())

    def cached(self, event: CacheEvent, count: int = 1) -> None:
        self._channel.send(DiskCacheUsed(event, count))


class RemoteAlarms(Alarms):
    """Alarms that are raised, logged and cleared in the parent."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel
        self._raised: set[str] = set()

    def raise_(self, kind: str, message: str) -> None:
        self._raised.add(kind)
        self._channel.send(AlarmRaised(kind, message))

    def clear(self, kind: str) -> None:
        if kind in self._raised:
            self._raised.discard(kind)
            self._channel.send(AlarmCleared(kind))


class ParentSourceProxy:
    """The parent's job source. A job's `source_ref` is its number in the parent."""

    def __init__(self, channel: Channel, stop: threading.Event) -> None:
        self._channel = channel
        self._stop = stop
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._replies: dict[int, queue.SimpleQueue[Exception | None]] = {}

    def listen(self) -> None:
        """Receive the parent's messages. When the parent has ended, this process ends, too."""
        try:
            while True:
                message = self._channel.receive()
                match message:
                    case RunJob(job=job):
                        self._inbox.put(job)
                    case Reply(number=number, error=error):
                        self._replies[number].put(error)
                    case EndOfJobs():
                        self._inbox.put(None)
                    case Stop():
                        self._stop.set()
        except EOFError:
            os._exit(ExitCode.OK)

    def jobs(self, stop: threading.Event) -> Generator[Job, None, None]:
        """Ask the parent for a job each time the next one is wanted."""
        try:
            while not stop.is_set():
                self._channel.send(WantJob())
                job = self._next(stop)
                if job is None:
                    return
                self._channel.send(JobStarted(job.source_ref))
                yield job
        finally:
            self._requeue_inbox()

    def _requeue_inbox(self) -> None:
        """Requeue jobs that were sent before the parent knew that this process ends."""
        while not self._inbox.empty():
            job = self._inbox.get()
            if job is None:
                continue
            try:
                self.requeue(job)
            except (OSError, ClaimLostError) as error:
                logger.warning("job {} stays in work/, to be taken over: {}", shown(job.id), error)

    def _next(self, stop: threading.Event) -> Job | None:
        while not stop.is_set():
            try:
                return self._inbox.get(timeout=_POLL_S)
            except queue.Empty:
                continue
        return None

    def deliver(self, job: Job, documents: Sequence[OutputFile]) -> None:
        """Have the parent deliver the outputs."""
        self._call(Deliver(job.source_ref, list(documents)))

    def reject(self, job: Job, error: SamPollError) -> None:
        """Have the parent reject the job."""
        self._call(Reject(job.source_ref, picklable(error)))

    def requeue(self, job: Job, trouble: OSError | None = None) -> None:
        """Have the parent requeue the job."""
        self._call(Requeue(job.source_ref, trouble and picklable(trouble)))

    def defer(self, job: Job, error: SamPollError) -> None:
        """Have the parent defer the job."""
        self._call(Defer(job.source_ref, picklable(error)))

    def fail_attempt(self, job: Job) -> None:
        """Never called here: the parent sees that this process has died."""
        raise NotImplementedError

    def _call(self, call: SourceCall) -> None:
        replies = self._replies[call.number] = queue.SimpleQueue()
        self._channel.send(call)
        error = replies.get()
        del self._replies[call.number]
        if error:
            raise error


def serve(channel: Channel) -> ExitCode:
    """Make the engine and formats that the parent names, and work until there are no more jobs."""
    stop = threading.Event()
    source = ParentSourceProxy(channel, stop)
    try:
        configure = channel.receive()
        assert isinstance(configure, Configure)
        _log_to(channel, configure.log_level)
        threading.Thread(target=source.listen, name="channel", daemon=True).start()
        setup: WorkerSetup = configure.equip()
        telemetry = Telemetry(stats=RemoteStats(channel), alarms=RemoteAlarms(channel))
        pipeline = Pipeline(
            setup.engine,
            setup.formats,
            options=setup.options,
            telemetry=telemetry,
            tiled_jobs=setup.tiled_jobs,
            disk_cache=setup.disk_cache,
        )
        channel.send(Ready(setup.engine.info))
        beats = threading.Thread(
            target=_send_beats,
            args=(channel, setup.engine, telemetry.device),
            name="beat",
            daemon=True,
        )
        beats.start()
        pipeline.run(source, stop)
    except SamPollError as error:
        channel.send(Ended(picklable(error)))
        return error.exit_code
    except Exception as error:  # noqa: BLE001  reported by the parent
        logger.opt(exception=True).critical("unexpected {}: {}", type(error).__name__, error)
        channel.send(Ended(picklable(error)))
        return ExitCode.BUG
    channel.send(Ended(None))
    return ExitCode.OK


def _send_beats(channel: Channel, engine: Engine, heartbeat: LoopHeartbeat) -> None:
    tick = threading.Event()
    while not tick.wait(BEAT_S):
        channel.send(Beat(heartbeat.age, engine.info, int(getattr(engine, "ooms", 0))))


def _log_to(channel: Channel, level: str) -> None:
    """Send this process's log to the parent."""

    def write(message: Any) -> None:
        record = message.record
        exception = record["exception"]
        text = record["message"] + (f" ({exception.value!r})" if exception else "")
        extra = {key: str(value) for key, value in record["extra"].items()}
        channel.send(LogLine(record["level"].name, text, extra))

    logger.remove()
    logger.add(write, level=level, format="{message}")


def main() -> None:
    """Run the process. Its one argument is the file descriptor of its end of the channel."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent handles them and says when to stop
    code = serve(Channel(Connection(int(sys.argv[1]))))
    os._exit(code)  # a thread that hangs in a driver must not hold the exit up


if __name__ == "__main__":
    main()
