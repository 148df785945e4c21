"""Counts and timings of a run: what the progress display, the log's last line, `--once`'s exit code, the metrics and
`status` read.

What can still go wrong here: nothing waits on these numbers; they are of this process only, and start at zero with it.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

_RECENT_S = 30.0
# Upper bounds of the duration histogram, seconds: from a small network on a GPU to a large one on one core.
BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The numbers at one moment. `rate` is answered jobs/s over the last 30 s; `stage_ms` are means over all jobs.

    `reasons` and `released` count by the error's code ("" where a job went back without one). `durations` are answered
    jobs by `BUCKETS_S`, each bucket for itself, with one more for what took longer; `duration_s` is their sum.
    `advances` are steps of long jobs that are at work.
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


class Pulse:
    """A loop's sign of life: it beats on every turn, and whoever watches looks at the age of the last beat."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def beat(self, ago: float = 0.0) -> None:
        """The loop has moved, now or some seconds `ago`."""
        self._last = time.monotonic() - ago

    @property
    def age(self) -> float:
        """Seconds since it moved last."""
        return time.monotonic() - self._last


class Stats:
    """Thread-safe counters."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._answered = self._rejected = self._objects = self._at_work = self._advances = 0
        self._reasons: Counter[str] = Counter()
        self._released: Counter[str] = Counter()
        self._durations = [0] * (len(BUCKETS_S) + 1)
        self._duration_s = 0.0
        self._stages: dict[str, float] = {}
        self._recent: deque[float] = deque(maxlen=10_000)
        self._last = ""

    def took(self) -> None:
        """A job has come in."""
        with self._lock:
            self._at_work += 1

    def answered(self, job_id: str, objects: int, timings: Mapping[str, float]) -> None:
        """A job's answer is delivered; `timings` are milliseconds by stage, `total` among them."""
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
        """A job is rejected; `code` is the error's (`prompt`, `picture` …)."""
        with self._lock:
            self._at_work -= 1
            self._rejected += 1
            self._reasons[code] += 1
            self._last = job_id

    def released(self, code: str = "") -> None:
        """A job went back unanswered; `code` is that of the error it went back for, if there is one."""
        with self._lock:
            self._at_work -= 1
            self._released[code] += 1

    def advanced(self) -> None:
        """A long job at work has come a step further."""
        with self._lock:
            self._advances += 1

    def now(self) -> Snapshot:
        """All numbers, consistent with each other."""
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
            )
