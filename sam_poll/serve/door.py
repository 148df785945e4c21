"""Requests as a door: each is a job, and its caller waits for the end of it.

There is a fixed number of places, from a request's first byte to the last one of its answer; who finds none is told at
once when to come again. A caller who has gone takes the job along, as long as the network has not begun with it.

What can still go wrong here: an answer that is ready when its caller has just gone was made for nobody.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeAlias

from sam_poll.errors import PoisonError, SamPollError
from sam_poll.serve.refusals import FullError, UnavailableError
from sam_poll.stats import Pulse
from sam_poll.types import Document, Job

_POLL_S = 0.1
_SOON_S = 5.0
_NEW = 0.1  # the weight of the last gap between two ends in their mean

Outcome: TypeAlias = Sequence[Document] | SamPollError


class Exchange:
    """A caller who waits. `tell` is called once, from any thread, with how the job has ended."""

    def __init__(self, tell: Callable[[Outcome], None]) -> None:
        self.gone = threading.Event()
        self.since = time.monotonic()
        self._tell = tell
        self._lock = threading.Lock()
        self._over = False

    def end(self, outcome: Outcome) -> None:
        """Tell the caller, if nobody has and somebody listens."""
        with self._lock:
            over, self._over = self._over, True
        if not over and not self.gone.is_set():
            self._tell(outcome)


class HttpDoor:
    """Hands out what is offered, first come, first served. A job's `origin` is its `Exchange`.

    `places` requests may be inside at once. `attempts`: runs of a job that may end their process (in a fleet).
    """

    def __init__(
        self,
        *,
        places: int,
        attempts: int = 3,
        pulse: Pulse | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.places, self._attempts, self._pulse, self._clock = places, attempts, pulse or Pulse(), clock
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._open: set[Exchange] = set()
        self._inside = 0
        self._ended, self._gap_s = 0.0, 0.0  # when a job ended last, or began alone; what lies between two ends
        self._closed: SamPollError | None = None
        self.serving = False  # somebody takes jobs
        self.last_scan = 0.0  # when somebody last asked for one, as a clock shows it

    # ── the callers' side ──

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place, as long as this is entered. FullError."""
        with self._changed:
            if self._inside >= self.places:
                raise FullError(
                    f"all {self.places} places are taken",
                    remedy="ask again later; more places: serve.queue",
                    wait_s=self._half_empty_s(),
                )
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1

    def _half_empty_s(self) -> float:
        return self.places / 2 * self._gap_s if self._gap_s else _SOON_S

    def offer(self, job: Job, exchange: Exchange) -> None:
        """Have it done; `exchange` is told how it ends. SamPollError where it never will be."""
        with self._changed:
            if self._closed:
                raise self._closed
            if not self._open:
                self._ended = self._clock()
            self._open.add(exchange)
            self._waiting.append(replace(job, origin=exchange, gone=exchange.gone))
            self._changed.notify()

    def give_up(self, exchange: Exchange) -> None:
        """Its caller waits no more."""
        exchange.gone.set()
        with self._changed:
            self._open.discard(exchange)
            self._waiting = deque(job for job in self._waiting if job.origin is not exchange)

    def close(self, error: SamPollError) -> None:
        """Tell all who still wait, and all who come, that there will be no answer, and why."""
        with self._changed:
            self._closed = self._closed or error
            left, self._open = self._open, set()
            self._waiting.clear()
        for exchange in left:
            exchange.end(error)

    # ── the pipeline's side ──

    def jobs(self, stop: threading.Event) -> Generator[Job, None, None]:
        """What is offered, until `stop` is set; those that then still wait are told to ask elsewhere."""
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
                self._turn_away()

    def _next(self) -> Job | None:
        with self._changed:
            if not self._waiting:
                self._changed.wait(_POLL_S)
            return self._waiting.popleft() if self._waiting else None

    def _turn_away(self) -> None:
        with self._changed:
            left, self._waiting = list(self._waiting), deque()
        for job in left:
            self._end(job, stopping())

    def _end(self, job: Job, outcome: Outcome) -> None:
        with self._changed:
            self._open.discard(job.origin)
            before, self._ended = self._ended, self._clock()
            gap_s = self._ended - before
            self._gap_s = self._gap_s * (1 - _NEW) + gap_s * _NEW if self._gap_s else gap_s
        job.origin.end(outcome)

    def _again(self, job: Job) -> None:
        """Before all others: it was here before them."""
        with self._changed:
            if job.origin in self._open:
                self._waiting.appendleft(job)
                self._changed.notify()

    def deliver(self, job: Job, documents: Sequence[Document]) -> None:
        """The answer."""
        self._end(job, documents)

    def reject(self, job: Job, error: SamPollError) -> None:
        """The refusal."""
        self._end(job, error)

    def release(self, job: Job, trouble: OSError | None = None) -> None:
        """Offered again, if its caller is still there and nothing is wrong."""
        if trouble:
            self._end(job, UnavailableError(f"it cannot be worked on now: {trouble}", wait_s=_SOON_S))
        else:
            self._again(job)

    def defer(self, job: Job, error: SamPollError) -> None:
        """What a request holds does not change any more."""
        self._end(job, error)

    def abandon(self, job: Job) -> None:
        """Offered again, alone; but not for ever."""
        if job.attempt < self._attempts:
            self._again(replace(job, attempt=job.attempt + 1))
            return
        reason = f"the process that works on it has ended {job.attempt} times"
        self._end(job, PoisonError(reason, remedy="look at the server's log; try another picture"))

    # ── who looks on (`metrics.Share`) ──

    @property
    def waiting(self) -> int:
        """Jobs not handed out yet."""
        return len(self._waiting)

    @property
    def inside(self) -> int:
        """Places taken."""
        return self._inside

    @property
    def oldest_s(self) -> float:
        """How long the first of those has waited."""
        with self._changed:
            return time.monotonic() - self._waiting[0].origin.since if self._waiting else 0.0

    @property
    def orphans(self) -> int:
        """There is nothing that could be left behind."""
        return 0

    @property
    def recovered(self) -> int:
        """Nor taken over."""
        return 0


def stopping() -> UnavailableError:
    """For who comes when the server is about to end."""
    return UnavailableError("the server is stopping", remedy="ask again; another one may answer", wait_s=_SOON_S)


def loading() -> UnavailableError:
    """For who comes before the network is there."""
    return UnavailableError("the network is being loaded", remedy="ask again; /health says when", wait_s=_SOON_S)
