"""The messages between a worker process and its parent, one frozen dataclass for each.

A job is known to both sides by a number, which the parent gives it (`Job.source_ref` in the
worker).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

from sam_poll.core.protocols import JobSource
from sam_poll.core.stats import CacheEvent, Stats
from sam_poll.core.types import Job, ModelInfo, OutputFile

# ── parent → worker ──


@dataclass(frozen=True, slots=True)
class Configure:
    """The first message: `equip` makes the worker's `WorkerSetup`, in the worker."""

    equip: Callable[[], Any]
    log_level: str


@dataclass(frozen=True, slots=True)
class RunJob:
    """A job to do, in reply to `WantJob`."""

    job: Job


@dataclass(frozen=True, slots=True)
class Reply:
    """The outcome of a `SourceCall`: None, or the error that the source raised."""

    number: int
    error: Exception | None


@dataclass(frozen=True, slots=True)
class EndOfJobs:
    """No further jobs come: finish those you have, then end."""


@dataclass(frozen=True, slots=True)
class Stop:
    """As `EndOfJobs`, but what has not finished after `drain_s` is requeued."""


ParentMessage: TypeAlias = Configure | RunJob | Reply | EndOfJobs | Stop


# ── worker → parent: state ──


@dataclass(frozen=True, slots=True)
class Ready:
    """The network is loaded."""

    info: ModelInfo


@dataclass(frozen=True, slots=True)
class Beat:
    """Sent regularly. `age`: seconds since the worker's device loop has moved."""

    age: float
    info: ModelInfo
    ooms: int


@dataclass(frozen=True, slots=True)
class LogLine:
    """A log record of the worker."""

    level: str
    text: str
    extra: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class AlarmRaised:
    """An alarm of the worker."""

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class AlarmCleared:
    """The cause of an alarm of the worker is gone."""

    kind: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The last message: the worker ends, because of `error` or because all jobs are done (None)."""

    error: Exception | None


# ── worker → parent: jobs ──


@dataclass(frozen=True, slots=True)
class WantJob:
    """The worker is free to take a job."""


@dataclass(frozen=True, slots=True)
class JobStarted:
    """The worker has begun a job: if it dies, the job may be the cause."""

    number: int


@dataclass(frozen=True, slots=True)
class StatsEvent:
    """Base of the messages that are counted, and do not end a job."""

    def add_to(self, stats: Stats) -> None:
        """Count the event in `stats`."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class JobProgressed(StatsEvent):
    """A long job has done a step."""

    def add_to(self, stats: Stats) -> None:
        """Count the step."""
        stats.progressed()


@dataclass(frozen=True, slots=True)
class DiskCacheUsed(StatsEvent):
    """Something has happened to embeddings on the disk."""

    event: CacheEvent
    count: int

    def add_to(self, stats: Stats) -> None:
        """Count the event."""
        stats.cached(self.event, self.count)


@dataclass(frozen=True, slots=True)
class JobCount:
    """Base of the messages that count how a job has ended in the worker."""

    def add_to(self, stats: Stats) -> None:
        """Count the job in `stats`."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class JobAnswered(JobCount):
    """A job has been answered; `timings` are milliseconds by stage."""

    job_id: str
    objects: int = 0
    timings: Mapping[str, float] = field(default_factory=dict)

    def add_to(self, stats: Stats) -> None:
        """Count the answered job."""
        stats.answered(self.job_id, self.objects, self.timings)


@dataclass(frozen=True, slots=True)
class JobRejected(JobCount):
    """A job has been rejected with an error of this code."""

    job_id: str
    code: str

    def add_to(self, stats: Stats) -> None:
        """Count the rejected job."""
        stats.rejected(self.job_id, self.code)


@dataclass(frozen=True, slots=True)
class JobReleased(JobCount):
    """A job has ended in the worker without answer or rejection; `code`: of the error, if any."""

    code: str

    def add_to(self, stats: Stats) -> None:
        """Count the released job."""
        stats.released(self.code)


@dataclass(frozen=True, slots=True)
class SourceCall:
    """Base of the calls to the job's source, which the parent makes and answers with `Reply`.

    `last`: the worker does not call again for this job, even if the call fails.
    """

    last: ClassVar[bool] = False
    number: int

    def apply(self, source: JobSource, job: Job) -> None:
        """Make the call."""
        raise NotImplementedError

    def count(self, job: Job) -> JobCount | None:
        """Return what the worker will count once the call has succeeded, if it is known."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Deliver(SourceCall):
    """`JobSource.deliver`."""

    documents: list[OutputFile]

    def apply(self, source: JobSource, job: Job) -> None:
        """Deliver the outputs."""
        source.deliver(job, self.documents)

    def count(self, job: Job) -> JobCount | None:
        """Return an answer."""
        return JobAnswered(job.id)


@dataclass(frozen=True, slots=True)
class Reject(SourceCall):
    """`JobSource.reject`."""

    error: Exception

    def apply(self, source: JobSource, job: Job) -> None:
        """Reject the job."""
        source.reject(job, self.error)  # type: ignore[arg-type]  # a copy of a SamPollError

    def count(self, job: Job) -> JobCount | None:
        """Return a rejection."""
        return JobRejected(job.id, getattr(self.error, "code", ""))


@dataclass(frozen=True, slots=True)
class Requeue(SourceCall):
    """`JobSource.requeue`; `error`: the OSError for which the picture could not be read, if any."""

    last: ClassVar[bool] = True
    error: Exception | None

    def apply(self, source: JobSource, job: Job) -> None:
        """Requeue the job."""
        source.requeue(job, self.error)  # type: ignore[arg-type]  # a copy of an OSError

    def count(self, job: Job) -> JobCount | None:
        """Return None: the code of the error, if there is one, is known to the worker only."""
        return None


@dataclass(frozen=True, slots=True)
class Defer(SourceCall):
    """`JobSource.defer`."""

    last: ClassVar[bool] = True
    error: Exception

    def apply(self, source: JobSource, job: Job) -> None:
        """Defer the job."""
        source.defer(job, self.error)  # type: ignore[arg-type]  # a copy of a SamPollError

    def count(self, job: Job) -> JobCount | None:
        """Return None: as for `Requeue`."""
        return None


WorkerMessage: TypeAlias = (
    Ready
    | Beat
    | LogLine
    | AlarmRaised
    | AlarmCleared
    | Ended
    | WantJob
    | JobStarted
    | StatsEvent
    | JobCount
    | SourceCall
)
Message: TypeAlias = ParentMessage | WorkerMessage
