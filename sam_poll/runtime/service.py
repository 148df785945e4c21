"""The life cycle of every long-running command: `watch`, `redis`, `cluster …`, `serve`.

    service = Service(settings)                          log, telemetry, systemd
    source = …                                           cheap mistakes are reported first
    with service.lifetime() as stop, source, service.metrics(source):
        service.notify_loading()
        service.answer(source, …)                        workers, monitor, status; jobs
        service.log_end()

Signals set an event and nothing else; a second one ends the process at once. Unfinished jobs are
recovered by the next start, or by another daemon.

Limitations: a thread that hangs in a driver or on a share cannot be ended. The process then exits
`LAST_RESORT_S` after the signal without it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, TypeAlias

from loguru import logger
from rich.console import Console

from sam_poll.config.settings import Settings
from sam_poll.core.errors import SettingsError
from sam_poll.core.protocols import JobSource
from sam_poll.core.telemetry import Telemetry
from sam_poll.core.types import Result
from sam_poll.pipeline.pipeline import Pipeline
from sam_poll.pipeline.worker_pool import WorkerPool
from sam_poll.runtime import builders, console, signals
from sam_poll.runtime.builders import FormatsFactory, formats_of
from sam_poll.runtime.health import Monitor, SystemdNotifier

Workers: TypeAlias = Pipeline | WorkerPool


class WaitingSource(JobSource, Protocol):
    """A job source that knows how many jobs wait."""

    @property
    def waiting(self) -> int: ...


class Service:
    """One long-running command: its log, telemetry, signals, monitor, metrics and workers.

    - `unit`: the name of one waiting job in log lines ("file", "message", "request").
    - `live_display`: show progress in place on a terminal, if the settings allow it.
    """

    def __init__(
        self, settings: Settings, *, unit: str = "file", live_display: bool = False
    ) -> None:
        self._settings = settings
        self._unit = unit
        self._console: Console | None = None
        if live_display and console.wants_live(settings.log):
            self._console = Console(stderr=True)
        console.set_up_log(settings.log, settings.log_level, console=self._console)
        self.telemetry = Telemetry()
        self._notify = SystemdNotifier()
        self._stop = threading.Event()

    @contextmanager
    def lifetime(self) -> Iterator[threading.Event]:
        """Handle signals while entered; yields the event that they set.

        The process is ended if it has not left `LAST_RESORT_S` after the event is set.
        """
        with (
            signals.stop_on_signals() as stop,
            signals.bounded_stop(stop, signals.LAST_RESORT_S),
        ):
            self._stop = stop
            yield stop

    @property
    def stop(self) -> threading.Event:
        """The event that ends the command; that of `lifetime`, once it is entered."""
        return self._stop

    def metrics(self, source: object, more: Sequence[object] = ()) -> AbstractContextManager[None]:
        """Return a context that serves metrics, if the settings ask for them.

        `source` has the attributes of `metrics.Share`; `more` are metrics of `prometheus_client`.
        Raises SettingsError if metrics cannot be served.
        """
        address = self._settings.health.metrics
        if address is None:
            return nullcontext()
        try:
            from sam_poll.runtime import metrics
        except ModuleNotFoundError as error:
            raise SettingsError(
                f"metrics need the package prometheus_client ({error})",
                place="health.metrics",
                remedy="pip install 'sam_poll[metrics]', or set it to null",
            ) from error
        return metrics.serve(address, self.telemetry, source, more)  # type: ignore[arg-type]

    def notify_loading(self) -> None:
        """Tell systemd that the model is being loaded."""
        self._notify(f"STATUS=loading {self._settings.model}")

    def answer(
        self,
        source: WaitingSource,
        *,
        on_ready: Callable[[Workers], None],
        model_type: str | None = None,
        on_result: Callable[[Result], None] | None = None,
        make_formats: FormatsFactory = formats_of,
    ) -> None:
        """Load the model, call `on_ready`, and answer jobs until they end or a signal comes."""
        with self.workers(
            model_type=model_type, on_result=on_result, make_formats=make_formats
        ) as workers:
            on_ready(workers)
            with self.monitored(lambda: source.waiting):
                workers.run(source, self._stop)

    @contextmanager
    def workers(
        self,
        *,
        model_type: str | None = None,
        on_result: Callable[[Result], None] | None = None,
        make_formats: FormatsFactory = formats_of,
    ) -> Iterator[Workers]:
        """Load the model and yield what answers jobs.

        One pipeline in this process, or a pool with one process for each of several devices.
        `make_formats` is called in that process: a function of a module.
        """
        settings = self._settings
        names = builders.devices_of(settings)
        if len(names) > 1:
            with self._pool(names, model_type, make_formats) as pool:
                # After a stop the workers may not be ready, and no model is known.
                if not self._stop.is_set():
                    self.telemetry.engine = pool
                yield pool
            return
        engine = builders.engine_of(settings, model_type=model_type, device=names[0])
        self.telemetry.engine = engine
        yield Pipeline(
            engine,
            make_formats(settings),
            options=builders.pipeline_options_of(settings),
            telemetry=self.telemetry,
            on_result=on_result,
            tiled_jobs=builders.mosaic_factory_of(settings, model_type),
            disk_cache=builders.disk_cache_of(settings, model_type=model_type),
        )

    def _pool(
        self, names: list[str], model_type: str | None, make_formats: FormatsFactory
    ) -> WorkerPool:
        settings = self._settings
        specs = builders.worker_specs_of(
            settings, names, model_type=model_type, make_formats=make_formats
        )
        cores = builders.usable_cores() // len(names)
        writers = builders.pipeline_options_of(settings, cores).finish_threads * len(names)
        return WorkerPool(
            specs,
            self._stop,
            telemetry=self.telemetry,
            writers=writers,
            tiled_jobs=builders.can_make_mosaics(),
        )

    @contextmanager
    def monitored(
        self, waiting: Callable[[], int], summary: Callable[[], str] | None = None
    ) -> Iterator[None]:
        """Report to systemd, the heartbeat file, alarms, and the terminal or log while entered.

        `summary`: the status line for systemd, instead of the usual counts.
        """
        telemetry = self.telemetry
        health = self._settings.health
        now = telemetry.stats.now
        alarms = telemetry.alarms.active

        def status() -> str:
            return console.status_line(now(), waiting(), alarms(), self._unit)

        monitor = Monitor(
            telemetry,
            self._stop,
            stuck_s=health.stuck_s,
            file=health.file,
            notify=self._notify,
            summary=summary or status,
        )
        display: AbstractContextManager[object]
        if self._console:
            info = telemetry.info
            title = f"{info.name} on {info.device}" if info else ""
            display = console.Progress(title, now, waiting, self._console, alarms)
        else:
            display = console.PeriodicStatusLog(now, waiting, alarms, what=self._unit)
        with monitor, display:
            yield

    def log_end(self, how: str = "stopped", rest: str = "") -> None:
        """Log the counts of the run."""
        logger.info("{}: {}{}", how, console.summary(self.telemetry.stats.now()), rest)
