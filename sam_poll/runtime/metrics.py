"""The daemon's metrics for Prometheus, read from the live counters at each scrape.

Imported only where `health.metrics` is set, because `prometheus_client` comes with the extra
`[metrics]`. Counters start at zero with the process, as Prometheus expects.

Limitations: every client that reaches the port can read the metrics. They hold no names of jobs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, get_args

from loguru import logger
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily as Counter
from prometheus_client.core import GaugeMetricFamily as Gauge
from prometheus_client.core import HistogramMetricFamily as Histogram
from prometheus_client.core import InfoMetricFamily as Info
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from sam_poll import __version__
from sam_poll.config.fields import port_error
from sam_poll.core.alarms import KINDS
from sam_poll.core.errors import InputError
from sam_poll.core.stats import BUCKETS_S, CacheEvent, Snapshot
from sam_poll.core.telemetry import Telemetry


class Share(Protocol):
    """State of a job source at its last scan."""

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


class MetricsCollector(Collector):
    """A `prometheus_client` collector of the daemon's and the share's metrics."""

    def __init__(self, telemetry: Telemetry, share: Share) -> None:
        self._telemetry = telemetry
        self._share = share

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics as they are now.

        Rates and alert rules need series that start at 0, so every known reason is there from the
        first scrape on.
        """
        now = self._telemetry.stats.now()
        share = self._share
        yield _jobs(now)
        yield _durations(now)
        yield Gauge(
            "sam_poll_jobs_in_progress",
            "Jobs claimed by this daemon and not ended",
            value=now.at_work,
        )
        yield Gauge(
            "sam_poll_pending_jobs",
            "Files in the input folder at the last scan; a pair is two",
            value=share.waiting,
        )
        yield Gauge(
            "sam_poll_oldest_pending_seconds",
            "Time for which this daemon has seen the oldest waiting file",
            value=share.oldest_s,
        )
        yield Gauge(
            "sam_poll_last_scan_timestamp_seconds",
            "Time of the last complete scan of the input folder; 0 before the first",
            value=share.last_scan,
        )
        yield Counter(
            "sam_poll_claims_recovered",
            "Jobs taken over from daemons that ended",
            value=share.recovered,
        )
        yield Counter(
            "sam_poll_gpu_oom",
            "Times the device ran out of memory; the job is retried a step lower",
            value=self._telemetry.ooms,
        )
        yield _disk_cache(now)
        yield Gauge(
            "sam_poll_orphans",
            "Entries in the work folder that no daemon works on, at the last scan",
            value=share.orphans,
        )
        yield self._alarms()
        yield self._info()

    def _alarms(self) -> Metric:
        gauge = Gauge("sam_poll_alarm", "1 while the alarm is active, else 0", labels=["kind"])
        active = {alarm.kind for alarm in self._telemetry.alarms.active()}
        for kind in dict.fromkeys([*KINDS, *sorted(active)]):
            gauge.add_metric([kind], kind in active)
        return gauge

    def _info(self) -> Metric:
        info = self._telemetry.info
        model = {"model": info.name if info else "", "device": info.device if info else ""}
        return Info(
            "sam_poll",
            "Version, model and device; model and device are empty while the model is loaded",
            value={"version": __version__, **model},
        )


def _jobs(now: Snapshot) -> Metric:
    counter = Counter(
        "sam_poll_jobs",
        "Jobs by how they ended, rejected ones by the error's code",
        labels=["result", "reason"],
    )
    counter.add_metric(["answered", ""], now.answered)
    for code, count in {**dict.fromkeys(_rejection_codes(), 0), **now.reasons}.items():
        counter.add_metric(["rejected", code], count)
    for code, count in {"": 0, **now.released}.items():
        counter.add_metric(["released", code], count)
    return counter


def _disk_cache(now: Snapshot) -> Metric:
    counter = Counter(
        "sam_poll_disk_cache", "Events of the embeddings on the disk", labels=["event"]
    )
    for event, count in {**dict.fromkeys(get_args(CacheEvent), 0), **now.disk_cache}.items():
        counter.add_metric([event], count)
    return counter


def _rejection_codes() -> list[str]:
    kinds = [InputError]
    for kind in kinds:  # the list grows while it is walked: subclasses of subclasses
        kinds.extend(kind.__subclasses__())
    return sorted({kind.code for kind in kinds})


def _durations(now: Snapshot) -> Metric:
    bounds = [*map(str, BUCKETS_S), "+Inf"]
    buckets = list(zip(bounds, itertools.accumulate(now.durations), strict=True))
    return Histogram(
        "sam_poll_job_duration_seconds",
        "Time from claim to answer, of answered jobs",
        buckets=buckets,
        sum_value=now.duration_s,
    )


@contextmanager
def serve(
    address: str, telemetry: Telemetry, share: Share, more: Sequence[Collector] = ()
) -> Iterator[None]:
    """Answer Prometheus at `host:port` while entered, with `more` metrics beside the daemon's.

    Raises SettingsError if the port cannot be opened.
    """
    host, _, port = address.rpartition(":")
    registry = CollectorRegistry(auto_describe=False)
    for collector in (MetricsCollector(telemetry, share), *more):
        registry.register(collector)
    try:
        server, thread = start_http_server(int(port), host.strip("[]"), registry)
    except (OSError, UnicodeError) as error:
        raise port_error(address, error, "health.metrics") from error
    logger.info("metrics at http://{}/metrics", address)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
