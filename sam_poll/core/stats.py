"""Counters and timings of a run, for the progress display, log, exit codes, metrics and `status`.

The numbers are those of this process only, and start at zero with it.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

_RECENT_S = 30.0
# Upper bounds of the duration histogram, seconds: from a small network on a GPU to a large one on
# one core.
BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

CacheEvent: TypeAlias = Literal["hit", "miss", "damaged", "written", "removed", "failed"]
"""What happens to embeddings on the disk: `removed` to make room, `failed`: an I/O error."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The counters at one moment.

    `rate` is answered jobs/s over the last 30 s; `stage_ms` are means over all jobs. `reasons` and
    `released` count by error code ("" where a job was requeued without one). `durations` is a
    histogram of the answered jobs by `BUCKETS_S`, not cumulative, with one more bucket for longer
    ones; `duration_s` is their sum. `at_work` is the number of jobs in progress, `advances` the
    number of pieces of tiled jobs done so far. `disk_cache` counts by `CacheEvent`.
    """

    answered: int
    rejected: int
    objects: int
    at_work: int
    reasons: dict[str, int]
    rate: float
    elapsed_s: float
    stage_ms: dict[str, float]
    last: str
    released: dict[str, int] = field(default_factory=dict)
    durations: tuple[int, ...] = (0,) * (len(BUCKETS_S) + 1)
    duration_s: float = 0.0
    advances: int = 0
    disk_cache: dict[str, int] = field(default_factory=dict)


class LoopHeartbeat:
    """The heartbeat of a loop: `beat` is called on every turn; monitors read its `age`."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def beat(self, ago: float = 0.0) -> None:
        """Record that the loop has turned, now or some seconds `ago`."""
        self._last = time.monotonic() - ago

    @property
    def age(self) -> float:
        """Seconds since the last beat."""
        return time.monotonic() - self._last


class Stats:
    """The counters of a run. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._answered = self._rejected = self._objects = self._at_work = self._advances = 0
        self._reasons: Counter[str] = Counter()
        self._released: Counter[str] = Counter()
        self._disk_cache: Counter[str] = Counter()
        self._durations = [0] * (len(BUCKETS_S) + 1)
        self._duration_s = 0.0
        self._stages: dict[str, float] = {}
        self._recent: deque[float] = deque(maxlen=10_000)
        self._last = ""

    def started(self) -> None:
        """Count a new job."""
        with self._lock:
            self._at_work += 1

    def answered(self, job_id: str, objects: int, timings: Mapping[str, float]) -> None:
        """Count a delivered result; `timings` are milliseconds by stage, `total` among them."""
        seconds = timings.get("total", 0.0) / 1000
        with self._lock:
            self._durations[bisect_left(BUCKETS_S, seconds)] += 1
            self._duration_s += seconds
            self._at_work -= 1
            self._answered += 1
            self._objects += objects
            for stage, ms in timings.items():
                self._stages[stage] = self._stages.get(stage, 0.0) + ms
            self._recent.append(time.monotonic())
            self._last = job_id

    def rejected(self, job_id: str, code: str) -> None:
        """Count a rejected job; `code` is the error's (`prompt`, `picture` …)."""
        with self._lock:
            self._at_work -= 1
            self._rejected += 1
            self._reasons[code] += 1
            self._last = job_id

    def released(self, code: str = "") -> None:
        """Count a requeued job; `code` is that of the error it was requeued for, if any."""
        with self._lock:
            self._at_work -= 1
            self._released[code] += 1

    def cached(self, event: CacheEvent, count: int = 1) -> None:
        """Count events of the disk cache."""
        with self._lock:
            self._disk_cache[event] += count

    def progressed(self) -> None:
        """Count a finished piece of a tiled job."""
        with self._lock:
            self._advances += 1

    def now(self) -> Snapshot:
        """Return all counters, consistent with each other."""
        with self._lock:
            moment = time.monotonic()
            while self._recent and self._recent[0] < moment - _RECENT_S:
                self._recent.popleft()
            elapsed = moment - self._started
            return Snapshot(
                answered=self._answered,
                rejected=self._rejected,
                objects=self._objects,
                at_work=self._at_work,
                reasons=dict(self._reasons),
                rate=len(self._recent) / max(1e-9, min(_RECENT_S, elapsed)),
                elapsed_s=elapsed,
                stage_ms={k: v / max(1, self._answered) for k, v in self._stages.items()},
                last=self._last,
                released=dict(self._released),
                durations=tuple(self._durations),
                duration_s=self._duration_s,
                advances=self._advances,
                disk_cache=dict(self._disk_cache),
            )
