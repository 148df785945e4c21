"""The next entry of a stream's worker: a lost delivery, a dead worker's entry, a new one."""

from __future__ import annotations

from typing import Any, cast

from sam_poll.integrations.redis.consumer_group import ConsumerGroup, Delivery, PendingEntry
from sam_poll.integrations.redis.entry_reader import EntryReader
from sam_poll.integrations.redis.held_entries import HeldEntries, HeldEntry
from sam_poll.integrations.redis.messages import RedisRequest

LEASE_MS = 8000


class FakeGroup:
    """What the reader uses of a consumer group. `looks`: number of searches for idle entries."""

    def __init__(self) -> None:
        self.new: list[str] = []
        self.idle: list[PendingEntry] = []
        self.own: list[PendingEntry] = []
        self.looks = 0

    def read_new(self, block_s: float) -> Delivery | None:
        return Delivery(self.new.pop(0), 1, {}) if self.new else None

    def idle_pending(self, count: int, idle_ms: int) -> list[PendingEntry]:
        self.looks += 1
        found, self.idle = self.idle, []
        return found

    def claim(self, entry: PendingEntry, idle_ms: int) -> Delivery | None:
        return Delivery(entry.entry_id, entry.deliveries + 1, {})

    def own_pending(self) -> list[PendingEntry]:
        return self.own

    def read_own(self, entry_id: str) -> Delivery | None:
        self.own = [entry for entry in self.own if entry.entry_id != entry_id]
        return Delivery(entry_id, 1, {})


class Setup:
    """A reader with a fake group and a clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0
        self.group = FakeGroup()
        self.held = HeldEntries()
        group: Any = self.group
        self.reader = EntryReader(
            cast(ConsumerGroup, group), self.held, LEASE_MS, clock=lambda: self.now
        )

    def next_id(self) -> str | None:
        delivery = self.reader.next()
        return delivery.entry_id if delivery else None


def test_reader_takes_dead_workers_entries_before_new_ones() -> None:
    setup = Setup()
    setup.group.new = ["new"]
    setup.group.idle = [PendingEntry("dead", 2), PendingEntry("requeued", 0)]
    assert [setup.next_id() for _ in range(4)] == ["dead", "requeued", "new", None]
    assert setup.reader.recovered == 1  # a requeued entry ended no worker


def test_reader_looks_for_idle_entries_a_quarter_of_a_lease_later_or_soon_after_a_requeue() -> None:
    setup = Setup()
    setup.next_id()
    setup.now += LEASE_MS / 4000 - 0.1
    setup.next_id()
    assert setup.group.looks == 1
    setup.reader.check_soon()
    setup.next_id()
    assert setup.group.looks == 2
    setup.now += LEASE_MS / 4000
    setup.next_id()
    assert setup.group.looks == 3


def test_reader_takes_the_entry_of_a_lost_reply_with_the_attempt_it_had() -> None:
    setup = Setup()
    setup.held.add(HeldEntry("held", 1, RedisRequest()))
    setup.group.own = [PendingEntry("held", 1), PendingEntry("lost", 3)]
    assert setup.next_id() is None
    setup.reader.connection_failed()
    assert setup.reader.next() == Delivery("lost", 3, {})
    assert setup.next_id() is None


def test_reader_takes_nothing_over_for_half_a_lease_after_a_broken_connection() -> None:
    setup = Setup()
    setup.reader.connection_failed()
    setup.group.idle = [PendingEntry("dead", 1)]
    setup.now += LEASE_MS / 2000 - 0.1
    assert setup.next_id() is None
    setup.now += 0.1
    assert setup.next_id() == "dead"


def test_reader_skips_idle_entries_that_this_worker_holds() -> None:
    setup = Setup()
    setup.held.add(HeldEntry("held", 1, RedisRequest()))
    setup.group.idle = [PendingEntry("held", 1), PendingEntry("dead", 1)]
    assert setup.next_id() == "dead"
