"""Choose the next entry of a stream's worker: a lost delivery, a dead worker's entry, a new one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from sam_poll.integrations.redis.consumer_group import ConsumerGroup, Delivery, PendingEntry
from sam_poll.integrations.redis.held_entries import HeldEntries

_BLOCK_S = 0.5  # how long the server waits for a new entry
_TAKEOVER_CHECK_S = 5.0  # longest time between two looks for entries of dead workers
_TAKEOVER_BATCH = 16  # entries of dead workers that one look finds


class EntryReader:
    """Reads one entry at a time, for one thread; `check_soon` may be called from any.

    `recovered` counts the entries taken over from workers that ended while they worked on them.
    """

    def __init__(
        self,
        group: ConsumerGroup,
        held: HeldEntries,
        lease_ms: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._group = group
        self._held = held
        self._lease_ms = lease_ms
        self._clock = clock
        self._idle: deque[PendingEntry] = deque()  # seen as idle, to be claimed
        self._check_at = 0.0
        self._replies_lost = False
        self.recovered = 0

    def next(self) -> Delivery | None:
        """Return the next entry, or None if there is none within half a second."""
        return self._lost_delivery() or self._taken_over() or self._group.read_new(_BLOCK_S)

    def connection_failed(self) -> None:
        """Record that a call has failed.

        The server may have delivered an entry in a reply that did not arrive. And living workers
        could not refresh their entries meanwhile: they get half a lease to do so before entries are
        taken over.
        """
        self._idle.clear()
        self._replies_lost = True
        self._check_at = self._clock() + self._lease_ms / 2000

    def check_soon(self) -> None:
        """Look for entries to take over in the next turn: one was requeued."""
        self._check_at = 0.0

    def _lost_delivery(self) -> Delivery | None:
        """Return an entry that was delivered to this consumer in a reply that did not arrive."""
        if not self._replies_lost:
            return None
        for pending in self._group.own_pending():
            if pending.entry_id in self._held:
                continue
            delivery = self._group.read_own(pending.entry_id)
            if delivery:
                # It was delivered, but never worked on: the number of its attempts stays.
                return delivery._replace(attempt=pending.deliveries)
        self._replies_lost = False
        return None

    def _taken_over(self) -> Delivery | None:
        """Claim and return an entry that was not refreshed for a lease, or was requeued."""
        if not self._idle and self._clock() >= self._check_at:
            self._find_idle()
        while self._idle:
            pending = self._idle.popleft()
            if pending.entry_id in self._held:
                continue
            delivery = self._group.claim(pending, self._lease_ms)
            if delivery:
                self.recovered += pending.deliveries > 0
                return delivery
        return None

    def _find_idle(self) -> None:
        pending = self._group.idle_pending(_TAKEOVER_BATCH, self._lease_ms)
        self._idle.extend(pending)
        if len(pending) < _TAKEOVER_BATCH:
            self._check_at = self._clock() + min(_TAKEOVER_CHECK_S, self._lease_ms / 4000)
