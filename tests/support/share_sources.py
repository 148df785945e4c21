"""Job sources of a share for tests that inject errors, and claims of other daemons."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sam_poll.core.types import Job, OutputFile
from sam_poll.share.claims import liveness
from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.source import FolderSource
from tests.conftest import Share

ANSWER = [OutputFile(".txt", "text/plain", b"answer")]
EIO = OSError(errno.EIO, "Input/output error")
ELSEWHERE = "other-1-abcdef-0"  # a daemon on another machine: its lock cannot be tested


@contextmanager
def open_source(share: Share, **options: Any) -> Iterator[FolderSource]:
    """Open a source that drains the share without waiting for anything."""
    with FolderSource(
        share.layout,
        FolderOptions(**{"settle_s": 0.0, "mode": "poll", "rescan_s": 0.02, **options}),
    ) as source:
        yield source


@contextmanager
def next_job_of(source: FolderSource) -> Iterator[Callable[[], Job]]:
    """Yield a call that returns the source's next job, within at most 10 s."""
    stop = threading.Event()
    alarm = threading.Timer(10, stop.set)
    alarm.start()
    jobs = source.jobs(stop)

    def next_job() -> Job:
        job = next(jobs, None)
        assert job, "no job came"
        return job

    try:
        yield next_job
    finally:
        stop.set()
        alarm.cancel()
        alarm.join()
        jobs.close()


def claim_left_by(
    share: Share, worker: str, name: str, *prompts: str, hold: str = "g1.a1.n1"
) -> Path:
    """Move a picture and prompts out of `in/` into the claim of another daemon."""
    path = share.work / f".{name}" / f"{hold}@{worker}"
    path.mkdir(parents=True)
    for file in (name, *prompts):
        if (share.input / file).exists():
            (share.input / file).rename(path / file)
    return path


def failing(times: int, original: Callable[..., Any], error: OSError = EIO) -> Callable[..., Any]:
    """Return a function that fails some times before it works."""
    left = [times]

    def call(*args: Any, **more: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError(error.errno, error.strerror)
        return original(*args, **more)

    return call


def let_others_look_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every other daemon count as dead."""

    def dead(self: liveness.LivenessTracker, worker: str, now: float) -> bool:
        return True

    monkeypatch.setattr(liveness.LivenessTracker, "dead", dead)
