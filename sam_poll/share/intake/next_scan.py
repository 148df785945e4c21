"""When the next scan is due."""

from __future__ import annotations


class NextScan:
    """The time of the next scan at the latest, by the monotonic clock. Used by one thread.

    All parts of a scanner share it: each notes the time at which its own wait ends. `once`: the
    share is only drained, so that the end of a wait is no reason to scan again.
    """

    __slots__ = ("_once", "due")

    def __init__(self, *, once: bool = False) -> None:
        self._once = once
        self.due = 0.0

    def no_later_than(self, due: float) -> None:
        """Scan again at this time at the latest."""
        self.due = min(self.due, due)

    def at_once(self) -> None:
        """Scan again as soon as possible."""
        self.due = 0.0

    def is_over(self, limit_s: float, waited_s: float, now: float) -> bool:
        """Return whether a wait is over; if not, the next scan is due at its end."""
        if waited_s < limit_s and not self._once:
            self.no_later_than(now + limit_s - waited_s)
        return waited_s >= limit_s
