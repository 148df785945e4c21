"""Jobs from HTTP requests: each request is a job, and its client waits for the job's end.

The number of requests inside the server is limited, from a request's first byte to its answer's
last; further requests get HTTP 429 at once. A client that disconnects cancels its job, as long as
the network has not begun with it.

Limitations: an answer is computed in vain if its client disconnects just before it is ready.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeAlias

from sam_poll.core.errors import PoisonError, SamPollError
from sam_poll.core.stats import LoopHeartbeat
from sam_poll.core.types import Job, OutputFile
from sam_poll.integrations.http.errors import TooManyRequestsError, UnavailableError

_POLL_S = 0.1
_RETRY_S = 5.0  # Retry-After where nothing better is known
_GAP_WEIGHT = 0.1  # of the newest gap between two finished jobs, in their moving average

Outcome: TypeAlias = Sequence[OutputFile] | SamPollError


class PendingResponse:
    """A client that waits. `tell` is called at most once, from any thread, with the outcome.

    `cancelled` is set when the client has disconnected; `since` is when the wait began (monotonic
    clock, seconds).
    """

    def __init__(self, tell: Callable[[Outcome], None]) -> None:
        self.cancelled = threading.Event()
        self.since = time.monotonic()
        self._tell = tell
        self._lock = threading.Lock()
        self._ended = False

    def end(self, outcome: Outcome) -> None:
        """Tell the client the outcome, unless it has one already or has disconnected."""
        with self._lock:
            already_ended = self._ended
            self._ended = True
        if not already_ended and not self.cancelled.is_set():
            self._tell(outcome)


class HttpSource:
    """A job source: jobs in the order of their requests. A job's `source_ref` is a PendingResponse.

    `places`: maximum number of requests inside the server. `attempts`: a job that ended this many
    worker processes is rejected. `pulse` beats while jobs are taken. `clock` returns seconds.

    `serving`: a pipeline takes jobs. `last_scan`: wall-clock time at which a job was last taken or
    waited for.
    """

    def __init__(
        self,
        *,
        places: int,
        attempts: int = 3,
        pulse: LoopHeartbeat | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.places = places
        self._attempts = attempts
        self._pulse = pulse or LoopHeartbeat()
        self._clock = clock
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._pending: set[PendingResponse] = set()
        self._inside = 0
        self._last_end = 0.0
        self._gap_s = 0.0  # moving average of the time between two finished jobs
        self._closed: SamPollError | None = None
        self.serving = False
        self.last_scan = 0.0

    # ── for the endpoints ──

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place while the context is entered.

        Raises TooManyRequestsError if none is free.
        """
        with self._changed:
            if self._inside >= self.places:
                raise TooManyRequestsError(
                    f"all {self.places} places are taken",
                    remedy="send it again later, or raise serve.queue",
                    wait_s=self._half_empty_s(),
                )
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1

    def _half_empty_s(self) -> float:
        """Return the time in seconds after which half of the places should be free."""
        return self.places / 2 * self._gap_s if self._gap_s else _RETRY_S

    def offer(self, job: Job, pending: PendingResponse) -> None:
        """Queue a job; `pending` gets its outcome. Raises SamPollError after `close`."""
        with self._changed:
            if self._closed:
                raise self._closed
            if not self._pending:
                # The time without any job does not count as a gap.
                self._last_end = self._clock()
            self._pending.add(pending)
            self._waiting.append(replace(job, source_ref=pending, cancelled=pending.cancelled))
            self._changed.notify()

    def give_up(self, pending: PendingResponse) -> None:
        """Cancel a job: its client does not wait any more."""
        pending.cancelled.set()
        with self._changed:
            self._pending.discard(pending)
            self._waiting = deque(job for job in self._waiting if job.source_ref is not pending)

    def close(self, error: SamPollError) -> None:
        """End all jobs, and refuse further ones, with `error`. Further calls change nothing."""
        with self._changed:
            self._closed = self._closed or error
            pending, self._pending = self._pending, set()
            self._waiting.clear()
        for one in pending:
            one.end(error)

    # ── for the pipeline ──

    def jobs(self, stop: threading.Event) -> Generator[Job, None, None]:
        """Yield jobs until `stop` is set. Those that wait then end with UnavailableError."""
        self.serving = True
        try:
            while not stop.is_set():
                self._pulse.beat()
                self.last_scan = time.time()
                job = self._next()
                if job is not None:
                    yield job
        finally:
            self.serving = False
            if stop.is_set():
                self._end_waiting()

    def _next(self) -> Job | None:
        with self._changed:
            if not self._waiting:
                self._changed.wait(_POLL_S)
            return self._waiting.popleft() if self._waiting else None

    def _end_waiting(self) -> None:
        with self._changed:
            waiting, self._waiting = list(self._waiting), deque()
        for job in waiting:
            self._end(job, stopping_error())

    def _end(self, job: Job, outcome: Outcome) -> None:
        with self._changed:
            self._pending.discard(job.source_ref)
            now = self._clock()
            gap_s = now - self._last_end
            self._last_end = now
            if self._gap_s:
                self._gap_s = self._gap_s * (1 - _GAP_WEIGHT) + gap_s * _GAP_WEIGHT
            else:
                self._gap_s = gap_s
        job.source_ref.end(outcome)

    def _put_first(self, job: Job) -> None:
        """Queue a job before all others, if its client still waits."""
        with self._changed:
            if job.source_ref in self._pending:
                self._waiting.appendleft(job)
                self._changed.notify()

    def deliver(self, job: Job, documents: Sequence[OutputFile]) -> None:
        """End a job with its output files."""
        self._end(job, documents)

    def reject(self, job: Job, error: SamPollError) -> None:
        """End a job with an error."""
        self._end(job, error)

    def requeue(self, job: Job, trouble: OSError | None = None) -> None:
        """Queue a job again if its client still waits; with `trouble`, end it with HTTP 503."""
        if trouble:
            error = UnavailableError(
                f"the request cannot be answered at present: {trouble}", wait_s=_RETRY_S
            )
            self._end(job, error)
        else:
            self._put_first(job)

    def defer(self, job: Job, error: SamPollError) -> None:
        """End a job with an error: the picture in a request does not change any more."""
        self._end(job, error)

    def fail_attempt(self, job: Job) -> None:
        """Queue a job again as its next attempt, or end it with PoisonError after the last one."""
        if job.attempt < self._attempts:
            self._put_first(replace(job, attempt=job.attempt + 1))
            return
        error = PoisonError(
            f"the process that worked on it has ended {job.attempt} times",
            remedy="look at the server's log; try another picture",
        )
        self._end(job, error)

    # ── for metrics and status ──

    @property
    def waiting(self) -> int:
        """Number of jobs that wait for the pipeline."""
        return len(self._waiting)

    @property
    def inside(self) -> int:
        """Number of places taken."""
        return self._inside

    @property
    def oldest_s(self) -> float:
        """How long the first job has waited for the pipeline, in seconds; 0 if none waits."""
        with self._changed:
            return time.monotonic() - self._waiting[0].source_ref.since if self._waiting else 0.0

    @property
    def orphans(self) -> int:
        """Always 0: requests have no files without a partner."""
        return 0

    @property
    def recovered(self) -> int:
        """Always 0: requests are not taken over from other processes."""
        return 0


def stopping_error() -> UnavailableError:
    """Return the error for requests that arrive, or still wait, when the server stops."""
    return UnavailableError(
        "the server is stopping", remedy="send it again; another server may answer", wait_s=_RETRY_S
    )


def loading_error() -> UnavailableError:
    """Return the error for requests that arrive before the model is loaded."""
    return UnavailableError(
        "the model is being loaded",
        remedy="send it again when /health says ready",
        wait_s=_RETRY_S,
    )
