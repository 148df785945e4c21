"""The job source of a share: its folders, scans, claims and answers.

Pictures and prompts go `in → work → done | failed`, answers appear in `out`. A scan of `in/`
decides what is ready; file system events only start one. A file has one owner, and changes owner by
a rename. A job ends in one of three places: answered, rejected with a reason beside the unchanged
input, or back in `in/`. Several daemons may share the folders. A path that cannot be used delays
only the jobs that need it (`path_holds`).

Limitations: a prompt without a picture is matched by name with a picture in `done/` after `lone_s`
seconds; a new picture of that name that arrives later is too late. A share that hangs blocks the
threads that access it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from loguru import logger

from sam_poll.core.alarms import Alarms
from sam_poll.core.backoff import Backoff
from sam_poll.core.errors import ClaimLostError, SamPollError
from sam_poll.core.safe_path import SafePath
from sam_poll.core.stats import LoopHeartbeat
from sam_poll.core.text import shown
from sam_poll.core.types import Job, OutputFile
from sam_poll.share.active_claims import ActiveClaims
from sam_poll.share.claim_recovery import ClaimRecovery
from sam_poll.share.claims.heartbeat import WorkerHeartbeat
from sam_poll.share.claims.liveness import LivenessTracker
from sam_poll.share.claims.model import ClaimEntry
from sam_poll.share.claims.store import ClaimStore
from sam_poll.share.context import ShareContext
from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.intake.scanner import Scanner, by_picture
from sam_poll.share.intake.stat_cache import NEVER
from sam_poll.share.job_claimer import JobClaimer
from sam_poll.share.job_factory import JobFactory
from sam_poll.share.job_finisher import JobFinisher
from sam_poll.share.layout import Layout
from sam_poll.share.mosaic_workspace import MosaicWorkspace
from sam_poll.share.mount_check import (
    Sentinel,
    check_folders,
    unusable_error,
    world_writable_warning,
)
from sam_poll.share.pending_job import PendingJob
from sam_poll.share.unreadable_pictures import UnreadablePictures

_STOP_S = 0.25  # interval at which a waiting thread checks `stop`
_FIRST_PAUSE_S = 1.0  # after an error of the share, until the next try
_LONGEST_PAUSE_S = 30.0
_PRESCAN_ALONE_S = 1.0
_PRESCAN_END_S = 5.0  # how long `__exit__` waits for a prescan


@dataclass(frozen=True, slots=True)
class _Scan:
    """One look at `in/` and `work/`.

    `started`: monotonic time of its begin. `seconds`: its duration. `was_busy`: whether claims were
    active before it.
    """

    started: float
    seconds: float
    was_busy: bool
    abandoned: list[ClaimEntry]
    pending: list[PendingJob]

    @property
    def is_empty(self) -> bool:
        """Return whether the scan has found nothing to claim."""
        return not (self.pending or self.abandoned)


class FolderSource:
    """The `JobSource` of a share.

    `with FolderSource(layout, options) as source: pipeline.run(source, stop)`. Entering checks the
    folders and writes the first heartbeat file; it raises ShareError. `pulse` beats while the scan
    makes progress; `state` returns what other daemons and `sam-poll status` may read about this
    one.

    The parts: `_scanner` finds pending jobs in `in/`, `_recovery` abandoned claims in `work/`;
    `_claimer` claims them; `_active` knows the claims of running jobs; `_finisher` ends jobs;
    `_holds` are paths that cannot be used now.

    A subclass may override the methods under "for subclasses", and `_finisher_type`.
    """

    runs = True
    """Whether this daemon runs the jobs that it claims; a dispatcher claims for other daemons."""

    _finisher_type: type[JobFinisher] = JobFinisher

    def __init__(
        self,
        layout: Layout,
        options: FolderOptions | None = None,
        *,
        alarms: Alarms | None = None,
        pulse: LoopHeartbeat | None = None,
        state: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        self.layout = layout
        self.options = options or FolderOptions()
        self.device_count = 0
        """How many devices of this daemon may work on one mosaic; 0: it helps with none."""
        self._alarms = alarms or Alarms()
        self._pulse = pulse or LoopHeartbeat()
        self._state = state
        self._wake = threading.Event()
        self._scanner = Scanner(layout, self.options, self._wake)
        self._holds = self._scanner.path_holds
        self._workspace = MosaicWorkspace(layout)
        self._stop: threading.Event | None = None
        self._prescan_thread: threading.Thread | None = None

    def __enter__(self) -> FolderSource:
        layout, options = self.layout, self.options
        check_folders(layout, options.sentinel)
        warning = world_writable_warning(layout)
        if warning:
            logger.warning("{}: {}", shown(warning.message), shown(warning.remedy))
        with ExitStack() as stack:
            try:
                self._sentinel = Sentinel(layout, options.sentinel)
                self._heartbeat = stack.enter_context(
                    WorkerHeartbeat(
                        layout.work,
                        options.lease_s,
                        self._alarms,
                        dispatcher=not self.runs,
                        state=self._shared_state,
                        check_mounted=self._sentinel.check,
                    )
                )
            except OSError as error:
                raise unusable_error("work", error.filename or layout.work, error) from error
            self._make_parts()
            self._open = stack.pop_all()
        return self

    def _make_parts(self) -> None:
        """Create what needs the daemon's name on the share."""
        layout, options = self.layout, self.options
        self._store = ClaimStore(
            layout,
            self._heartbeat.worker,
            self._sentinel.check,
            runs=self.runs,
            advanced=self._workspace.progress,
        )
        self._active = ActiveClaims(self._store, ended=self._claim_ended)
        context = ShareContext(
            layout, options, self._scanner, self._store, self._active, self._workspace
        )
        self._factory = JobFactory(
            context,
            should_continue=self._should_continue,
            max_mosaics=lambda: self.device_count + 1,
        )
        self._claimer = JobClaimer(context, self._factory, wake=self._wake.set)
        self._recovery = ClaimRecovery(
            context,
            LivenessTracker(layout.work, options.lease_s),
            wake=self._wake.set,
            own_claims_listed=self._own_claims_listed,
        )
        self._unreadable = UnreadablePictures(layout, self._active, self._alarms)
        self._finisher = self._finisher_type(
            context, self._unreadable, wake=self._wake.set, claim_left=self._claim_left
        )

    def __exit__(self, *exc: object) -> None:
        if self._prescan_thread:
            self._prescan_thread.join(_PRESCAN_END_S)  # it may hang in a share that does not answer
        self._scanner.close()
        self._open.close()
        with suppress(OSError):
            # While claims of this daemon are left, other daemons must be able to see that their
            # owner has ended.
            if not any(
                entry.hold and entry.hold.worker == self.worker
                for entry in self._store.list_work().claims
            ):
                self._heartbeat.remove()

    # ── status ──

    @property
    def worker(self) -> str:
        """Return this daemon's name on the share."""
        return self._heartbeat.worker

    @property
    def share(self) -> str:
        """Return the number that identifies this share."""
        return self._sentinel.number

    @property
    def waiting(self) -> int:
        """Return the number of pictures and prompts in `in/` at the last scan."""
        return self._scanner.waiting

    @property
    def oldest_s(self) -> float:
        """Return for how many seconds the oldest of them has been seen."""
        return self._scanner.oldest_s

    @property
    def last_scan(self) -> float:
        """Return the wall-clock time of the last complete scan; 0.0 before the first one."""
        return self._scanner.last

    @property
    def scans(self) -> int:
        """Return the number of scans of `in/`."""
        return self._scanner.scans

    @property
    def held(self) -> int:
        """Return the number of paths that cannot be used now."""
        return len(self._holds)

    @property
    def recovered(self) -> int:
        """Return the number of claims taken over from daemons that have died."""
        return self._factory.recovered

    @property
    def orphans(self) -> int:
        """Return the number of abandoned claims and stray files in `work/` at the last scan."""
        return self._recovery.orphans

    def _shared_state(self) -> dict[str, Any]:
        """Return what others may read about this daemon in its heartbeat file."""
        state = self._state() if self._state else {}
        return {**state, "held": self._holds.report()} if self.held else state

    # ── scans ──

    def prescan(self) -> None:
        """Scan `in/` in a thread while the caller loads a model, so that files begin to settle now.

        At most once, and before `jobs`.
        """

        def scan() -> None:
            try:
                self._scanner.prescan()
            except OSError:  # the first scan of `jobs` meets and reports it
                self._scanner.renew()

        self._prescan_thread = threading.Thread(target=scan, name="prescan", daemon=True)
        self._prescan_thread.start()
        # The scan gets some time of its own: beside the imports of a model it takes four times as
        # long, because of Python's global lock, and files would settle after the model is loaded.
        # On a slow share it goes on meanwhile.
        self._prescan_thread.join(_PRESCAN_ALONE_S)

    def _finish_prescan(self, stop: threading.Event) -> None:
        """Wait for the prescan: the scanner is not thread-safe."""
        while self._prescan_thread and self._prescan_thread.is_alive() and not stop.is_set():
            self._prescan_thread.join(_STOP_S)

    def jobs(self, stop: threading.Event) -> Generator[Job, None, None]:
        """Yield claimed jobs, oldest first.

        The generator ends when `stop` is set or (`once`) no file is left that could become a job.
        """
        self._stop = stop
        backoff = Backoff(_FIRST_PAUSE_S, _LONGEST_PAUSE_S)
        self._finish_prescan(stop)
        while not stop.is_set():
            self._wake.clear()
            try:
                scan = self._scan()
                yield from self._claim_found(scan, stop)
                self._alarms.clear("share")
            except OSError as error:
                place = f": {shown(error.filename)}" if error.filename else ""
                self._alarms.raise_(
                    "share", f"the share cannot be used: {error.strerror or error}{place}"
                )
                self._scanner.renew()
                self._wait(stop, backoff.next_s())
                continue
            backoff.reset()
            due = min(self._scanner.due, self._recovery.due, self._holds.due)
            if self.options.once and due == NEVER and self._is_drained(scan):
                return
            stop.wait(min(scan.seconds, 1.0))  # a burst of events must not start a scan for each
            self._wait(stop, min(due - time.monotonic(), self.options.rescan_s))

    def _scan(self) -> _Scan:
        started = time.monotonic()
        self._sentinel.check()
        # Before the scan, which may miss the files of a job that is put back meanwhile.
        was_busy = self._active.busy
        pending = self._scanner.scan(
            started, self._active.pictures(), partial(self._recovery.survey, started)
        )
        self._report_holds(started)
        self._unreadable.forget_removed()
        seconds = time.monotonic() - started
        return _Scan(started, seconds, was_busy, self._recovery.abandoned, pending)

    def _is_drained(self, scan: _Scan) -> bool:
        return scan.is_empty and not (scan.was_busy or self._active.busy or self._wake.is_set())

    def _claim_found(self, scan: _Scan, stop: threading.Event) -> Iterator[Job]:
        """Claim what a scan has found and yield the jobs, until it is time for the next scan."""
        time_s = max(self.options.rescan_s, 10 * scan.seconds)
        for claim in self._claim_steps(scan.abandoned, scan.pending):
            if stop.is_set() or time.monotonic() - scan.started > time_s:
                # More is ready, but files that have arrived meanwhile must not wait for all of it.
                self._wake.set()
                break
            yield from self._hand_out(claim(), stop)
        if scan.is_empty:
            yield from self._hand_out(self._helper_jobs(), stop)

    def _helper_jobs(self) -> list[Job]:
        """Return parts of mosaics for idle devices; with `once`, only of this daemon's mosaics."""
        return self._workspace.helper_jobs(
            self.device_count, self._active.holds, only_ours=self.options.once
        )

    def _report_holds(self, now: float) -> None:
        """Hold the folders that cannot be read; raise or clear the alarm `path`."""
        for folder in self._scanner.closed:
            self._holds.closed(self.layout.input / folder, now, logged=True)
        undelivered = self._holds.undelivered
        if undelivered:
            self._alarms.raise_("path", undelivered)
        else:
            self._alarms.clear("path")

    def _should_continue(self) -> bool:
        """Return whether a long operation on the scan's thread should go on; beat the pulse."""
        self._pulse.beat()
        return self._stop is None or not self._stop.is_set()

    # ── ends of jobs (`JobSource`) ──

    def deliver(self, job: Job, documents: Sequence[OutputFile]) -> None:
        """Write the outputs, then move the inputs to `done/`. See `JobFinisher`."""
        self._finisher.deliver(job, documents)

    def reject(self, job: Job, error: SamPollError) -> None:
        """Move the unchanged inputs to `failed/` with an error report. See `JobFinisher`."""
        self._finisher.reject(job, error)

    def requeue(self, job: Job, trouble: OSError | None = None) -> None:
        """Put a job back into `in/`, with a pause if reading it failed. See `JobFinisher`."""
        self._finisher.requeue(job, trouble)

    def fail_attempt(self, job: Job) -> None:
        """Offer a job again whose worker process ended. See `JobFinisher`."""
        self._finisher.fail_attempt(job)

    def defer(self, job: Job, error: SamPollError) -> None:
        """Put a job back until its picture changes. See `JobFinisher`."""
        self._finisher.defer(job, error)

    # ── for subclasses ──

    def _claim_steps(
        self, abandoned: list[ClaimEntry], pending: list[PendingJob]
    ) -> Iterator[Callable[[], list[Job]]]:
        """Yield calls that claim jobs, in the order of claiming.

        Each is made before the next one is requested.
        """
        for entry in abandoned:
            yield partial(self._claimer.resume, entry)
        for group in self._claimer.failing_folders_last(by_picture(pending)):
            yield partial(self._claimer.claim, group)

    def _hand_out(self, jobs: list[Job], stop: threading.Event) -> Iterator[Job]:
        """Yield jobs that were claimed together.

        Those that are left when `stop` is set, or when the generator is closed, are requeued.
        """
        self._pulse.beat()
        try:
            while jobs and not stop.is_set():
                yield jobs.pop(0)
        finally:
            for job in jobs:
                try:
                    self.requeue(job)
                except (OSError, ClaimLostError) as error:
                    logger.warning("job {} stays in work/: {}", shown(job.id), error)

    def _wait(self, stop: threading.Event, seconds: float) -> None:
        """Wait until the next scan is due: for some seconds, or until an event or `stop`."""
        deadline = time.monotonic() + seconds
        self._pulse.beat()
        while not stop.is_set() and (left := deadline - time.monotonic()) > 0:
            if self._wake.wait(min(left, _STOP_S)):
                return
            self._pulse.beat()

    def _own_claims_listed(self, own: set[SafePath]) -> None:
        """Note which claims in `work/` bear this daemon's name, during a scan."""

    def _claim_left(self) -> None:
        """Note that a claim of this daemon must be taken over again. From any thread."""
        self._wake.set()

    def _claim_ended(self, outer: SafePath) -> None:
        """Note that a claim is not active here any more, by its outer folder. From any thread."""
