"""The claims that wait in a queue: which of them have lost their messages, without a broker."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from dramatiq.errors import ConnectionClosed

from sam_poll.core.alarms import Alarms
from sam_poll.integrations.cluster import outbox
from sam_poll.integrations.cluster.outbox import Outbox
from sam_poll.share.claims.model import Claim, ClaimState
from tests.conftest import Share

WATCHER = "dispatcher-box-1-abc-def"


@dataclass
class Broker:
    """A queue in memory, in the place of a server and its broker."""

    queue: list[str] = field(default_factory=list)
    away: bool = False
    alarms: Alarms = field(default_factory=Alarms)

    @property
    def server(self) -> Broker:
        return self

    def enqueue(self, message: str) -> None:
        if self.away:
            raise ConnectionClosed("away")
        self.queue.append(message)

    def length(self, queue: str) -> int:
        if self.away:
            raise ConnectionClosed("away")
        return len(self.queue)

    def report_available(self) -> None:
        pass


class Clock:
    now = 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(outbox, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def claim(share: Share, name: str) -> Claim:
    made = Claim("", share.layout.work / f".{name}", ClaimState(1, WATCHER, attempt=0, prompts=1))
    (share.work / f".{name}" / str(made.hold)).mkdir(parents=True)
    return made


def take(share: Share, one: Claim) -> None:
    """What a worker does with a claim."""
    outer = share.work / one.outer.name
    (outer / str(one.hold)).rename(outer / "g2.a1.n1@box-2-abc-def")


def outbox_of(broker: Any, ahead: int = 8) -> Outbox:
    return Outbox(broker, "q", ahead, lambda entry: entry.outer.name, run_at_once)


def run_at_once(step: Any, *arguments: Any, **named: Any) -> None:
    step(*arguments, **named)


def test_claim_that_a_later_one_has_overtaken_is_sent_again_though_the_queue_is_never_empty(
    share: Share, clock: Clock
) -> None:
    broker = Broker()
    box = outbox_of(broker)
    claims = [claim(share, name) for name in "abcd"]
    for one in claims:
        box.add(one)
    broker.queue = [".c", ".d"]  # a's message is lost, b was fetched
    take(share, claims[1])
    for _ in range(3):
        box.keep_only({one.path for one in claims if one is not claims[1]})
        box.refresh()
        assert (box.sent, box.again) == (4, 0)
        clock.now += 0.9
    box.refresh()
    assert (box.sent, box.again, broker.queue) == (5, 1, [".c", ".d", ".a"])


def test_claims_of_a_long_queue_are_not_sent_again_however_long_they_wait(
    share: Share, clock: Clock
) -> None:
    broker = Broker()
    box = outbox_of(broker)
    claims = [claim(share, name) for name in "abcd"]
    for one in claims:
        box.add(one)
    for _ in range(50):
        clock.now += 10
        box.keep_only({one.path for one in claims})
        box.refresh()
    assert (box.sent, len(box)) == (4, 4)


def test_claims_of_an_empty_queue_are_sent_again_with_growing_pauses(
    share: Share, clock: Clock
) -> None:
    broker = Broker()
    box = outbox_of(broker)
    box.add(claim(share, "a"))
    sent = []
    for _ in range(2000):
        clock.now += 0.25
        broker.queue.clear()
        before = box.sent
        box.refresh()
        if box.sent > before:
            sent.append(clock.now)
    pauses = [later - earlier for earlier, later in pairwise(sent)]
    assert 2.0 <= sent[0] - 100 <= 5.0
    assert pauses == sorted(pauses)
    assert pauses[-1] <= 63


def test_claim_that_was_taken_meanwhile_is_not_sent_again(share: Share, clock: Clock) -> None:
    broker = Broker()
    box = outbox_of(broker)
    one = claim(share, "a")
    box.add(one)
    broker.queue.clear()
    clock.now += 3
    box.refresh()
    take(share, one)
    clock.now += 3
    box.refresh()
    assert (box.sent, len(box)) == (1, 0)


def test_unreachable_broker_gets_all_claims_later_and_no_new_ones(
    share: Share, clock: Clock
) -> None:
    broker = Broker(away=True)
    box = outbox_of(broker)
    box.add(claim(share, "a"))
    assert box.is_full
    broker.away = False
    box.refresh()
    assert broker.queue == []  # not before the pause is over
    clock.now += 1
    box.refresh()
    assert broker.queue == [".a"]
    assert not box.is_full


def test_broker_that_was_away_for_long_gets_the_claims_seconds_after_it_is_back(
    share: Share, clock: Clock
) -> None:
    broker = Broker(away=True)
    box = outbox_of(broker)
    box.add(claim(share, "a"))
    for _ in range(200):
        clock.now += 1
        box.refresh()
    broker.away = False
    clock.now += 3
    box.refresh()
    assert broker.queue == [".a"]


def test_claims_of_dead_workers_find_room_in_a_full_queue_up_to_twice_its_size(
    share: Share, clock: Clock
) -> None:
    broker = Broker()
    box = outbox_of(broker, ahead=2)
    for name in "abc":
        box.add(claim(share, name))
        assert box.has_reserve
    assert box.is_full
    box.add(claim(share, "d"))
    assert not box.has_reserve


def test_full_queue_has_room_when_a_quarter_was_fetched(share: Share, clock: Clock) -> None:
    broker = Broker()
    box = outbox_of(broker, ahead=4)
    for name in "abcd":
        box.add(claim(share, name))
    assert box.is_full
    broker.queue.pop()
    box.refresh()
    assert not box.is_full
    assert box.has_room


def test_claim_is_sent_once_however_many_jobs_it_has(share: Share, clock: Clock) -> None:
    broker = Broker()
    box = outbox_of(broker)
    one = claim(share, "a")
    for _ in range(3):
        box.add(one)
    assert broker.queue == [".a"]
