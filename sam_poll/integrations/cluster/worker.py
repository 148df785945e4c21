"""A worker's job source: claims come from calls of an actor, not from a scan.

A call takes the claim over when the pipeline has room for it: by the rename to the next generation
with this worker's name. From then on this worker's heartbeat stands for the claim. The call ends,
and its message is acknowledged, when the claim's jobs have ended. The claims of a dead worker are
found on the share, by its name, and sent again by the dispatcher. Nothing in `in/` is looked at
here.

Limitations: a file that is put back into `in/` has to be stable again before the dispatcher claims
it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from dramatiq import Retry
from dramatiq.middleware import TimeLimitExceeded
from loguru import logger

from sam_poll.core.backoff import Backoff
from sam_poll.core.safe_path import SafePath
from sam_poll.core.text import shown
from sam_poll.core.types import Job
from sam_poll.core.validation import quoted
from sam_poll.share.claims.heartbeat import is_dispatcher
from sam_poll.share.claims.model import ClaimEntry, ClaimState, claims_in, is_claim_path
from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.hand_back import HandBackFinisher
from sam_poll.share.layout import Layout
from sam_poll.share.source import FolderSource

_FIRST_IDLE_S, _LONGEST_IDLE_S = 0.01, 0.25
_TURN_S = 1.0  # how often a waiting call can be interrupted
_CHECK_S = 1.0  # interval at which the share is checked to be mounted
_REMEMBER_S = 120.0  # interval at which notes about removed pictures and ended claims are dropped


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """A call of the actor. `ended` is done when the call can return, or holds its error."""

    place: ClaimEntry
    generation: int
    ended: Future[None] = field(default_factory=Future)


class ClusterWorkerSource(FolderSource):
    """A share's source whose jobs a dispatcher sends. Entering raises ShareError."""

    _finisher_type = HandBackFinisher
    _finisher: HandBackFinisher

    def __init__(self, layout: Layout, options: FolderOptions | None = None, **more: Any) -> None:
        # No events and no `once`: this source does not look at `in/`.
        super().__init__(
            layout, replace(options or FolderOptions(), mode="poll", once=False), **more
        )
        self._calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._running: dict[SafePath, _Call] = {}
        self._closed = threading.Event()
        # Set when claims may bear this worker's name without an active job.
        self._claims_left = threading.Event()
        self._next_check = 0.0  # monotonic times
        self._next_sweep = 0.0
        self._mounted_at = 0.0  # wall-clock time

    @property
    def last_scan(self) -> float:
        """Wall-clock time at which the share was last seen to be mounted."""
        return self._mounted_at

    # ── the actor ──

    def answer(self, claim: str, generation: int) -> None:
        """Take a claim over and return when its jobs have ended; from any thread.

        Returns also where the claim does not wait in this generation, and after the time limit:
        then the claim alone stands for its jobs.

        Raises Retry where the share cannot be used or this worker ends.
        """
        if not is_claim_path(claim):
            return
        place = ClaimEntry(claim.rpartition("/")[0], self.layout.work / claim)
        call = _Call(place, generation)
        self._calls.put(call)
        if self._closed.is_set():
            self._refuse_calls()
        try:
            while not call.ended.done():
                wait([call.ended], _TURN_S)
        except TimeLimitExceeded:
            call.ended.cancel()
            logger.warning("{} takes long; its message is acknowledged", shown(place.label))
            return
        call.ended.result()

    def end_calls(self) -> None:
        """End the calls that are left when the pipeline has ended."""
        self._refuse_calls()
        for outer in list(self._running):
            self._claim_ended(outer)

    def _refuse_calls(self) -> None:
        """Leave the claims that were not taken over, and those of later calls, to other workers."""
        self._closed.set()
        with suppress(queue.Empty):
            while True:
                _end(self._calls.get_nowait(), Retry("this worker ends", delay=0))

    # ── taking ──

    def jobs(self, stop: threading.Event) -> Generator[Job, None, None]:
        """Yield the jobs of the claims that calls name, until `stop` is set."""
        self._closed.clear()
        try:
            yield from self._jobs(stop)
        finally:
            self._refuse_calls()

    def _jobs(self, stop: threading.Event) -> Iterator[Job]:
        backoff = Backoff()
        idle = Backoff(_FIRST_IDLE_S, _LONGEST_IDLE_S)
        while not stop.is_set():
            self._pulse.beat()
            try:
                self._check_share()
                for entry in self._claims_left_behind():
                    yield from self._hand_out(self._claimer.resume(entry), stop)
                call = self._next_call(idle)
                jobs = self._start(call) if call else self._helper_jobs()
                self._alarms.clear("share")
                backoff.reset()
            except OSError as error:
                self._alarms.raise_("share", f"the share cannot be used: {error.strerror or error}")
                self._claims_left.set()  # a claim may bear this worker's name already
                backoff.wait(stop)
                continue
            yield from self._hand_out(jobs, stop)

    def _next_call(self, idle: Backoff) -> _Call | None:
        try:
            call = self._calls.get(timeout=idle.next_s())
        except queue.Empty:
            return None
        idle.reset()
        return call if call.ended.set_running_or_notify_cancel() else None

    def _start(self, call: _Call) -> list[Job]:
        """Take over the claim that a call names; return its jobs.

        Raises OSError if the share fails; the message is then retried.
        """
        try:
            entry = self._waiting_claim(call.place, call.generation)
            jobs = self._claimer.resume(entry, handed=True) if entry else []
        except OSError as error:
            _end(call, Retry(f"the share cannot be used: {error.strerror or error}"))
            raise
        if entry is None:
            label = quoted(call.place.label)
            logger.debug("{} does not wait in generation {}", label, call.generation)
        if jobs:
            # The claim may have been this worker's before, lost while it was frozen.
            self._claim_ended(call.place.outer)
            self._running[call.place.outer] = call
        else:
            _end(call)
        return jobs

    def _check_share(self) -> None:
        """Check from time to time that the share is mounted, and drop what is over."""
        now = time.monotonic()
        if now >= self._next_check:
            self._sentinel.check()
            self._next_check = now + _CHECK_S
            self._mounted_at = time.time()
            if self._holds.refresh(now):
                # Claims that could not be put away because of a path may still be this worker's.
                self._claims_left.set()
            self._report_holds(now)
        if now >= self._next_sweep:
            self._unreadable.forget_removed()
            self._finisher.forget_ended()
            self._next_sweep = now + _REMEMBER_S

    def _waiting_claim(self, place: ClaimEntry, generation: int) -> ClaimEntry | None:
        """Return the claim of this name that waits in this generation.

        Returns None if it was taken, has ended, or never existed. Raises OSError if the share is
        not mounted.
        """
        try:
            entries = list(claims_in(place.folder, place.outer))
        except OSError as error:
            self._sentinel.check()
            # The share is there, so it is this path that cannot be read. If a claim waits there,
            # its dispatcher sends the message again.
            logger.warning(
                "{} cannot be looked at: {}; its message is dropped",
                quoted(place.label),
                error.strerror,
            )
            return None
        for entry in entries:
            hold = entry.hold
            if hold and _waits(hold) and hold.generation == generation:
                return entry
        return None

    def _claims_left_behind(self) -> Iterator[ClaimEntry]:
        """Yield this worker's claims that no job is active for.

        The share failed when they were to be put away, or a worker process ended.
        """
        if not self._claims_left.is_set():
            return
        self._claims_left.clear()
        for entry in self._store.list_work().claims:
            if self._active.left_behind(entry) and not self._holds.blocks_claim(entry):
                yield entry

    # ── overridden methods of FolderSource ──

    def _claim_left(self) -> None:
        self._claims_left.set()

    def _claim_ended(self, outer: SafePath) -> None:
        call = self._running.pop(outer, None)
        if call:
            _end(call)


def _end(call: _Call, error: Exception | None = None) -> None:
    """End a call, unless it has ended already."""
    with suppress(InvalidStateError):
        if error:
            call.ended.set_exception(error)
        else:
            call.ended.set_result(None)


def _waits(hold: ClaimState) -> bool:
    """Return whether a claim waits for a worker.

    The claim of a plain daemon, or of another worker, is not taken, whatever a message says:
    dispatchers find out whether its owner is dead.
    """
    return hold.place is None and (hold.attempt == 0 or is_dispatcher(hold.worker))
