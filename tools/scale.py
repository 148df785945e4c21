"""What a cluster costs: claims a second of one watcher, steps on the share, commands to the broker,
and the throughput of several workers.

    python -m tools.scale [--jobs 1000] [--broker redis] [--broker rabbitmq]
    python -m tools.scale --workers 1 --workers 2 --workers 4 [--gpu-ms 400] [--lag-ms 20]

starts a server of its own (`redis-server`, `rabbitmq-server` must be there) and works in a
temporary folder. The figures of docs/scale.md are made with it.

Limitations: steps are counted by Python's audit events, which do not see `stat`; on a network share
these are answered by its cache for a part. What RabbitMQ itself uses of the processor is not
measured."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from loguru import logger

from sam_poll.core.alarms import Alarms
from sam_poll.core.types import OutputFile
from sam_poll.integrations import message_broker
from sam_poll.integrations.cluster.dispatcher import ClusterDispatcher
from sam_poll.integrations.cluster.messages import fault_of
from sam_poll.integrations.cluster.worker import ClusterWorkerSource
from sam_poll.share.claims.model import list_work
from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.layout import Layout
from tests.support.cluster_processes import Part
from tools import audited
from tools.chaos_cluster import SERVERS
from tools.chaos_jobs import drop_pair, pair
from tools.chaos_share import new_share, wait_for

COUNTED = {
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.remove",
    "os.scandir",
    "os.listdir",
    "os.link",
    "os.utime",
    "open",
}
DOCUMENTS = [
    OutputFile(".mask.png", "image/png", b"x" * 20_000),
    OutputFile(".opex.json", "application/json", b"x" * 2000),
]
# As in docker/docker-compose.cluster.yml; the tests' own setting flushes each message.
_SERVER_OPTIONS = {"redis": ["appendfsync everysec"], "rabbitmq": []}
_IDLE_S = 10.0
_LEASE_S = 30.0


class Steps:
    """Counts what is done below a folder, while it is entered."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._on = str(folder), False
        self.found: Counter[str] = Counter()
        audited.begin()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, given: tuple[Any, ...]) -> None:
        if (
            self._on
            and event in COUNTED
            and any(p.startswith(self._folder) for p in audited.paths(event, given))
        ):
            self.found[event.removeprefix("os.")] += 1

    def __enter__(self) -> Steps:
        self.found.clear()
        self._on = True
        return self

    def __exit__(self, *exc: object) -> None:
        self._on = False


def commands(server: Any) -> tuple[int, float]:
    """Calls and processor seconds of Redis' commands since the last reset; what a script calls is
    not counted twice.
    """
    found = server.client.info("commandstats")
    outer = [
        found[name] for name in ("cmdstat_evalsha", "cmdstat_eval", "cmdstat_llen") if name in found
    ]
    return sum(v["calls"] for v in outer), sum(v["usec"] for v in outer) / 1e6


def told(what: str, steps: Steps, jobs: int) -> None:
    each = ", ".join(f"{name} {count / jobs:.1f}" for name, count in sorted(steps.found.items()))
    sys.stdout.write(f"{what}: {sum(steps.found.values()) / jobs:.1f} steps a job ({each})\n")


def drop(share: Path, jobs: int) -> None:
    (share / "in").mkdir(parents=True)
    for number in range(jobs):
        for file in pair(f"cam{number % 10}/d{number}", number):
            (share / "in" / file.name).parent.mkdir(exist_ok=True)
            (share / "in" / file.name).write_bytes(file.body)


def connect(server: Any) -> message_broker.CheckedBroker:
    address = message_broker.find_url({message_broker.URL: server.url}, None, None)
    return message_broker.connect(address, Alarms(), _LEASE_S, fault_of=fault_of)


def measure(root: Path, name: str, server: Any, jobs: int) -> None:
    """Hand out, take over and deliver so many jobs, each by itself."""
    share, say = root / "share", sys.stdout.write
    drop(share, jobs)
    layout = Layout.below(share)
    options, stop = FolderOptions(settle_s=0.0, rescan_s=0.5), threading.Event()
    steps = Steps(share)
    broker = connect(server)
    watcher = ClusterDispatcher(layout, options, broker, jobs, ())
    with closing(broker), watcher, ClusterWorkerSource(layout, options) as worker:
        if name == "redis":
            server.client.config_resetstat()
        thread = threading.Thread(target=watcher.run, args=(stop,))
        with steps:
            began = time.monotonic()
            thread.start()
            while sum(box.sent for box in watcher.outboxes.values()) < jobs:
                time.sleep(0.01)
            took = time.monotonic() - began
        say(f"watcher: {jobs / took:.0f} claims/s handed out\n")
        told("watcher", steps, jobs)
        if name == "redis":
            memory = server.client.info("memory")["used_memory_dataset"]
            calls, seconds = commands(server)
            say(f"Redis: {memory / jobs:.0f} bytes a waiting claim, {calls / jobs:.1f} commands, ")
            say(f"{1e6 * seconds / jobs:.0f} µs of its processor a message sent\n")
        stop.set()
        thread.join()
        entries = list_work(layout.work).claims
        callers = [
            threading.Thread(
                target=worker.answer,
                args=(entry.outer.below(layout.work), entry.hold.generation if entry.hold else 0),
                daemon=True,
            )
            for entry in entries
        ]
        for caller in callers:
            caller.start()
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
        with steps:
            began = time.monotonic()
            for job in taken:
                worker.deliver(job, DOCUMENTS)
            took = time.monotonic() - began
        say(f"worker: {jobs / took:.0f} jobs/s delivered by one thread\n")
        told("worker, delivering", steps, jobs)


def messages(root: Path, name: str, server: Any, jobs: int) -> None:
    """What a worker process costs the broker, idle and for each message."""
    share, say = new_share(root / "messages"), sys.stdout.write
    with Part("watch", share, server) as watcher, Part("worker", share, server) as worker:
        watcher.started()
        worker.started()
        if name == "redis":
            server.client.config_resetstat()
            time.sleep(_IDLE_S)
            calls, seconds = commands(server)
            say(f"an idle watcher and an idle worker: {calls / _IDLE_S:.1f} commands/s, ")
            say(f"{100 * seconds / _IDLE_S:.3f} % of a core of Redis\n")
            server.client.config_resetstat()
        waits = []
        for number in range(20):
            drop_pair(share, f"w{number}", number)
            wait_for(lambda: answers(share) > number, "the answer", every=0.002)  # noqa: B023
            waits.append(time.monotonic())
        if name == "redis":
            calls, seconds = commands(server)
            say(f"20 jobs one by one: {calls / 20:.0f} commands a job\n")


def answers(share: Path) -> int:
    return sum(1 for _ in (share / "out").rglob("*.opex.json")) if (share / "out").is_dir() else 0


def throughput(root: Path, server: Any, workers: int, gpu_ms: float, lag_ms: float) -> float:
    """Jobs a second of so many worker processes on a share that lags, the first ones left out."""
    share = new_share(root)
    jobs, first = 30 * workers, 4 * workers
    with ExitStack() as stack:
        parts = [stack.enter_context(Part("watch", share, server))]
        parts += [
            stack.enter_context(
                Part("worker", share, server, lag_ms=lag_ms or 0.001, CHAOS_GPU_MS=gpu_ms)
            )
            for _ in range(workers)
        ]
        for part in parts:
            part.started()
        for number in range(jobs):
            drop_pair(share, f"d{number}", number)
        wait_for(lambda: answers(share) >= first, "the first answers", 120)
        before, began = answers(share), time.monotonic()
        wait_for(lambda: answers(share) >= jobs, "all answers", 600)
        took = time.monotonic() - began
        for part in reversed(parts):
            part.stop()
    return (jobs - before) / took


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--broker", action="append", choices=SERVERS)
    parser.add_argument("--workers", type=int, action="append")
    parser.add_argument("--gpu-ms", type=float, default=400.0)
    parser.add_argument("--lag-ms", type=float, default=20.0)
    asked = parser.parse_args()
    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    for name in asked.broker or ["redis"]:
        with (
            tempfile.TemporaryDirectory() as folder,
            SERVERS[name](Path(folder) / name, *_SERVER_OPTIONS[name]) as server,
        ):
            root = Path(folder)
            load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
            sys.stdout.write(f"{name}, {os.cpu_count()} cores, load {load}\n")
            if not asked.workers:
                measure(root, name, server, asked.jobs)
                messages(root, name, server, asked.jobs)
                continue
            alone = 0.0
            for count in asked.workers:
                rate = throughput(root / str(count), server, count, asked.gpu_ms, asked.lag_ms)
                alone = alone or rate / count
                sys.stdout.write(
                    f"{count} workers: {rate:.1f} jobs/s, efficiency {rate / count / alone:.0%}\n"
                )
                sys.stdout.flush()


if __name__ == "__main__":
    main()
