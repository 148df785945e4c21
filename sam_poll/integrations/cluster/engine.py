"""The middleware that loads a worker's engine and closes it, and declares the actors."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import dramatiq
from dramatiq.middleware import AgeLimit, Middleware, Retries, TimeLimit
from loguru import logger

from sam_poll.core.errors import ExitCode, SamPollError
from sam_poll.core.validation import describe_value
from sam_poll.integrations.cluster.messages import ACTORS, LONGEST_PAUSE_MS, queue_names
from sam_poll.integrations.cluster.worker import ClusterWorkerSource
from sam_poll.integrations.message_broker import CheckedBroker
from sam_poll.runtime.console import print_error

_MAX_AGE_MS = 24 * 3600 * 1000
_MAX_RETRIES = 8
_FIRST_PAUSE_MS = 1000
# RabbitMQ takes a message away that is not acknowledged within 30 minutes, and the others of the
# same consumer with it.
_TIME_LIMIT_MS = 20 * 60 * 1000
_KILLED = 1  # the exit code of Dramatiq's command after a second signal
_CHECK_S = 1.0  # interval at which the main thread is looked at


def limits() -> list[Middleware]:
    """Return Dramatiq's own middleware for the two actors.

    A message that a limit sends to the dead letters is sent again by the dispatcher, if its claim
    still waits.
    """
    return [
        AgeLimit(max_age=_MAX_AGE_MS),
        TimeLimit(time_limit=_TIME_LIMIT_MS),
        Retries(
            max_retries=_MAX_RETRIES, min_backoff=_FIRST_PAUSE_MS, max_backoff=LONGEST_PAUSE_MS
        ),
    ]


class EngineMiddleware(Middleware):
    """Loads the engine once a process, before its threads start, and closes it behind them.

    - `run`: enters `source`, loads the engine, calls what it is given with the number of jobs that
      may be in progress, and runs the source's jobs until `stop` is set; in a thread.
    - `settings`: those that must be the same for all, compared with those of messages.
    - `on_failure`: called when the engine ends by itself.

    An error that the user has to see ends the process with its exit code.
    """

    def __init__(
        self,
        broker: CheckedBroker,
        source: ClusterWorkerSource,
        run: Callable[[Callable[[int], None]], None],
        stop: threading.Event,
        *,
        settings: Mapping[str, Any] | None = None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self._broker = broker
        self._source = source
        self._run_source = run
        self._stop = stop
        self._settings = settings or {}
        self._on_failure = on_failure
        self._capacity: Future[int] = Future()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine")

    def before_worker_boot(self, broker: dramatiq.Broker, worker: dramatiq.Worker) -> None:
        """Load the engine and declare the actors of its share."""
        self._thread.start()
        threading.Thread(target=self._end_with_main_thread, name="engine-end", daemon=True).start()
        capacity = self._capacity.result()
        self._raise_error()
        queues = queue_names(self._broker.prefix, self._source.share)
        for priority, (first, name) in enumerate(ACTORS.items()):
            dramatiq.Actor(
                self._source.answer,
                broker=broker,
                actor_name=name,
                queue_name=queues[first],
                priority=priority,
                options={},
            )
        # What a worker has fetched and not begun, no other can take.
        worker.queue_prefetch = min(worker.worker_threads, capacity)

    def before_process_message(self, broker: dramatiq.Broker, message: Any) -> None:
        """Compare the dispatcher's settings with this worker's."""
        theirs = message.options.get("settings", {})
        for name, here in self._settings.items():
            if name in theirs and theirs[name] != here:
                there = describe_value(theirs[name])
                self._broker.warn_once(
                    f"{name} is {there} for the dispatcher and {describe_value(here)} for this "
                    "worker: give both the same"
                )

    def before_worker_shutdown(self, broker: dramatiq.Broker, worker: dramatiq.Worker) -> None:
        """Have running jobs finish, and leave the others to other workers."""
        self._stop.set()

    def after_worker_shutdown(self, broker: dramatiq.Broker, worker: dramatiq.Worker) -> None:
        """Wait until engine and share are closed."""
        self._thread.join()
        self._raise_error()

    def _run(self) -> None:
        try:
            self._run_source(self._capacity.set_result)
        except BaseException as error:  # noqa: BLE001  raised again in the thread that waits
            self._error = error
        asked = self._stop.is_set()
        self._stop.set()
        self._source.end_calls()
        if not self._capacity.done():
            self._capacity.set_result(0)
        elif not asked:
            self._on_failure()

    def _end_with_main_thread(self) -> None:
        """End the process if its main thread ends before the engine, which would go on without it.

        A second signal ends the main thread of Dramatiq's command. Unfinished jobs are recovered.
        """
        while True:
            self._thread.join(_CHECK_S)
            if not self._thread.is_alive():
                return
            if not threading.main_thread().is_alive():
                logger.warning("exiting at once; unfinished jobs will be recovered")
                os._exit(_KILLED)

    def _raise_error(self) -> None:
        """End the process with the exit code of an error: Dramatiq would only log it."""
        if isinstance(self._error, SamPollError):
            print_error(self._error)
            raise SystemExit(self._error.exit_code)
        if self._error:
            logger.opt(exception=self._error).critical("the worker has failed: {}", self._error)
            raise SystemExit(ExitCode.BUG)
