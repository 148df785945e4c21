"""The dispatcher: scans the share for all workers, claims ready jobs, and puts them into the queue.

It runs no jobs. Its claims are the record of what waits: a claim that bears its name is in the
queue, and is sent again if the queue loses it. A worker takes a claim over by the rename with which
any daemon takes over from another. A dispatcher that dies is a dead daemon: another dispatcher, or
a plain `sam-poll watch`, takes its claims over.

Limitations: while the broker is unreachable no job is started, unless plain daemons work on the
share, too; and these do not touch what a living dispatcher has claimed already.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import partial
from typing import Any

from sam_poll.core.errors import SamPollError
from sam_poll.core.safe_path import SafePath
from sam_poll.core.telemetry import Telemetry
from sam_poll.core.types import Job
from sam_poll.integrations.cluster.messages import ACTORS, FIRST, REST, message_of, queue_names
from sam_poll.integrations.cluster.outbox import Outbox
from sam_poll.integrations.message_broker import CheckedBroker
from sam_poll.pipeline.completion import JobCompletion
from sam_poll.pipeline.task import Task
from sam_poll.share.claims.model import ClaimEntry
from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.intake.scanner import by_picture
from sam_poll.share.job_claimer import folder_of
from sam_poll.share.layout import Layout
from sam_poll.share.pending_job import PendingJob
from sam_poll.share.source import FolderSource

_ROOM_S = 0.1  # interval at which a full queue is checked for room
_TURN_S = 0.25  # interval at which the queues are looked at otherwise


class ClusterDispatcher(FolderSource):
    """A share's source whose jobs wait for workers. Entering raises ShareError or SettingsError.

    - `broker`: sends the messages.
    - `ahead`: maximum number of claims that wait in a queue, of each kind.
    - `first`: folders below `in/`, or patterns, whose jobs go before all others.
    - `settings`: those that workers compare with their own.

    `run` takes the place of a pipeline.
    """

    runs = False

    def __init__(
        self,
        layout: Layout,
        options: FolderOptions,
        broker: CheckedBroker,
        ahead: int,
        first: Sequence[str],
        *,
        settings: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(layout, options, **more)
        self._broker = broker
        self._ahead = ahead
        self._first = tuple(first)
        self._settings = settings or {}
        self._full: set[bool] = set()
        self.outboxes: dict[bool, Outbox] = {}

    def __enter__(self) -> ClusterDispatcher:
        super().__enter__()
        self._sender = ThreadPoolExecutor(1, "sender")
        for first, queue in queue_names(self._broker.prefix, self.share).items():
            make_message = partial(message_of, queue, ACTORS[first], self._settings)
            self.outboxes[first] = Outbox(
                self._broker, queue, self._ahead, make_message, self._sender.submit
            )
        return self

    def __exit__(self, *exc: object) -> None:
        self._sender.shutdown()
        super().__exit__(*exc)

    def run(self, stop: threading.Event) -> None:
        """Claim jobs and hand them to workers until `stop` is set.

        Claims that wait then go on waiting: workers do not need a dispatcher to take them.
        """
        completion = JobCompletion(
            self, lambda: None, Telemetry(alarms=self._alarms), stop, abort=stop
        )
        for job in self.jobs(stop):
            if job.error:
                completion.reject(Task(job), job.error)
            else:
                claim = job.source_ref.claim
                self.outboxes[self._is_first(claim.folder)].add(claim)

    def reject(self, job: Job, error: SamPollError) -> None:
        """Reject a job that no worker can answer; retried while the share cannot be written to."""
        self._pulse.beat()
        super().reject(job, error)

    def _is_first(self, folder: str) -> bool:
        """Return whether this folder, or one above it, is among the urgent ones."""
        parts = folder.split("/")
        above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        return any(fnmatch(name, pattern) for name in above for pattern in self._first)

    # ── overridden methods of FolderSource ──

    def _claim_steps(
        self, abandoned: list[ClaimEntry], pending: list[PendingJob]
    ) -> Iterator[Callable[[], list[Job]]]:
        groups = by_picture(pending)
        for first in (FIRST, REST):
            for entry in abandoned:
                if self._is_first(entry.folder) is first and self.outboxes[first].has_reserve:
                    yield partial(self._claimer.resume, entry)
            for group in self._claimer.failing_folders_last(groups):
                if self._is_first(folder_of(group)) is first and self._has_room(first):
                    yield partial(self._claimer.claim, group)

    def _hand_out(self, jobs: list[Job], stop: threading.Event) -> Iterator[Job]:
        """Yield all jobs, also after `stop` is set: to wait for a worker needs no dispatcher."""
        self._pulse.beat()
        yield from jobs

    def _has_room(self, first: bool) -> bool:
        """Return whether another claim of this kind may be made in this scan."""
        if self.outboxes[first].is_full:
            self._full.add(first)
        return first not in self._full

    def _wait(self, stop: threading.Event, seconds: float) -> None:
        full = [self.outboxes[first] for first in self._full]
        self._full.clear()
        if full:
            # The ready jobs wait for room, whatever happens in `in/`; so events need not be waited
            # for. Abandoned claims must be looked for in time all the same.
            due = self._recovery.due - time.monotonic()
            seconds = max(_ROOM_S, min(self.options.rescan_s, due))
        deadline = time.monotonic() + seconds
        while not stop.is_set() and time.monotonic() < deadline:
            self._pulse.beat()
            for outbox in self.outboxes.values():
                outbox.refresh()
            if full:
                if any(outbox.has_room for outbox in full):
                    return
                stop.wait(_ROOM_S)
            elif self._wake.wait(min(_TURN_S, seconds)):
                return

    def _own_claims_listed(self, own: set[SafePath]) -> None:
        self._active.forget_all_but(own)
        for outbox in self.outboxes.values():
            outbox.keep_only(own)
