"""Mosaics with a watcher and workers: all workers take tiles, also when some of them end."""

from __future__ import annotations

import errno
import threading
from contextlib import ExitStack
from typing import Any

import pytest

from sam_poll.core.telemetry import Telemetry
from sam_poll.share import mosaic_workspace
from sam_poll.share.mosaic_workspace import MosaicWorkspace
from tests.conftest import Share, wait_until
from tests.support.cluster_sources import DramatiqWorker, holds, watcher
from tests.support.mosaic_jobs import NAMES, Eyes, answered, drop_mosaic, kept, pipeline
from tests.support.mosaic_jobs import eyes as eyes


@pytest.fixture
def server(redis_only: Any) -> Any:
    return redis_only


@pytest.fixture(autouse=True)
def _looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosaic_workspace, "LOOK_S", 0.0)


def worker(share: Share, server: Any) -> DramatiqWorker:
    telemetry = Telemetry()
    made = pipeline(telemetry=telemetry)
    worker = DramatiqWorker(share, server, made.run, telemetry)
    worker.source.device_count = made.device_count
    return worker


@pytest.mark.slow
def test_workers_take_tiles_of_one_mosaic_side_by_side(
    share: Share, server: Any, eyes: Eyes
) -> None:
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


@pytest.mark.slow
def test_worker_that_stops_leaves_its_mosaic_to_another_which_continues(
    share: Share, server: Any, eyes: Eyes
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


@pytest.mark.slow
def test_share_error_while_looking_for_mosaics_ends_no_worker(
    share: Share, server: Any, eyes: Eyes, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, failed = MosaicWorkspace.helper_jobs, threading.Event()

    def helper_jobs(self: MosaicWorkspace, device_count: int, *args: Any, **more: Any) -> Any:
        if device_count and not failed.is_set():  # the watcher has none
            failed.set()
            raise OSError(errno.EIO, "Input/output error")
        return really(self, device_count, *args, **more)

    monkeypatch.setattr(MosaicWorkspace, "helper_jobs", helper_jobs)
    with watcher(share, server), worker(share, server):
        assert failed.wait(30)
        drop_mosaic(share)
        wait_until(lambda: answered(share))
