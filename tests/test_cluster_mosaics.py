"""Mosaics by way of a watcher and workers: all take tiles, whoever ends, and a share in trouble ends no worker."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sam_poll.doors import scratch
from sam_poll.doors.scratch import Scratch
from sam_poll.health import Signs
from tests.conftest import Share, wait_until
from tests.redis_server import Server
from tests.test_cluster_doors import Running, holds, watcher, worker_door
from tests.test_mosaic_jobs import NAMES, Eyes, drop_mosaic, kept, pipeline
from tests.test_mosaic_jobs import eyes as eyes
from tests.test_mosaic_share import answered


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "redis") as made:
        yield made


@pytest.fixture(autouse=True)
def _looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "LOOK_S", 0.0)


def worker(share: Share, server: Server) -> Running:
    signs = Signs()
    made = pipeline(stats=signs.stats, alarms=signs.alarms)
    door = worker_door(share, server, signs)
    door.hands = made.hands
    return Running(door, made.run, signs)


def test_workers_take_tiles_of_one_mosaic_side_by_side(share: Share, server: Server, eyes: Eyes) -> None:
    eyes.stops_after = 3
    with watcher(share, server), worker(share, server):
        drop_mosaic(share)
        assert eyes.stopped.wait(60)  # and holds one tile
        eyes.stops_after = None
        with worker(share, server):
            wait_until(lambda: len(kept(share)) == 48)
            assert share.tree("output") == []
            eyes.waits.set()
            wait_until(lambda: answered(share))
    assert eyes.windows == 49
    assert (share.tree("work"), share.tree("failed")) == ([], [])


def test_a_worker_that_stops_gives_its_mosaic_to_another_one_which_goes_on(
    share: Share, server: Server, eyes: Eyes
) -> None:
    eyes.stops_after = 3
    with ExitStack() as stack:
        stack.enter_context(watcher(share, server))
        with worker(share, server) as first:
            drop_mosaic(share)
            assert eyes.stopped.wait(60)
            first.stop.set()
            eyes.waits.set()
        assert len(kept(share)) == 4
        stack.enter_context(worker(share, server))
        wait_until(lambda: answered(share))
    assert eyes.windows == 49
    assert share.tree("output") == [f"ortho{name}" for name in NAMES]
    assert not holds(share)


def test_a_share_that_fails_while_a_worker_looks_for_mosaics_ends_no_worker(
    share: Share, server: Server, eyes: Eyes, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, failed = Scratch.helps, threading.Event()

    def helps(self: Scratch, hands: int, *args: Any, **more: Any) -> Any:
        if hands and not failed.is_set():  # the watcher has none
            failed.set()
            raise OSError(errno.EIO, "Input/output error")
        return really(self, hands, *args, **more)

    monkeypatch.setattr(Scratch, "helps", helps)
    with watcher(share, server), worker(share, server):
        assert failed.wait(30)
        drop_mosaic(share)
        wait_until(lambda: answered(share))
