"""`python -m benchmarks.crowd`: the folder door in front of 100,000 waiting pairs, measured against
its goals.

It makes a crowd of tiny pictures and prompts below `--work` (default: the current directory; not a
RAM disk, whose times say nothing), runs the real daemon over it with the bundled model on the CPU,
prints a table of goal and measured, and removes what it has made. The crowd of the idle measurement
is pictures whose prompts, and as many prompts whose pictures, do not come.

Limitations: the file system's cache is warm, because the crowd has just been
written. On a busy machine the start of the daemon is mostly the import of torch: the table gives
the start with few pairs beside it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from loguru import logger

from sam_poll.core.types import OutputFile
from sam_poll.diagnostics.bench.processes import cpu_s
from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.intake.scanner import Scanner
from sam_poll.share.layout import Layout
from sam_poll.share.pending_job import PendingJob
from sam_poll.share.source import FolderSource

_TICK_S = 0.02
# of a core: a daemon that uses less over a whole window has finished getting to know the crowd
_CALM = 0.05
_FEW = 200
_PROMPT = json.dumps({"box": {"x0": 10, "y0": 10, "x1": 50, "y1": 40}}).encode()


@dataclass(frozen=True)
class Windows:
    """How long is measured, in seconds."""

    memory_s: float = 15.0
    idle_s: float = 60.0
    calm_s: float = 15.0
    door_s: float = 5.0
    patience_s: float = 600.0


@dataclass(frozen=True)
class Line:
    """One line of the table; `goal` None: no goal, but worth knowing."""

    what: str
    measured: float
    unit: str
    goal: float | None = None

    def __str__(self) -> str:
        goal = "" if self.goal is None else f"≤ {self.goal:g}"
        verdict = "" if self.goal is None else "reached" if self.measured <= self.goal else "MISSED"
        return f"{self.what:<58} {self.measured:>9.2f} {self.unit:<7} {goal:<6} {verdict}".rstrip()


def make_crowd(folder: Path, pairs: int, *, apart: bool = False) -> Layout:
    """A share with so many pairs in `in/`; `apart`: names that make no pair."""
    layout = Layout.below(folder)
    layout.input.path.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    picture = cv2.imencode(".jpg", pixels)[1].tobytes()
    for number in range(pairs):
        _put(layout.input.path / f"{'seen' if apart else 'pair'}-{number:06}.jpg", picture)
        _put(layout.input.path / f"{'told' if apart else 'pair'}-{number:06}.json", _PROMPT)
    os.sync()  # else the first answer's own flush would wait for all of these
    return layout


def _put(path: Path, body: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    os.write(handle, body)
    os.close(handle)


def wait_for(
    condition: Callable[[], object],
    patience_s: float,
    daemon: subprocess.Popen[bytes] | None = None,
) -> None:
    """TimeoutError when it does not come, RuntimeError when the daemon ends before."""
    deadline = time.monotonic() + patience_s
    tick = threading.Event()
    while not condition():
        if daemon and daemon.poll() is not None:
            raise RuntimeError(f"the daemon ended with {daemon.returncode}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {patience_s:g} s")
        tick.wait(_TICK_S)


# ── the daemon ──


@contextmanager
def watching(layout: Layout) -> Iterator[subprocess.Popen[bytes]]:
    """The real daemon over a share, with the bundled model on the CPU."""
    command = [
        sys.executable,
        "-m",
        "sam_poll",
        "watch",
        str(layout.input.path),
        str(layout.output.path),
    ]
    flags = [
        "--model",
        "demo",
        "--device",
        "cpu",
        "--format",
        "mask",
        "--log",
        "text",
        "--log-level",
        "WARNING",
    ]
    settings = {"SAM_POLL_WATCH__RESCAN_S": "10"}
    daemon = subprocess.Popen([*command, *flags], env={**os.environ, **settings})
    try:
        yield daemon
    finally:
        daemon.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(60)
        daemon.kill()
        daemon.wait()


def rss_mb(pid: int) -> float:
    """Resident memory of a process, in MB."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return int(status["VmRSS"].split()[0]) * 1024 / 1e6


def answered(layout: Layout) -> bool:
    """Whether there is any answer."""
    with contextlib.suppress(FileNotFoundError), os.scandir(layout.output.path) as entries:
        return any(not entry.name.startswith(".") for entry in entries)
    return False


def first_result(layout: Layout, windows: Windows) -> tuple[float, float]:
    """Seconds from the start of the daemon to its first answer, and its largest memory until a
    while after, in MB.
    """
    largest = 0.0

    def grown(until: Callable[[], object]) -> bool:
        nonlocal largest
        largest = max(largest, rss_mb(daemon.pid))
        return bool(until())

    started = time.monotonic()
    with watching(layout) as daemon:
        wait_for(lambda: grown(lambda: answered(layout)), windows.patience_s, daemon)
        took = time.monotonic() - started
        end = time.monotonic() + windows.memory_s
        wait_for(lambda: grown(lambda: time.monotonic() > end), windows.patience_s, daemon)
    return took, largest


def idle(layout: Layout, windows: Windows) -> tuple[float, float]:
    """Percent of a core that the daemon uses when nothing happens, and its memory in MB."""
    with watching(layout) as daemon:

        def used(seconds: float) -> float:
            before, end = cpu_s(daemon.pid), time.monotonic() + seconds
            wait_for(lambda: time.monotonic() > end, windows.patience_s, daemon)
            return (cpu_s(daemon.pid) - before) / seconds

        wait_for(layout.work.path.is_dir, windows.patience_s, daemon)
        wait_for(lambda: used(windows.calm_s) < _CALM, windows.patience_s, daemon)
        return used(windows.idle_s) * 100, rss_mb(daemon.pid)


# ── the door alone ──


def scans(layout: Layout, seconds: float) -> tuple[float, float]:
    """The first scan of a folder, and the longest of those that follow until all its pairs have
    settled; in seconds.
    """
    scanner = Scanner(layout, FolderOptions(mode="poll", settle_s=seconds), threading.Event())
    lengths: list[float] = []
    ready: list[PendingJob] = []
    while not ready:
        started = time.monotonic()
        ready = scanner.scan(started, [])
        lengths.append(time.monotonic() - started)
    scanner.close()
    return lengths[0], max(lengths[1:], default=lengths[0])


def door_alone(layout: Layout, seconds: float) -> float:
    """Jobs a second that the door hands out and puts away again, one after the other, with an
    answer of a few bytes.
    """
    stop, jobs = threading.Event(), 0
    started, end = None, 0.0
    with FolderSource(layout, FolderOptions(mode="poll", settle_s=0.0, once=True)) as source:
        for job in source.jobs(stop):
            if started is None:
                started = time.monotonic()
                end = started + seconds
            source.deliver(job, [OutputFile(".txt", "text/plain", b"answer")])
            jobs += 1
            if time.monotonic() > end:
                stop.set()
    return jobs / (time.monotonic() - (started or 0.0))


# ── the table ──


def measure(
    root: Path, pairs: int, windows: Windows, say: Callable[[str], None] = print
) -> list[Line]:
    """All measurements, each on a crowd of its own below `root`."""
    few, many = f"{min(_FEW, pairs):,}", f"{pairs:,}"
    say(f"making {many} pairs …")
    crowd = make_crowd(root / "crowd", pairs)
    first, longest = scans(crowd, min(2.0, windows.memory_s))
    lines = [
        Line(f"first scan of {many} pairs", first, "s", 1.0),
        Line("longest scan after it", longest, "s", 1.0),
    ]
    say("the daemon, with few pairs and with the crowd …")
    small = make_crowd(root / "few", min(_FEW, pairs))
    took_small, small_mb = first_result(small, windows)
    took, large_mb = first_result(crowd, windows)
    lines += [
        Line(f"first result with {many} pairs waiting", took, "s", 5.0),
        Line(f"  the same with {few}", took_small, "s"),
        Line("memory of the daemon, more than with few", large_mb - small_mb, "MB", 200.0),
        Line(f"  with {few}", small_mb, "MB"),
    ]
    say("the door alone …")
    shutil.rmtree(root / "few")
    lines += [
        Line(
            "door alone, with few",
            door_alone(make_crowd(root / "few", min(20 * _FEW, pairs)), windows.door_s),
            "jobs/s",
        ),
        Line("door alone, with the crowd", door_alone(crowd, windows.door_s), "jobs/s"),
    ]
    shutil.rmtree(root / "crowd")
    say(f"making {many} pictures and as many prompts that do not belong together …")
    apart = make_crowd(root / "apart", pairs, apart=True)
    percent, idle_mb = idle(apart, windows)
    return [
        *lines,
        Line("idle: a core, with pictures and prompts that wait alone", percent, "%", 1.0),
        Line("  memory then, more than with few pairs", idle_mb - small_mb, "MB", 200.0),
    ]


def main(arguments: list[str] | None = None) -> int:
    """0; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument(
        "--work", type=Path, default=Path.cwd(), help="the crowd is made below this folder"
    )
    options = parser.parse_args(arguments)
    logger.disable("sam_poll")  # a line for each job of the door alone
    root = Path(tempfile.mkdtemp(prefix="crowd-", dir=options.work))
    try:
        lines = measure(root, options.pairs, Windows(), lambda text: print(text, file=sys.stderr))
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print("\n".join(map(str, lines)))
    return int(any(line.goal is not None and line.measured > line.goal for line in lines))


if __name__ == "__main__":
    sys.exit(main())
