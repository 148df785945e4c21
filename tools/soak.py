"""`make soak`: 10,000 jobs through one daemon; its memory, open handles and threads must stay flat.

Before them come 3,000 that are not judged: caches fill. What is judged is the slope over the rest,
by least squares. The allocator is told to give back at once what it does not need: left alone,
glibc keeps up to 15 MiB in its arenas, grows for some 15,000 jobs and shrinks again, so that no
slope can be told.

The network is the fake one, so that the daemon itself is judged; `--model demo` takes a real one
(2,000 jobs of it tell a leak in the engine's room).

Limitations: a leak on a path that these jobs do not take; and one smaller than the
allowed slope."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tools.chaos_jobs import File, move_in, pair
from tools.chaos_share import ChaosError, Daemon, judge, new_share

_BACKLOG = 100  # jobs that lie in in/ at most
_WARM = 3_000  # jobs that are not judged
_ALLOCATOR = {
    "MALLOC_ARENA_MAX": 1,
    "MALLOC_TRIM_THRESHOLD_": 131_072,
    "MALLOC_MMAP_THRESHOLD_": 131_072,
}
_EVERY_S = 0.5


@dataclass(frozen=True)
class Sample:
    """The daemon at one moment."""

    jobs: int
    rss_kib: int
    handles: int
    threads: int


@dataclass(frozen=True)
class Limits:
    """How much each may grow in 1,000 jobs. Handles and threads come and go by a few, so the slope
    is never quite 0.
    """

    rss_kib: float = 150.0
    handles: float = 0.5
    threads: float = 0.5


def sample(pid: int, jobs: int) -> Sample:
    """Look at a process."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return Sample(
        jobs,
        int(status["VmRSS"].split()[0]),
        _count(Path(f"/proc/{pid}/fd")),
        int(status["Threads"]),
    )


def _count(folder: Path, ending: str = "") -> int:
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        return sum(entry.name.endswith(ending) for entry in entries)
    return 0


def slope(samples: list[Sample], what: str, warm: int = _WARM) -> float:
    """Growth of one of a sample's numbers in 1,000 jobs, after the first `warm` of them."""
    judged = [s for s in samples if s.jobs >= warm]
    if len(judged) < 3:
        raise ChaosError(f"{len(judged)} samples are too few to tell a slope")
    found = np.polyfit([s.jobs / 1000 for s in judged], [getattr(s, what) for s in judged], 1)
    return float(found[0])


def soak(
    root: Path, jobs: int, *, every_s: float = _EVERY_S, tell: bool = False, model: str = "fake"
) -> list[Sample]:
    """Feed `jobs` jobs to one daemon, one in fifty of them to be refused; returns the samples."""
    share = new_share(root)
    dropped: list[File] = []
    samples: list[Sample] = []
    looked = time.monotonic()
    # A cache of 1 MiB is full after about 1,000 of the fake network's embeddings.
    given: dict[str, Any] = {
        "pipeline__cache_mib": 1,
        "watch__settle_s": 0.1,
        "CHAOS_FORGET": 1,
        **_ALLOCATOR,
    }
    with Daemon(share, module="tools.chaos_daemon", model=model, **given) as daemon:
        daemon.started()
        ended = 0
        while ended < jobs:
            while len(dropped) // 2 < min(jobs, ended + _BACKLOG):
                dropped += _drop(share, len(dropped) // 2)
            time.sleep(0.05)
            if not daemon.alive:
                raise ChaosError(
                    f"the daemon ended with {daemon.process.returncode}: {daemon.tail()}"
                )
            ended = _count(share / "done", ".json") + _count(share / "failed", ".error.json")
            if time.monotonic() - looked > every_s:
                looked = time.monotonic()
                samples.append(sample(daemon.pid, ended))
                if tell and len(samples) % 40 == 0:
                    print(f"  {samples[-1]}", file=sys.stderr, flush=True)
        daemon.stop()
        daemon.lines()
    judge(share, dropped).hold()
    return samples


def _drop(share: Path, number: int) -> list[File]:
    files = pair(f"s{number:05d}", number)
    if number % 50 == 49:
        body = b'{"label": "s%05d", "bbox": 1}' % number
        files = [
            File(files[0].name, files[0].body, frozenset({"failed"})),
            File(files[1].name, body, frozenset({"failed"})),
        ]
    for file in files:
        move_in(share, file.name, file.body)
    return files


def main() -> int:
    """Run it and print the numbers; 0 if all are flat."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--warm", type=int, default=_WARM, help="jobs before, which are not judged")
    parser.add_argument(
        "--model", default="fake", help="the network: fake, demo, or any other that is here"
    )
    given = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="sam_poll-soak-"))
    started = time.monotonic()
    try:
        samples = soak(root, given.warm + given.jobs, tell=True, model=given.model)
    finally:
        shutil.rmtree(root)
    seconds = time.monotonic() - started
    print(
        f"jobs: {given.jobs} after {given.warm} to warm up\nseconds: {seconds:.0f}\nsamples: "
        f"{len(samples)}"
    )
    flat = True
    for what, limit in vars(Limits()).items():
        values, found = [getattr(s, what) for s in samples], slope(samples, what, given.warm)
        flat &= found <= limit
        print(
            f"{what}: {values[0]} at first, {max(values)} at most, {values[-1]} at last; "
            f"{found:+.2f} in 1,000 jobs after the warm-up (at most {limit:g})"
        )
    print("flat" if flat else "NOT flat")
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
