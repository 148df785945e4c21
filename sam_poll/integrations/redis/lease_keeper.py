"""The thread that keeps the entries of a stream's worker from being taken over by others."""

from __future__ import annotations

import threading
import time

from loguru import logger

from sam_poll.integrations.redis.connection import RedisUnavailableError
from sam_poll.integrations.redis.consumer_group import ConsumerGroup
from sam_poll.integrations.redis.held_entries import HeldEntries

_FORGET_S = 3600.0  # idle time after which a consumer without entries is removed from the group
_JOIN_S = 2.0


class LeaseKeeper:
    """Refreshes the held entries four times a lease, counts the backlog, removes dead consumers.

    `backlog`: number of entries delivered to no worker, as of the last refresh.
    """

    def __init__(self, group: ConsumerGroup, held: HeldEntries, lease_ms: int) -> None:
        self._group = group
        self._held = held
        self._interval_s = lease_ms / 4000
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self.backlog = 0

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread, and wait a moment for its end."""
        self._end.set()
        self._thread.join(_JOIN_S)

    def _run(self) -> None:
        forget_at = time.monotonic()
        while not self._end.wait(self._interval_s):
            try:
                self._refresh()
                self.backlog = self._group.backlog()
                if time.monotonic() >= forget_at:
                    forget_at = time.monotonic() + _FORGET_S
                    self._group.forget_idle_consumers(_FORGET_S)
            except RedisUnavailableError as error:
                if not error.no_group:  # the thread that takes entries creates the group again
                    self._group.connection.report_unavailable(error)
            except Exception as error:  # noqa: BLE001  without this thread the lease expires
                logger.opt(exception=True).error(
                    "the lease was not renewed: {}", type(error).__name__
                )

    def _refresh(self) -> None:
        ids = self._held.ids()
        if not ids:
            return
        for entry_id in self._group.refresh(ids):
            self._held.mark_lost(entry_id)
