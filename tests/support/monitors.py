"""A health monitor whose heartbeats have the ages that a test sets."""

from __future__ import annotations

import threading
from typing import Any

from sam_poll.core.stats import LoopHeartbeat
from sam_poll.core.telemetry import Telemetry
from sam_poll.runtime.health import Monitor


class Frozen(LoopHeartbeat):
    """A loop that has not moved for `age` seconds."""

    def __init__(self, age: float = 0.0) -> None:
        self.frozen = age

    def beat(self, ago: float = 0.0) -> None:
        self.frozen = ago

    @property
    def age(self) -> float:
        return self.frozen


def monitor(telemetry: Telemetry, stop: threading.Event | None = None, **more: Any) -> Monitor:
    telemetry.intake = Frozen()
    telemetry.device = Frozen()
    made = Monitor(telemetry, stop or threading.Event(), stuck_s=300.0, **more)
    made._jobs = Frozen()
    return made
