"""What handing out costs: claims a second of one watcher, steps on the share and commands to Redis a job.

    python -m tools.scale [JOBS]

starts a Redis of its own (`redis-server` must be there) and works in a temporary folder. The figures of docs/scale.md
are made with it.

What can still go wrong here: steps are counted by Python's audit events, which do not see `stat`; on a network share
these are answered by its cache for a part.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from loguru import logger

from sam_poll.doors.cluster_line import Line
from sam_poll.doors.cluster_watcher import WatcherDoor
from sam_poll.doors.cluster_worker import WorkerDoor
from sam_poll.doors.layout import Layout
from sam_poll.doors.scan import Manners
from sam_poll.types import Document
from tests.redis_server import Server
from tools import audited
from tools.chaos_jobs import pair

COUNTED = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.scandir", "os.listdir", "os.link", "os.utime", "open"}
DOCUMENTS = [Document(".mask.png", "image/png", b"x" * 20_000), Document(".opex.json", "application/json", b"x" * 2000)]
_IDLE_S = 10.0


class Steps:
    """Counts what is done below a folder, while it is entered."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._on = str(folder), False
        self.found: Counter[str] = Counter()
        audited.begin()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, given: tuple[Any, ...]) -> None:
        if self._on and event in COUNTED and any(p.startswith(self._folder) for p in audited.paths(event, given)):
            self.found[event.removeprefix("os.")] += 1

    def __enter__(self) -> Steps:
        self.found.clear()
        self._on = True
        return self

    def __exit__(self, *exc: object) -> None:
        self._on = False


def commands(server: Server) -> tuple[int, float]:
    """Calls and processor seconds of Redis' commands since the last reset; what a script calls is not counted twice."""
    found = server.client.info("commandstats")
    script = {name: found[name] for name in found if name in ("cmdstat_evalsha", "cmdstat_eval")}
    outer = {n: v for n, v in found.items() if n in ("cmdstat_ping", "cmdstat_hexists")} | script
    return sum(v["calls"] for v in script.values()), sum(v["usec"] for v in outer.values()) / 1e6


def told(what: str, steps: Steps, jobs: int) -> None:
    each = ", ".join(f"{name} {count / jobs:.1f}" for name, count in sorted(steps.found.items()))
    sys.stdout.write(f"{what}: {sum(steps.found.values()) / jobs:.1f} steps a job ({each})\n")


def drop(share: Path, jobs: int) -> None:
    (share / "in").mkdir(parents=True)
    for number in range(jobs):
        for file in pair(f"cam{number % 10}/d{number}", number):
            (share / "in" / file.name).parent.mkdir(exist_ok=True)
            (share / "in" / file.name).write_bytes(file.body)


def measure(root: Path, server: Server, jobs: int) -> None:
    """Hand out, take over and deliver so many jobs, each by itself."""
    share, say = root / "share", sys.stdout.write
    drop(share, jobs)
    layout = Layout.below(share)
    manners, stop = Manners(quiet_s=0.0, rescan_s=0.5), threading.Event()
    steps = Steps(share)
    watcher = WatcherDoor(layout, manners, lambda share: Line(server.link(), share, 30.0), jobs, ())
    with watcher, WorkerDoor(layout, manners, line=lambda share: Line(server.link(), share, 30.0)) as worker:
        server.client.config_resetstat()
        thread = threading.Thread(target=watcher.run, args=(stop,))
        with steps:
            began = time.monotonic()
            thread.start()
            while watcher.sender.sent < jobs:
                time.sleep(0.01)
            took = time.monotonic() - began
        say(f"watcher: {jobs / took:.0f} claims/s handed out\n")
        told("watcher", steps, jobs)
        memory = server.client.info("memory")["used_memory_dataset"]
        say(f"Redis: {memory / jobs:.0f} bytes a waiting claim\n")
        stop.set()
        thread.join()
        taken = []
        with steps:
            began = time.monotonic()
            for job in worker.jobs(threading.Event()):
                taken.append(job)
                if len(taken) == jobs:
                    break
            took = time.monotonic() - began
        say(f"worker: {jobs / took:.0f} claims/s taken over\n")
        told("worker, taking over", steps, jobs)
        calls, seconds = commands(server)
        say(f"Redis: {calls / jobs:.1f} scripts a job, {1e6 * seconds / jobs:.0f} µs of its processor a job\n")
        with steps:
            began = time.monotonic()
            for job in taken:
                worker.deliver(job, DOCUMENTS)
            took = time.monotonic() - began
        say(f"worker: {jobs / took:.0f} jobs/s delivered by one thread\n")
        told("worker, delivering", steps, jobs)
        idle(worker, server)


def idle(worker: WorkerDoor, server: Server) -> None:
    """What a worker that waits costs."""
    stop = threading.Event()
    thread = threading.Thread(target=lambda: list(worker.jobs(stop)))
    thread.start()
    server.client.config_resetstat()
    time.sleep(_IDLE_S)
    calls, seconds = commands(server)
    stop.set()
    thread.join()
    each = f"{calls / _IDLE_S:.1f} scripts/s, {100 * seconds / _IDLE_S:.3f} % of a core of Redis"
    sys.stdout.write(f"an idle worker: {each}\n")


def main() -> None:
    """Measure, and print."""
    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    jobs = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as root, Server(Path(root) / "redis", "appendfsync everysec") as server:
        sys.stdout.write(f"{jobs} jobs, {os.cpu_count()} cores\n")
        measure(Path(root), server, jobs)


if __name__ == "__main__":
    main()
