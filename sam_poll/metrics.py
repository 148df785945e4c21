"""The numbers for Prometheus, read at the moment of each scrape; nothing is counted twice, nothing waits on it.

Imported only where `health.metrics` is set, because `prometheus_client` comes with the extra `[metrics]`.

What can still go wrong here: counters start at zero with the process, as Prometheus expects; whoever reaches the port
can read them (they hold no names of jobs).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from loguru import logger
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily as Counter
from prometheus_client.core import GaugeMetricFamily as Gauge
from prometheus_client.core import HistogramMetricFamily as Histogram
from prometheus_client.core import InfoMetricFamily as Info
from prometheus_client.core import Metric

from sam_poll import __version__
from sam_poll.alarms import KINDS
from sam_poll.errors import InputError, SettingsError
from sam_poll.health import Signs
from sam_poll.stats import BUCKETS_S, Snapshot


class Share(Protocol):
    """What the folder door knows of its share, by its last scan."""

    @property
    def waiting(self) -> int: ...
    @property
    def oldest_s(self) -> float: ...
    @property
    def last_scan(self) -> float: ...
    @property
    def orphans(self) -> int: ...
    @property
    def recovered(self) -> int: ...


class Numbers:
    """A collector for `prometheus_client`: the daemon's and the share's numbers at the moment of the scrape."""

    def __init__(self, signs: Signs, share: Share) -> None:
        self._signs, self._share = signs, share

    def collect(self) -> Iterator[Metric]:
        """All of them. Rates and alert rules need series that start at 0, so all known reasons are there at once."""
        now, share = self._signs.stats.now(), self._share
        yield _jobs(now)
        yield _durations(now)
        yield Gauge("sam_poll_jobs_in_progress", "Jobs claimed and not yet answered", value=now.at_work)
        yield Gauge("sam_poll_pending_jobs", "Files that wait in the input folder", value=share.waiting)
        yield Gauge("sam_poll_oldest_pending_seconds", "How long the oldest of them has waited", value=share.oldest_s)
        yield Gauge(
            "sam_poll_last_scan_timestamp_seconds", "When the input folder was last read whole", value=share.last_scan
        )
        yield Counter("sam_poll_claims_recovered", "Jobs taken over from daemons that died", value=share.recovered)
        yield Counter("sam_poll_gpu_oom", "How often the device's memory was not enough", value=self._signs.ooms)
        yield Gauge("sam_poll_orphans", "Things in the work folder that nobody works on", value=share.orphans)
        yield self._alarms()
        yield self._info()

    def _alarms(self) -> Metric:
        made = Gauge("sam_poll_alarm", "1 while the alarm is active", labels=["kind"])
        active = {alarm.kind for alarm in self._signs.alarms.active()}
        for kind in dict.fromkeys([*KINDS, *sorted(active)]):
            made.add_metric([kind], kind in active)
        return made

    def _info(self) -> Metric:
        info = self._signs.info
        named = {"model": info.name if info else "", "device": info.device if info else ""}
        return Info(
            "sam_poll",
            "What answers; model and device are empty while loading",
            value={"version": __version__, **named},
        )


def _jobs(now: Snapshot) -> Metric:
    made = Counter("sam_poll_jobs", "Jobs by how they ended", labels=["result", "reason"])
    made.add_metric(["answered", ""], now.answered)
    for code, count in {**dict.fromkeys(_codes(), 0), **now.reasons}.items():
        made.add_metric(["rejected", code], count)
    for code, count in {"": 0, **now.released}.items():
        made.add_metric(["released", code], count)
    return made


def _codes() -> list[str]:
    kinds = [InputError]
    for kind in kinds:  # grows while it is walked: errors of errors
        kinds.extend(kind.__subclasses__())
    return sorted({kind.code for kind in kinds})


def _durations(now: Snapshot) -> Metric:
    bounds = [*map(str, BUCKETS_S), "+Inf"]
    buckets = list(zip(bounds, itertools.accumulate(now.durations), strict=True))
    return Histogram(
        "sam_poll_job_duration_seconds",
        "From claim to answer, of answered jobs",
        buckets=buckets,
        sum_value=now.duration_s,
    )


@contextmanager
def serve(address: str, signs: Signs, share: Share) -> Iterator[None]:
    """Answer Prometheus at `host:port`. SettingsError: the port cannot be had."""
    host, _, port = address.rpartition(":")
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Numbers(signs, share))
    try:
        server, thread = start_http_server(int(port), host.strip("[]"), registry)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SettingsError(
            f"no port can be opened at {address}: {reason}",
            place="health.metrics",
            remedy="give each daemon of this machine a port of its own; `ss -ltnp` names who has it",
        ) from error
    logger.info("metrics at http://{}/metrics", address)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
