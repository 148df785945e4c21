"""What keeps the daemon from working right now, for the log, `status` and the metrics.

An alarm is not a job's fault: the share is away, the disk is full, a loop has stopped moving. It is raised when the
trouble is met, again and again, and cleared when the same thing has worked; the log hears of the change, not of each
try.

What can still go wrong here: who raises an alarm must also be who clears it; a kind that nobody tries again stays.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace

from loguru import logger

KINDS = ("share", "read", "output", "path", "lease", "stuck", "redis")
_REMIND_S = 600.0


@dataclass(frozen=True, slots=True)
class Alarm:
    """`kind`, one of `KINDS`, says who clears it. `since` is wall-clock time."""

    kind: str
    message: str
    since: float
    started: float
    told: float

    @property
    def seconds(self) -> float:
        """How long it has lasted, by the monotonic clock."""
        return time.monotonic() - self.started


class Alarms:
    """Thread-safe; one an application."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active: dict[str, Alarm] = {}

    def raise_(self, kind: str, message: str) -> None:
        """There is trouble. Logged when it is new, says something else, or has lasted another ten minutes."""
        now = time.monotonic()
        with self._lock:
            known = self._active.get(kind)
            if known is None:
                self._active[kind] = Alarm(kind, message, time.time(), now, now)
            elif message != known.message or now - known.told > _REMIND_S:
                self._active[kind] = replace(known, message=message, told=now)
            else:
                return
        logger.bind(alarm=kind).error("alarm ({}): {}", kind, message)

    def clear(self, kind: str) -> None:
        """It has worked. Without such an alarm nothing happens, so it may be called after every success."""
        if kind not in self._active:
            return
        with self._lock:
            known = self._active.pop(kind, None)
        if known:
            logger.bind(alarm=kind).info("alarm ({}) is over after {:.0f} s: {}", kind, known.seconds, known.message)

    def active(self) -> list[Alarm]:
        """All of now, the oldest first."""
        with self._lock:
            return sorted(self._active.values(), key=lambda alarm: alarm.started)

    def __contains__(self, kind: str) -> bool:
        return kind in self._active
