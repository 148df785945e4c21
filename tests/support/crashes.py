"""A daemon that dies, or sleeps, before a step on the share."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from sam_poll.share.claims import liveness
from tests.conftest import Share

# Each process is forked from one that has imported this file and done nothing else: where OpenCV
# has worked in threads, a fork may find its locks taken for ever.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.end_to_end.test_crashes"])


PARTS = 8
STEPS = ("rename", "replace", "mkdir", "rmdir", "unlink", "link", "utime")


def parts(one: int) -> Iterable[int]:
    """One in eight steps for each change of the code; all of them in `make chaos`."""
    return range(PARTS) if os.environ.get("SAM_POLL_SWEEP") == "all" else [one]


class OthersLookDead(liveness.LivenessTracker):
    """Takes every other daemon for dead."""

    def dead(self, worker: str, now: float) -> bool:
        super().dead(worker, now)
        return True


def picture_of(share: Share) -> dict[str, object]:
    """What a share looks like, without times."""
    trees = {folder: share.tree(folder) for folder in ("input", "work", "done", "failed", "output")}
    bodies = {n: (share.output / n).read_bytes() for n in trees["output"]}
    roots = [(share.done, trees["done"]), (share.failed, trees["failed"])]
    inputs = [
        (n, (root / n).read_bytes())
        for root, names in roots
        for n in names
        if not n.endswith(".error.json")
    ]
    names = [p.name for p in share.work.iterdir()]
    claims = [n for n in names if n.startswith(".") and not n.startswith(".sam_poll-")]
    return {**trees, "bodies": bodies, "inputs": inputs, "claims": claims}


@contextmanager
def before_step(number: int, act: Callable[[], None]) -> Iterator[list[int]]:
    """Calls `act` before the step of this number that changes the share; counts all steps."""
    count = [0]
    really = {name: getattr(os, name) for name in STEPS}
    lock = threading.RLock()

    def counted(name: str) -> Callable[..., object]:
        def call(*args: object, **more: object) -> object:
            with lock:
                mine = count[0]
                count[0] += 1
            if mine == number:
                act()
            return really[name](*args, **more)

        return call

    for name in STEPS:
        setattr(os, name, counted(name))
    try:
        yield count
    finally:
        for name, function in really.items():
            setattr(os, name, function)
