"""The claims of a dispatcher that wait in one queue; lost messages are sent again.

A broker does not say whether it still has a message. But a queue is first in, first out: a claim
that waits on the share although a later one was taken, or although the queue is empty, has lost its
message, or a busy worker has fetched it ahead. It is sent again after a while; should the first
message turn up, it does nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dramatiq.errors import BrokerConnectionError
from loguru import logger

from sam_poll.core.backoff import Backoff
from sam_poll.core.safe_path import SafePath
from sam_poll.integrations.message_broker import CheckedBroker
from sam_poll.share.claims.model import Claim, ClaimEntry, claims_in

_LOOK_S = 2.0  # interval at which the claims of an empty queue are looked at
_ROOM_SHARE = 0.75  # a full queue has room again when it is down to this share
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 60.0  # before a claim is sent again
_LONGEST_OUTAGE_PAUSE_S = 3.0  # between two tries to reach the broker, as Dramatiq's workers do


@dataclass(slots=True, eq=False)
class _WaitingClaim:
    """A claim that waits for a worker.

    `due`: monotonic time from which on it is to be sent; infinity while its message may be in the
    queue. `pause_s`: time between the loss of its message and the next one.
    """

    entry: ClaimEntry
    due: float = 0.0
    pause_s: float = _FIRST_PAUSE_S
    was_sent: bool = False

    @property
    def still_waits(self) -> bool:
        """Whether the claim still bears the name under which it waits. Raises OSError."""
        # Opening the claim's folder makes a network file system ask its server; a stat of the claim
        # alone may be answered from the cache.
        entries = claims_in(self.entry.folder, self.entry.outer)
        return any(found.path == self.entry.path for found in entries)


class Outbox:
    """The claims that wait in `queue`. Its methods are for one thread, and wait for nothing.

    - `ahead`: maximum number of messages in the queue.
    - `make_message`: see `messages.message_of`.
    - `submit`: runs steps one after another, in a thread that may wait for the broker.

    `sent`: number of messages sent; `again`: how many of these were sent again. `away`: the broker
    is unreachable.
    """

    def __init__(
        self,
        broker: CheckedBroker,
        queue: str,
        ahead: int,
        make_message: Callable[[ClaimEntry], Any],
        submit: Callable[..., object],
    ) -> None:
        self._broker = broker
        self._queue = queue
        self._ahead = ahead
        self._make_message = make_message
        self._submit = submit
        self._added = 0
        self._handled = 0  # of those that were added
        self._is_refreshing = False
        self._waiting: dict[SafePath, _WaitingClaim] = {}  # in the order of sending
        self._length = 0  # of the queue, when it was last asked, and what was sent since
        self._backoff = Backoff(longest_s=_LONGEST_OUTAGE_PAUSE_S)
        self._next_try = 0.0  # monotonic times
        self._next_look = 0.0
        self.away = False
        self.sent = 0
        self.again = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether no new claims may be added."""
        return not self.has_reserve or self._load >= self._ahead

    @property
    def has_reserve(self) -> bool:
        """Whether claims of dead workers may be added: they do not wait for a queue to empty."""
        return not self.away and max(self._load, len(self)) < 2 * self._ahead

    @property
    def has_room(self) -> bool:
        """Whether enough messages were fetched, since the queue was full."""
        return not self.is_full and self._load <= self._ahead * _ROOM_SHARE

    @property
    def _load(self) -> int:
        return self._length + self._added - self._handled

    def add(self, claim: Claim) -> None:
        """Send a claim of the dispatcher to the workers."""
        self._added += 1
        self._submit(self._add, ClaimEntry(claim.folder, claim.outer, claim.hold))

    def keep_only(self, own: set[SafePath]) -> None:
        """Drop all claims but these, which still bear the dispatcher's name."""
        self._submit(self._drop_taken, lambda one: one.entry.path in own, empty=False)

    def refresh(self) -> None:
        """Send what is due, and find out the length of the queue."""
        if not self._is_refreshing and time.monotonic() >= self._next_try:
            self._is_refreshing = True
            self._submit(self._call, self._refresh)

    # ── in the thread of `submit` ──

    def _add(self, entry: ClaimEntry) -> None:
        if entry.path not in self._waiting:
            self._waiting[entry.path] = one = _WaitingClaim(entry)
            if not self.away:
                self._call(lambda: self._send(one))
        self._handled += 1

    def _call(self, step: Callable[[], None]) -> None:
        """Do a step, and have the next one wait where the broker cannot be used."""
        try:
            step()
            self._broker.server.report_available()
            self.away = False
            self._backoff.reset()
        except BrokerConnectionError:
            self.away = True
            self._next_try = self._backoff.retry_at(time.monotonic())
        except OSError as error:  # of the share; the scan raises the alarm
            logger.debug("waiting claims cannot be looked at: {}", error)
        except Exception as error:  # noqa: BLE001  the end of the thread's step
            logger.opt(exception=True).error("claims cannot be sent: {}", error)

    def _refresh(self) -> None:
        self._is_refreshing = False
        now = time.monotonic()
        again = self.again
        for one in [one for one in self._waiting.values() if one.due <= now]:
            if one.was_sent and not one.still_waits:
                del self._waiting[one.entry.path]
            else:
                self._send(one)
        if again < self.again:
            count = self.again - again
            logger.warning("{} claims waited without a message; they are sent again", count)
        self._length = self._broker.length(self._queue)
        if not self._length and now >= self._next_look:
            self._next_look = now + _LOOK_S
            self._drop_taken(lambda one: one.still_waits, empty=True)

    def _send(self, one: _WaitingClaim) -> None:
        self._broker.enqueue(self._make_message(one.entry))
        self._length += 1
        self.sent += 1
        if one.was_sent:
            self.again += 1
            one.pause_s = min(2 * one.pause_s, _LONGEST_PAUSE_S)
        one.was_sent, one.due = True, math.inf
        self._waiting[one.entry.path] = self._waiting.pop(one.entry.path)  # behind all others

    def _drop_taken(self, waits: Callable[[_WaitingClaim], bool], *, empty: bool) -> None:
        """Drop the claims that were taken; note which others have lost their messages."""
        now = time.monotonic()
        overtaken: list[_WaitingClaim] = []
        earlier: list[_WaitingClaim] = []
        for path, one in list(self._waiting.items()):
            if waits(one):
                earlier.append(one)
            else:
                del self._waiting[path]
                overtaken += earlier
                earlier = []
        for one in overtaken + (earlier if empty else []):
            if one.due == math.inf:
                one.due = now + one.pause_s
