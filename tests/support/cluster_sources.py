"""A dispatcher and workers of a cluster in this process, over Redis or RabbitMQ."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import dramatiq
import pika
import pytest

from sam_poll.core.telemetry import Telemetry
from sam_poll.core.types import Job
from sam_poll.integrations import message_broker
from sam_poll.integrations.cluster.dispatcher import ClusterDispatcher
from sam_poll.integrations.cluster.engine import EngineMiddleware, limits
from sam_poll.integrations.cluster.messages import fault_of
from sam_poll.integrations.cluster.worker import ClusterWorkerSource
from sam_poll.integrations.message_broker import CheckedBroker
from sam_poll.share.claims.model import ClaimState, list_work
from sam_poll.share.folder_options import FolderOptions
from tests.conftest import Share, make_pipeline, wait_until
from tests.support import redis_server
from tests.support.rabbit_server import RabbitServer

QUICK: dict[str, Any] = {"settle_s": 0.0, "rescan_s": 0.1, "lease_s": 2.0}
LEASE_S = 2.0
BROKERS = ("redis", "rabbitmq")


@pytest.fixture(scope="session")
def rabbit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    with RabbitServer(tmp_path_factory.mktemp("rabbitmq")) as made:
        yield made


@pytest.fixture
def redis_only(tmp_path: Path) -> Iterator[redis_server.Server]:
    with redis_server.Server(tmp_path / "redis") as made:
        yield made


@pytest.fixture(params=BROKERS)
def server(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A server of either kind. Each share has queues of its own, so that one may be shared."""
    made = request.getfixturevalue("redis_only" if request.param == "redis" else "rabbit")
    yield made
    if isinstance(made, RabbitServer) and not made.is_running:  # a test that failed has killed it
        made.start()


def connect(server: Any, telemetry: Telemetry | None = None, middleware: Any = ()) -> CheckedBroker:
    alarms = (telemetry or Telemetry()).alarms
    address = message_broker.find_url({message_broker.URL: server.url}, None, None)
    return message_broker.connect(
        address, alarms, LEASE_S, fault_of=fault_of, middleware=middleware
    )


def wipe(server: Any, share: str) -> None:
    """Delete all that the broker has of a share."""
    if isinstance(server, redis_server.Server):
        server.client.flushall()
        return
    with pika.BlockingConnection(pika.URLParameters(server.url)) as connection:
        for kind in ("first", "rest"):
            for ending in ("", ".DQ", ".XQ"):
                connection.channel().queue_delete(f"sam_poll.{share}-{kind}{ending}")


class Running:
    """A dispatcher or a daemon that runs in a thread of this process."""

    def __init__(self, source: Any, broker: Any, run: Any, telemetry: Telemetry) -> None:
        self.source = source
        self.telemetry = telemetry
        self.stop = threading.Event()
        self._broker = broker
        self._run, self.error = run, None
        self._thread = threading.Thread(target=self._go, name="running")
        self.ready = threading.Event()

    def _go(self) -> None:
        try:
            with closing(self._broker), self.source:
                self.ready.set()
                self._run(self.source, self.stop)
        except BaseException as error:  # noqa: BLE001
            self.error = error

    @property
    def alarms(self) -> list[str]:
        return [alarm.kind for alarm in self.telemetry.alarms.active()]

    @property
    def sent(self) -> int:
        """How many messages a dispatcher has sent."""
        return sum(box.sent for box in self.source.outboxes.values())

    @property
    def again(self) -> int:
        """How many of them were sent again."""
        return sum(box.again for box in self.source.outboxes.values())

    def __enter__(self) -> Running:
        self._thread.start()
        wait_until(lambda: self.ready.is_set() or self.error)
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "it did not stop"
        if self.error:
            raise self.error


def watcher(
    share: Share, server: Any, ahead: int = 64, first: tuple[str, ...] = (), **options: Any
) -> Running:
    telemetry = Telemetry()
    broker = connect(server, telemetry)
    source = ClusterDispatcher(
        share.layout,
        FolderOptions(**{**QUICK, **options}),
        broker,
        ahead,
        first,
        alarms=telemetry.alarms,
    )
    return Running(source, broker, ClusterDispatcher.run, telemetry)


class DramatiqWorker:
    """Dramatiq's worker in this process; `run(source, stop)` takes the place of a pipeline."""

    def __init__(
        self,
        share: Share,
        server: Any,
        run: Callable[[ClusterWorkerSource, threading.Event], object],
        telemetry: Telemetry | None = None,
        *,
        threads: int = 8,
        settings: Any = None,
        middleware: Any = (),
        **options: Any,
    ) -> None:
        self.telemetry = telemetry or Telemetry()
        self.stop = threading.Event()
        self.source = ClusterWorkerSource(
            share.layout, FolderOptions(**{**QUICK, **options}), alarms=self.telemetry.alarms
        )
        self.broker = connect(server, self.telemetry, [*middleware, *limits()])
        engine = EngineMiddleware(
            self.broker, self.source, self._answer, self.stop, settings=settings
        )
        self.broker.add_middleware(engine)
        self.worker = dramatiq.Worker(self.broker, worker_timeout=50, worker_threads=threads)
        self._run = run

    def _answer(self, on_ready: Callable[[int], None]) -> None:
        with self.source:
            on_ready(self.worker.worker_threads)
            self._run(self.source, self.stop)

    @property
    def alarms(self) -> list[str]:
        return [alarm.kind for alarm in self.telemetry.alarms.active()]

    def __enter__(self) -> DramatiqWorker:
        self.broker.emit_after("process_boot")
        self.worker.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.worker.stop(timeout=60_000)
        self.broker.close()


def worker(share: Share, server: Any, engine: Any = None, **more: Any) -> DramatiqWorker:
    """A worker with a pipeline."""
    pipeline = make_pipeline(engine)
    made = DramatiqWorker(share, server, pipeline.run, **more)
    made.pipeline = pipeline  # type: ignore[attr-defined]
    return made


class Door:
    """A worker whose jobs a test takes and ends itself."""

    def __init__(self, share: Share, server: Any, **more: Any) -> None:
        self._worker = DramatiqWorker(share, server, lambda source, stop: stop.wait(), **more)
        self.source = self._worker.source
        self._stop = threading.Event()
        self._jobs: Generator[Job, None, None] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    @property
    def alarms(self) -> list[str]:
        return self._worker.alarms

    @property
    def worker_threads(self) -> list[int]:
        """The threads that call the actor."""
        return [thread.ident or 0 for thread in self._worker.worker.workers]

    def take(self, count: int = 1) -> list[Job]:
        """Return the next `count` jobs."""
        jobs: list[Job] = []
        timer = threading.Timer(30.0, self._stop.set)
        timer.start()
        if self._jobs is None:
            self._jobs = self.source.jobs(self._stop)
        while len(jobs) < count and (job := next(self._jobs, None)):
            jobs.append(job)
        timer.cancel()
        assert len(jobs) == count, "no job came"
        return jobs

    def __enter__(self) -> Door:
        self._worker.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._jobs:
            self._jobs.close()
        self._worker.__exit__(*exc)


def answered(source: ClusterWorkerSource | Door, *calls: tuple[str, int]) -> list[Job]:
    """Return the jobs that a worker makes of calls of its actor, and wait for all other calls."""
    jobs: list[Job] = []
    stop = threading.Event()

    def call(claim: str, generation: int) -> None:
        with suppress(ValueError):  # names no claim
            source.answer(claim, generation)

    taker = threading.Thread(target=lambda: jobs.extend(source.jobs(stop)))
    callers = [threading.Thread(target=call, args=one, daemon=True) for one in calls]
    for thread in (taker, *callers):
        thread.start()
    wait_until(
        lambda: (
            sum(not one.is_alive() for one in callers) + len(jobs) >= len(calls)
            or not taker.is_alive()
        )
    )
    assert taker.is_alive(), "a message has ended the worker"
    stop.set()
    taker.join(30)
    return jobs


def holds(share: Share) -> list[ClaimState]:
    return [found.hold for found in list_work(share.layout.work).claims if found.hold]
