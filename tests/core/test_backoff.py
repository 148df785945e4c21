"""Delays between attempts grow up to a maximum, and start again after a success."""

from __future__ import annotations

import threading

from sam_poll.core.backoff import Backoff


def test_backoff_doubles_up_to_the_longest_delay() -> None:
    backoff = Backoff(first_s=0.5, longest_s=3.0)
    assert [backoff.next_s() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_backoff_starts_again_after_a_success() -> None:
    backoff = Backoff(first_s=0.5, longest_s=3.0)
    backoff.next_s()
    backoff.next_s()
    backoff.reset()
    assert backoff.next_s() == 0.5


def test_backoff_gives_the_time_of_the_next_attempt_by_the_callers_clock() -> None:
    backoff = Backoff(first_s=2.0, longest_s=60.0)
    assert [backoff.retry_at(now) for now in (100.0, 102.0, 106.0)] == [102.0, 106.0, 114.0]


def test_backoff_does_not_wait_once_stop_is_set() -> None:
    stop = threading.Event()
    stop.set()
    backoff = Backoff(first_s=3600.0, longest_s=7200.0)
    backoff.wait(stop)
    assert backoff.next_s() == 7200.0
