"""Growing delays between attempts at something that fails for a while: a server, a network share.

`Backoff` reads no clock and starts no thread. Callers wait with `wait`, or pass in the current time
and get the time of the next attempt from `retry_at`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

FIRST_S, LONGEST_S = 0.5, 30.0


@dataclass(slots=True)
class Backoff:
    """Delays in seconds that double from `first_s` to `longest_s`. `reset` starts them again.

    Not thread-safe: each thread that retries has its own.
    """

    first_s: float = FIRST_S
    longest_s: float = LONGEST_S
    _next_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._next_s = self.first_s

    def next_s(self) -> float:
        """Return the delay before the next attempt in seconds; the one after it is twice that."""
        delay_s = self._next_s
        self._next_s = min(2 * delay_s, self.longest_s)
        return delay_s

    def retry_at(self, now: float) -> float:
        """Return the time of the next attempt, for callers that do other work meanwhile.

        `now` is the current time in seconds by any clock; the result is by the same clock.
        """
        return now + self.next_s()

    def wait(self, stop: threading.Event) -> None:
        """Wait for the next delay; return early when `stop` is set."""
        stop.wait(self.next_s())

    def reset(self) -> None:
        """Start again with the first delay, after a successful attempt."""
        self._next_s = self.first_s
