"""One process of a fleet: a pipeline like any other, whose door, counts, alarms and log lie with the process that
started it.

What can still go wrong here: a bad picture may end this process. Its jobs are claimed by the other one, which counts
the attempt and starts a new process in this one's place.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, TypeAlias

from loguru import logger

from sam_poll.alarms import Alarms
from sam_poll.errors import ExitCode, LostError, SamPollError
from sam_poll.fs import shown
from sam_poll.pipeline import Begin, Pipeline, Sizes
from sam_poll.stats import Pulse, Stats
from sam_poll.types import Document, Engine, Format, Job
from sam_poll.wire import Wire, portable

BEAT_S = 0.5
_POLL_S = 0.1


class Equipment(NamedTuple):
    """What a process needs for its pipeline."""

    engine: Engine
    formats: Sequence[Format] | Mapping[str, Format]
    sizes: Sizes
    pieces: Begin | None = None


Equip: TypeAlias = Callable[[], Equipment]  # travels as a pickle: a function of a module, maybe with arguments


class FarStats(Stats):
    """Counts that are kept on the other side. A job is counted as taken there, when it is handed out."""

    def __init__(self, wire: Wire) -> None:
        super().__init__()
        self._wire = wire

    def took(self) -> None:
        """Counted where it came from."""

    def answered(self, job_id: str, objects: int, timings: Mapping[str, float]) -> None:
        self._wire.send("count", "answered", (job_id, objects, dict(timings)))

    def rejected(self, job_id: str, code: str) -> None:
        self._wire.send("count", "rejected", (job_id, code))

    def released(self, code: str = "") -> None:
        self._wire.send("count", "released", (code,))

    def advanced(self) -> None:
        self._wire.send("advance")


class FarAlarms(Alarms):
    """Alarms that are raised, logged and cleared on the other side."""

    def __init__(self, wire: Wire) -> None:
        super().__init__()
        self._wire, self._raised = wire, set[str]()

    def raise_(self, kind: str, message: str) -> None:
        self._raised.add(kind)
        self._wire.send("alarm", kind, message)

    def clear(self, kind: str) -> None:
        if kind in self._raised:
            self._raised.discard(kind)
            self._wire.send("alarm", kind, None)


class FarDoor:
    """The other side's door. A job's `origin` is the number it is known by there."""

    def __init__(self, wire: Wire, stop: threading.Event) -> None:
        self._wire, self._stop = wire, stop
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._replies: dict[int, queue.SimpleQueue[Exception | None]] = {}

    def listen(self) -> None:
        """Takes in what comes. When the other side ends there is nobody left to work for: the process ends, too."""
        try:
            while True:
                kind, *rest = self._wire.receive()
                if kind == "job":
                    self._inbox.put(rest[0])
                elif kind == "reply":
                    self._replies[rest[0]].put(rest[1])
                elif kind == "end":
                    self._inbox.put(None)
                else:  # stop
                    self._stop.set()
        except EOFError:
            os._exit(ExitCode.OK)

    def jobs(self, stop: threading.Event) -> Generator[Job, None, None]:
        """Asks for a job each time one is wanted."""
        try:
            while not stop.is_set():
                self._wire.send("want")
                job = self._next(stop)
                if job is None:
                    return
                self._wire.send("begun", job.origin)
                yield job
        finally:
            while not self._inbox.empty():  # sent before the other side knew that this one ends
                if job := self._inbox.get():
                    try:
                        self.release(job)
                    except (OSError, LostError) as error:
                        logger.warning("job {} stays in work/, to be taken over: {}", shown(job.id), error)

    def _next(self, stop: threading.Event) -> Job | None:
        while not stop.is_set():
            try:
                return self._inbox.get(timeout=_POLL_S)
            except queue.Empty:
                continue
        return None

    def deliver(self, job: Job, documents: Sequence[Document]) -> None:
        """As the door's own, which does it."""
        self._ask(job, "deliver", list(documents))

    def reject(self, job: Job, error: SamPollError) -> None:
        """As the door's own."""
        self._ask(job, "reject", portable(error))

    def release(self, job: Job, trouble: OSError | None = None) -> None:
        """As the door's own."""
        self._ask(job, "release", trouble and portable(trouble))

    def defer(self, job: Job, error: SamPollError) -> None:
        """As the door's own."""
        self._ask(job, "defer", portable(error))

    def abandon(self, job: Job) -> None:
        """Nobody asks for that here: the other side sees it when this one ends."""
        raise NotImplementedError

    def _ask(self, job: Job, what: str, *arguments: Any) -> None:
        reply = self._replies[job.origin] = queue.SimpleQueue()
        self._wire.send("call", job.origin, what, arguments)
        error = reply.get()
        del self._replies[job.origin]
        if error:
            raise error


def serve(wire: Wire) -> ExitCode:
    """Is told how to make engine and formats, makes them, and works until there is nothing left to do."""
    stop = threading.Event()
    door = FarDoor(wire, stop)
    try:
        equip, log_level = wire.receive()
        _log_to(wire, log_level)
        threading.Thread(target=door.listen, name="wire", daemon=True).start()
        engine, formats, sizes, pieces = Equipment(*equip())
        pulse, stats, alarms = Pulse(), FarStats(wire), FarAlarms(wire)
        pipeline = Pipeline(engine, formats, sizes=sizes, stats=stats, alarms=alarms, device=pulse, pieces=pieces)
        wire.send("ready", engine.info)
        threading.Thread(target=_beat, args=(wire, engine, pulse), name="beat", daemon=True).start()
        pipeline.run(door, stop)
    except SamPollError as error:
        wire.send("over", portable(error))
        return error.exit_code
    except Exception as error:  # noqa: BLE001  told on the other side, where somebody reads it
        logger.opt(exception=True).critical("unexpected {}: {}", type(error).__name__, error)
        wire.send("over", portable(error))
        return ExitCode.BUG
    wire.send("over", None)
    return ExitCode.OK


def _beat(wire: Wire, engine: Engine, pulse: Pulse) -> None:
    tick = threading.Event()
    while not tick.wait(BEAT_S):
        wire.send("beat", pulse.age, engine.info, int(getattr(engine, "ooms", 0)))


def _log_to(wire: Wire, level: str) -> None:
    def write(message: Any) -> None:
        record = message.record
        found = record["exception"]
        text = record["message"] + (f" ({found.value!r})" if found else "")
        wire.send("log", record["level"].name, text, {key: str(value) for key, value in record["extra"].items()})

    logger.remove()
    logger.add(write, level=level, format="{message}")


def main() -> None:
    """The process's whole life. Its one argument is the number of its end of the wire."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the other side hears them, and says when to stop
        signal.signal(number, signal.SIG_IGN)
    code = serve(Wire(Connection(int(sys.argv[1]))))
    os._exit(code)  # a thread that hangs in a driver must not hold the end up


if __name__ == "__main__":
    main()
