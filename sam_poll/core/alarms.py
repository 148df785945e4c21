"""Conditions that keep the daemon from working, for the log, `status` and the metrics.

An alarm is not a job's fault: the share is not mounted, the disk is full, a loop has stopped. It is
raised on every failed attempt and cleared by the first success of the same operation. The log gets
a line when an alarm begins, changes or ends, not for each attempt.

Limitations: the code that raises an alarm must also clear it. An alarm whose operation is never
retried stays active.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace

from loguru import logger

KINDS = ("share", "read", "output", "path", "lease", "stuck", "redis", "rabbitmq")
REMEDIES = {
    "share": "mount the share; check its server and the owner of the folders",
    "read": "check dmesg and the disk; remove the picture if it is beyond repair",
    "output": "free disk space, mount the share writable, correct the owner of the folders",
    "path": "do what the alarm names; jobs of other folders are processed meanwhile",
    "lease": "mount the share; check its server and the owner of work/",
    "stuck": "check the file server (does `ls` hang?), the GPU (`nvidia-smi`) and dmesg",
    "redis": "start the Redis server; check the network and its passwords",
    "rabbitmq": "start the RabbitMQ server; check the network, its passwords and rights",
}
"""What to do about an alarm of each kind; docs/operations.md says more."""

_REMIND_S = 600.0


@dataclass(frozen=True, slots=True)
class Alarm:
    """An active alarm.

    `kind` is one of `KINDS`. `since` is the wall-clock time at which it began; `started`, and
    `logged`, when its last log line was written, are readings of the monotonic clock, in seconds.
    """

    kind: str
    message: str
    since: float
    started: float
    logged: float

    @property
    def seconds(self) -> float:
        """Seconds since the alarm began, by the monotonic clock."""
        return time.monotonic() - self.started


class Alarms:
    """The active alarms of an application, at most one of each kind. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active: dict[str, Alarm] = {}

    def raise_(self, kind: str, message: str) -> None:
        """Raise an alarm, or update its message.

        Logged when the alarm is new, when its message changes, and every ten minutes.
        """
        now = time.monotonic()
        with self._lock:
            known = self._active.get(kind)
            if known is None:
                self._active[kind] = Alarm(kind, message, time.time(), now, now)
            elif message != known.message or now - known.logged > _REMIND_S:
                self._active[kind] = replace(known, message=message, logged=now)
            else:
                return
        logger.bind(alarm=kind).error("alarm ({}): {}", kind, message)

    def clear(self, kind: str) -> None:
        """End the alarm of this kind.

        Does nothing when there is none, so it may be called after every success.
        """
        if kind not in self._active:
            return
        with self._lock:
            known = self._active.pop(kind, None)
        if known:
            logger.bind(alarm=kind).info(
                "alarm ({}) is over after {:.0f} s: {}", kind, known.seconds, known.message
            )

    def active(self) -> list[Alarm]:
        """Return the active alarms, oldest first."""
        with self._lock:
            return sorted(self._active.values(), key=lambda alarm: alarm.started)

    def __contains__(self, kind: str) -> bool:
        return kind in self._active
