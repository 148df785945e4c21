"""Mosaics on a share with other jobs and daemons, hangs and failures.

Mosaics do not block other jobs, do not wait for processes that hang, continue from finished tiles,
and leave nothing open.
"""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from typer.testing import CliRunner

from sam_poll.cli.main import app
from sam_poll.core.errors import ExitCode, UsageError
from sam_poll.core.safe_path import SafePath
from sam_poll.core.stats import LoopHeartbeat
from sam_poll.core.telemetry import Telemetry
from sam_poll.engines.fake import FakeEngine
from sam_poll.imaging import source_file
from sam_poll.mosaic import job as jobs
from sam_poll.mosaic import run, tile_store
from sam_poll.mosaic.tile_store import FOLDER, TileStore
from sam_poll.share import mosaic_workspace
from sam_poll.share.mosaic_workspace import MosaicWorkspace
from tests.conftest import BOX, Share, picture_bytes, wait_until
from tests.support.mosaic_jobs import (
    ASKED,
    OPTIONS,
    Eyes,
    answered,
    drain,
    drop_mosaic,
    kept,
    pipeline,
    source,
    watching,
)
from tests.support.mosaic_jobs import eyes as eyes
from tests.support.mosaic_paths import mosaic
from tools import mosaics


def noise() -> npt.NDArray[np.uint8]:
    """Write a picture of four tiles."""
    return np.random.default_rng(3).integers(0, 255, (100, 100, 3), np.uint8)


def drop_small(share: Share, stem: str) -> None:
    mosaics.write(share.input / f"{stem}.tif", noise())
    share.drop(f"{stem}.json", {"mosaic": ASKED})


@contextmanager
def taken(path: Path) -> Iterator[None]:
    """Hold a lock as another process would."""
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# ── beside other jobs ──


def test_mosaics_leave_capacity_for_other_jobs(share: Share, eyes: Eyes) -> None:
    eyes.stops_after = 2
    for number in range(20):
        drop_mosaic(share, f"ortho{number:02}", seed=number)
    with watching(share):
        assert eyes.stopped.wait(60)
        share.pair("dog")
        wait_until(lambda: "dog.jpg" in share.at_work())
        assert len([name for name in share.at_work() if name.endswith(".tif")]) == 2
        eyes.stops_after = 60
        eyes.stopped.clear()
        eyes.waits.set()
        wait_until(lambda: "dog.mask.png" in share.tree("output"))
        eyes.stops_after = None


def test_mosaics_wait_in_the_folder_and_are_all_processed(share: Share, eyes: Eyes) -> None:
    for number in range(5):
        drop_small(share, f"ortho{number}")
    for part in ("a", "b", "c"):
        share.drop(f"ortho0.{part}.json", {"mosaic": ASKED})
    share.drop("ortho1.json", BOX)
    drain(share)
    assert (share.tree("input"), share.tree("work"), share.tree("failed")) == ([], [], [])
    assert len([name for name in share.tree("output") if name.endswith(".stats.json")]) == 7


def test_exclusive_job_pauses_a_mosaic_and_does_not_wait_for_its_end(
    share: Share, eyes: Eyes
) -> None:
    eyes.stops_after = 5
    drop_mosaic(share)
    with watching(share, lease_s=2.0):
        assert eyes.stopped.wait(60)
        eyes.stops_after = 40
        eyes.stopped.clear()
        leave_behind(share, "dog")
        wait_until(lambda: "g2.a2" in str(share.at_work().get("dog.jpg")))
        eyes.waits.set()
        wait_until(lambda: "dog.mask.png" in share.tree("output"))
        assert not answered(share)
        eyes.stops_after = None
        eyes.waits.set()
        wait_until(lambda: answered(share))


def leave_behind(share: Share, stem: str) -> None:
    """Leave the claim of a daemon that ended during the job."""
    claim = share.root / f"aside/.{stem}.jpg/g1.a1.n1@gone-1-0-0"
    claim.mkdir(parents=True)
    (claim / f"{stem}.jpg").write_bytes(picture_bytes())
    (claim / f"{stem}.json").write_text(json.dumps(BOX))
    claim.parent.rename(share.work / f".{stem}.jpg")


def test_daemon_with_once_does_not_wait_for_anothers_mosaic(
    share: Share, eyes: Eyes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mosaic_workspace, "LOOK_S", 0.0)
    eyes.stops_after = 3
    drop_mosaic(share)
    with watching(share):
        assert eyes.stopped.wait(60)
        eyes.stops_after = None
        share.pair("dog")
        drain(share)
        assert len(kept(share)) == 3
        eyes.waits.set()
        wait_until(lambda: answered(share))


def test_slow_opening_of_a_picture_is_no_hang(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening takes long for a picture with a SHA-256, or with a stretch over all values."""
    held = threading.Event()
    pulse = LoopHeartbeat()
    really = source_file.check_file

    def slow(job: Any) -> None:
        assert held.wait(60)
        really(job)

    monkeypatch.setattr(source_file, "check_file", slow)
    monkeypatch.setattr(jobs, "_ON_STEP_INTERVAL_S", 0.01)
    drop_small(share, "ortho")
    made = pipeline(telemetry=Telemetry(device=pulse))
    with watching(share, made):
        wait_until(lambda: made.stats.now().advances > 3)
        held.set()
        wait_until(lambda: answered(share))


# ── processes that hang ──


def test_daemon_that_hangs_in_a_lost_mosaic_blocks_no_other(share: Share, eyes: Eyes) -> None:
    eyes.stops_after = 3
    drop_mosaic(share)
    with watching(share):
        assert eyes.stopped.wait(60)
        [folder] = (share.work / mosaic_workspace.FOLDER).iterdir()
        with taken(folder / "end.lock"):
            eyes.waits.set()
            wait_until(lambda: answered(share))


def test_command_waits_for_a_writer_only_while_it_has_a_heartbeat(
    tmp_path: Path, eyes: Eyes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "LONG_S", 0.3)
    mosaics.write(tmp_path / "a.tif", noise())
    (tmp_path / "out" / FOLDER).mkdir(parents=True)
    lock = tmp_path / "out" / FOLDER / "end.lock"
    ended = threading.Event()
    beat = threading.Event()
    made = list[Any]()

    def make() -> None:
        made.append(mosaic(tmp_path / "a.tif", tmp_path / "out", OPTIONS, FakeEngine))
        ended.set()

    with taken(lock):
        thread = threading.Thread(target=make)
        thread.start()
        wait_until(lambda: eyes.windows == 4)
        for _ in range(60):
            lock.touch()
            assert not ended.is_set()
            beat.wait(0.01)
        thread.join(60)
    assert made
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("labels.geojson", "labels.gpkg", "labels.tif", "stats.json")
    ]


# ── finished tiles ──


def test_command_ends_on_a_full_disk_with_a_remedy_and_continues_later(
    tmp_path: Path, eyes: Eyes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, body: bytes) -> None:
        if eyes.windows == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        really(path, body)

    mosaics.write(tmp_path / "a.tif", noise())
    words = [
        "mosaic",
        str(tmp_path / "a.tif"),
        "-o",
        str(tmp_path / "out"),
        "--tile",
        "64",
        "--padding",
        "16",
        "-m",
        "fake",
    ]
    really = tile_store.write_synced
    with monkeypatch.context() as patch:
        patch.setattr(tile_store, "write_synced", full)
        ended = CliRunner().invoke(app, words)
    said = " ".join(ended.output.split())
    assert ended.exit_code == ExitCode.SHARE
    assert "No space left on device" in said
    assert "start again with the same flags" in said
    assert CliRunner().invoke(app, words).exit_code == 0
    assert eyes.windows == 3 + 2


def half_done(share: Share, eyes: Eyes) -> Path:
    """Stop a mosaic after four of its tiles; return its folder."""
    eyes.stops_after = 3
    drop_mosaic(share)
    with watching(share) as stop:
        assert eyes.stopped.wait(60)
        stop.set()
        eyes.waits.set()
    assert len(kept(share)) == eyes.windows == 4
    [folder] = (share.work / mosaic_workspace.FOLDER).iterdir()
    return folder


@pytest.mark.parametrize("spoil", [b"", b"no tile", b"cut"])
def test_damaged_tile_is_computed_again(share: Share, eyes: Eyes, spoil: bytes) -> None:
    half_done(share, eyes)
    tile = sorted(kept(share))[1]
    tile.write_bytes(tile.read_bytes()[:-40] if spoil == b"cut" else spoil)
    with watching(share):
        wait_until(lambda: answered(share))
    assert (eyes.windows, share.tree("failed")) == (50, [])


def test_finished_tiles_are_counted_before_the_device_thread(
    share: Share, eyes: Eyes, monkeypatch: pytest.MonkeyPatch
) -> None:
    half_done(share, eyes)
    really, looks = TileStore.covered, list[int]()

    def covered(self: TileStore, number: int) -> Any:
        looks.append(number)
        return really(self, number)

    monkeypatch.setattr(TileStore, "covered", covered)
    with source(share, once=True) as opened:
        job = next(opened.jobs(threading.Event()))
        pieces = jobs.begin(job, lambda: None, model="fake")
        assert looks == [0, 1, 2, 3]
        assert pieces.take(FakeEngine())
        pieces.close()
        opened.requeue(job)
    assert looks == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("body", [b"", b"{", b"[]"])
def test_unreadable_job_file_restarts_the_mosaic(share: Share, eyes: Eyes, body: bytes) -> None:
    folder = half_done(share, eyes)
    (folder / "job.json").write_bytes(body)
    drain(share)
    assert answered(share)
    assert share.tree("failed") == []


def test_removed_tiles_are_computed_again(share: Share, eyes: Eyes) -> None:
    eyes.stops_after = 3
    drop_mosaic(share)
    with watching(share):
        assert eyes.stopped.wait(60)
        shutil.rmtree(share.work / mosaic_workspace.FOLDER)
        eyes.waits.set()
        wait_until(lambda: answered(share))
    assert (share.tree("failed"), share.tree("work")) == ([], [])


def test_helper_that_is_too_late_leaves_no_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="over"):
        TileStore(SafePath.at(tmp_path / "gone"), {"picture": "a"}, "join")
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize(
    "about",
    [
        "[]",
        '{"claim": [], "waits": {}, "picture": 3, "id": 1, "name": null, "prompts": []}',
        '{"claim": ".a", "waits": "a", "picture": 3, '
        '"id": "a", "name": "a", "prompts": {"mosaic": true}}',
        '{"claim": ".a", "waits": "a", "picture": ["moon", "a"], '
        '"id": "a", "name": "a", "prompts": {"mosaic": true}}',
        '{"claim": ".a", "waits": "a", "picture": ["in", "a"], '
        '"id": "a", "name": "a", "prompts": {"later": true}}',
        '{"claim": ".a", "waits": "a", "picture": ["work", ""], '
        '"id": "a", "name": "", "prompts": {"point": 1}}',
    ],
)
def test_note_of_another_version_is_ignored(share: Share, about: str) -> None:
    drop_small(share, "ortho")
    folder = share.work / mosaic_workspace.FOLDER / "of-another"
    folder.mkdir(parents=True)
    (folder / "open.json").write_text(about)
    assert MosaicWorkspace(share.layout).helper_jobs(3, lambda outer: False) == []
    drain(share)
    assert answered(share)


def test_unreadable_picture_is_refused(share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    really = SafePath.open_file

    def refused(path: SafePath, flags: int) -> int:
        if path.suffix == ".tif":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really(path, flags)

    drop_small(share, "ortho")
    monkeypatch.setattr(SafePath, "open_file", refused)
    drain(share)
    said = share.error("ortho")
    assert (said["code"], said["place"]) == ("picture", "ortho.tif")
    assert "retry" in said["remedy"]


def test_mosaic_leaves_no_thread_and_no_open_file(share: Share, eyes: Eyes) -> None:
    def open_now() -> tuple[list[str], int]:
        links = [path.resolve() for path in Path("/proc/self/fd").iterdir()]
        return [t.name for t in threading.enumerate() if "windows" in t.name], sum(
            ".tif" in str(p) for p in links
        )

    for number in range(3):
        drop_small(share, f"ortho{number}")
    share.drop("bad.tif", b"none")
    share.drop("bad.json", {"mosaic": True})
    drain(share)
    wait_until(lambda: open_now() == ([], 0))
    assert source(share).device_count == 1
