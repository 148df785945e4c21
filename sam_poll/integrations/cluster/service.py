"""`sam-poll cluster watch` and `sam-poll cluster worker`: one share, workers on many machines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from typing import Any

import dramatiq
from loguru import logger

from sam_poll.config.settings import Settings
from sam_poll.core.errors import ExitCode
from sam_poll.integrations import message_broker
from sam_poll.integrations.cluster.dispatcher import ClusterDispatcher
from sam_poll.integrations.cluster.engine import EngineMiddleware, limits
from sam_poll.integrations.cluster.messages import fault_of, queue_names
from sam_poll.integrations.cluster.worker import ClusterWorkerSource
from sam_poll.integrations.message_broker import CheckedBroker
from sam_poll.integrations.server import ServerUrl
from sam_poll.runtime import builders, console, daemon, signals
from sam_poll.runtime.service import Service

_POLL_MS = 250  # longest pause between two looks into an empty queue on Redis
_THREADS = 32  # for each device: more calls than a pipeline has jobs in progress


def _common(settings: Settings) -> dict[str, Any]:
    """Return the settings that must be the same for dispatchers and workers."""
    names = ("lease_s", "attempts", "missing_prompt")
    return {name: getattr(settings, name) for name in names}


def worker(settings: Settings, address: ServerUrl) -> ExitCode:
    """Run the jobs that a dispatcher queues, until a signal comes."""
    service = Service(settings, live_display=True)
    console.forward_log("dramatiq", "pika")
    with service.lifetime() as stop, closing(make_broker(settings, address, service)) as broker:
        broker.emit_after("process_boot")
        threads = _THREADS * len(builders.devices_of(settings))
        workers = dramatiq.Worker(broker, worker_timeout=_POLL_MS, worker_threads=threads)
        workers.start()
        stop.wait()
        workers.stop(timeout=int(signals.LAST_RESORT_S * 1000))
    return ExitCode.OK


def make_broker(
    settings: Settings,
    address: ServerUrl,
    service: Service,
    on_failure: Callable[[], None] = lambda: None,
) -> CheckedBroker:
    """Return a broker whose workers run the jobs of the share that the settings name.

    `on_failure`: see `EngineMiddleware`. Raises SettingsError, or ShareError where the server is
    unreachable.
    """
    counters = message_broker.counters() if settings.health.metrics else []
    broker = _connect(settings, address, service, [*counters, *limits()])
    source = ClusterWorkerSource(
        builders.layout_of(settings),
        builders.folder_options_of(settings, once=False),
        **_telemetry_of(service),
    )

    def run(on_ready: Callable[[int], None]) -> None:
        daemon.answer_share(
            service,
            settings,
            source,
            f"queue at {address.shown}",
            metrics=[one for made in counters for one in made.metrics],
            on_ready=lambda workers: on_ready(workers.capacity),
        )
        service.log_end()

    broker.add_middleware(
        EngineMiddleware(
            broker, source, run, service.stop, settings=_common(settings), on_failure=on_failure
        )
    )
    return broker


def watch(settings: Settings, address: ServerUrl, *, ahead: int, first: Sequence[str]) -> ExitCode:
    """Claim what is dropped and queue it for the workers, until a signal comes."""
    service = Service(settings)
    console.forward_log("dramatiq", "pika")
    telemetry = service.telemetry
    telemetry.device = telemetry.intake  # one loop does both
    options = builders.folder_options_of(settings, once=False)

    def summary() -> str:
        alarms = [console.alarm_line(alarm) for alarm in telemetry.alarms.active()]
        return "; ".join([dispatch_summary(source), *alarms])

    with service.lifetime() as stop, closing(_connect(settings, address, service)) as broker:
        source = ClusterDispatcher(
            builders.layout_of(settings),
            options,
            broker,
            ahead,
            first,
            settings=_common(settings),
            **_telemetry_of(service),
        )
        with source, service.metrics(source):
            found_by = "events" if options.mode == "events" else "polling"
            at = address.shown
            logger.info("watching {} ({}) for the workers at {}", source.layout.input, found_by, at)
            queues = queue_names(broker.prefix, source.share).values()
            logger.info("queues: {}", ", ".join(map(broker.name_on_server, queues)))
            with service.monitored(lambda: source.waiting, summary):
                source.run(stop)
            logger.info("stopped: {}", dispatch_summary(source))
    return ExitCode.OK


def _connect(
    settings: Settings,
    address: ServerUrl,
    service: Service,
    middleware: Iterable[dramatiq.Middleware] = (),
) -> CheckedBroker:
    """Return the broker. Raises SettingsError or ShareError where it cannot be used."""
    broker = message_broker.connect(
        address,
        service.telemetry.alarms,
        settings.lease_s,
        fault_of=fault_of,
        middleware=middleware,
    )
    broker.server.prove()
    return broker


def _telemetry_of(service: Service) -> dict[str, Any]:
    """Return what a source reports to."""
    telemetry = service.telemetry
    return {"alarms": telemetry.alarms, "pulse": telemetry.intake, "state": telemetry.state}


def dispatch_summary(source: ClusterDispatcher) -> str:
    """Return how many claims were handed out, how many wait, and how many files are not claimed.

    `300 claims handed out (2 again), 12 wait for a worker, 40 files not claimed`.
    """
    boxes = source.outboxes.values()
    times, waiting = sum(box.again for box in boxes), sum(map(len, boxes))
    again = f" ({times} again)" if times else ""
    sent = console.count(sum(box.sent for box in boxes) - times, "claim")
    left = console.count(source.waiting, "file")
    return f"{sent} handed out{again}, {waiting} wait for a worker, {left} not claimed"
