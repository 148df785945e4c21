"""Mosaics beside other jobs, other daemons and trouble: they hold nobody up, wait for nobody who hangs, take up what
was done, and leave nothing open."""

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

from sam_poll import bytesof
from sam_poll.cli import app
from sam_poll.doors import scratch
from sam_poll.doors.scratch import Scratch
from sam_poll.engines.fake import FakeEngine
from sam_poll.errors import ExitCode, UsageError
from sam_poll.mosaic import jobs, run, state
from sam_poll.mosaic.state import FOLDER, State
from sam_poll.safe_path import SafePath
from sam_poll.stats import Pulse
from tests.conftest import BOX, Share, picture_bytes, wait_until
from tests.mosaic_paths import mosaic
from tests.test_mosaic_jobs import ASKED, NAMES, WISH, Eyes, door, drain, drop_mosaic, kept, pipeline, watching
from tests.test_mosaic_jobs import eyes as eyes
from tools import mosaics


def noise() -> npt.NDArray[np.uint8]:
    """Four tiles."""
    return np.random.default_rng(3).integers(0, 255, (100, 100, 3), np.uint8)


def drop_small(share: Share, stem: str) -> None:
    mosaics.write(share.input / f"{stem}.tif", noise())
    share.drop(f"{stem}.json", {"mosaic": ASKED})


def answered(share: Share, stem: str = "ortho") -> bool:
    return all((share.output / f"{stem}{name}").is_file() for name in NAMES)


@contextmanager
def taken(path: Path) -> Iterator[None]:
    """Somebody holds this lock."""
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# ── beside other jobs ──


def test_many_mosaics_leave_room_for_other_jobs(share: Share, eyes: Eyes) -> None:
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


def test_mosaics_wait_in_the_folder_for_their_turn_and_all_have_it(share: Share, eyes: Eyes) -> None:
    for number in range(5):
        drop_small(share, f"ortho{number}")
    for part in ("a", "b", "c"):
        share.drop(f"ortho0.{part}.json", {"mosaic": ASKED})
    share.drop("ortho1.json", BOX)
    drain(share)
    assert (share.tree("input"), share.tree("work"), share.tree("failed")) == ([], [], [])
    assert len([name for name in share.tree("output") if name.endswith(".stats.json")]) == 7


def test_a_job_that_is_run_alone_lets_a_mosaic_pause_and_does_not_wait_for_its_end(share: Share, eyes: Eyes) -> None:
    eyes.stops_after = 5
    drop_mosaic(share)
    with watching(share, lease_s=2.0):
        assert eyes.stopped.wait(60)
        eyes.stops_after = 40
        eyes.stopped.clear()
        leave_behind(share, "dog")
        wait_until(lambda: "dog.jpg" in share.at_work() and "g2.a2" in str(share.at_work()["dog.jpg"]))
        eyes.waits.set()
        wait_until(lambda: "dog.mask.png" in share.tree("output"))
        assert not answered(share)
        eyes.stops_after = None
        eyes.waits.set()
        wait_until(lambda: answered(share))


def leave_behind(share: Share, stem: str) -> None:
    """A claim of a daemon that ended while it was at work on it."""
    claim = share.root / f"aside/.{stem}.jpg/g1.a1.n1@gone-1-0-0"
    claim.mkdir(parents=True)
    (claim / f"{stem}.jpg").write_bytes(picture_bytes())
    (claim / f"{stem}.json").write_text(json.dumps(BOX))
    claim.parent.rename(share.work / f".{stem}.jpg")


def test_who_drains_a_folder_does_not_stay_for_anothers_mosaic(
    share: Share, eyes: Eyes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "LOOK_S", 0.0)
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


def test_a_picture_that_takes_long_to_open_is_no_hang(share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one whose SHA-256 is asked for, or that is stretched by all its values."""
    held, pulse, really = threading.Event(), Pulse(), bytesof.check_file

    def slow(job: Any) -> None:
        assert held.wait(60)
        really(job)

    monkeypatch.setattr(bytesof, "check_file", slow)
    monkeypatch.setattr(jobs, "_BREATH_S", 0.01)
    drop_small(share, "ortho")
    made = pipeline(device=pulse)
    with watching(share, made):
        wait_until(lambda: made.stats.now().advances > 3)
        held.set()
        wait_until(lambda: answered(share))


# ── who hangs ──


def test_who_hangs_while_it_puts_together_what_is_another_ones_now_holds_nobody_up(share: Share, eyes: Eyes) -> None:
    eyes.stops_after = 3
    drop_mosaic(share)
    with watching(share):
        assert eyes.stopped.wait(60)
        [folder] = (share.work / scratch.FOLDER).iterdir()
        with taken(folder / "end.lock"):
            eyes.waits.set()
            wait_until(lambda: answered(share))


def test_the_command_waits_for_who_puts_together_only_as_long_as_that_one_moves(
    tmp_path: Path, eyes: Eyes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "LONG_S", 0.3)
    mosaics.write(tmp_path / "a.tif", noise())
    (tmp_path / "out" / FOLDER).mkdir(parents=True)
    lock = tmp_path / "out" / FOLDER / "end.lock"
    ended, beat, made = threading.Event(), threading.Event(), list[Any]()

    def make() -> None:
        made.append(mosaic(tmp_path / "a.tif", tmp_path / "out", WISH, FakeEngine))
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


# ── what was done ──


def test_a_full_disk_ends_the_command_with_a_remedy_and_it_goes_on_afterwards(
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
    really = state.write_synced
    with monkeypatch.context() as patch:
        patch.setattr(state, "write_synced", full)
        ended = CliRunner().invoke(app, words)
    said = " ".join(ended.output.split())
    assert ended.exit_code == ExitCode.SHARE
    assert "No space left on device" in said
    assert "start it again with the same flags" in said
    assert CliRunner().invoke(app, words).exit_code == 0
    assert eyes.windows == 3 + 2


def half_done(share: Share, eyes: Eyes) -> Path:
    """A mosaic that was stopped with four of its tiles done; returns its folder."""
    eyes.stops_after = 3
    drop_mosaic(share)
    with watching(share) as stop:
        assert eyes.stopped.wait(60)
        stop.set()
        eyes.waits.set()
    assert len(kept(share)) == eyes.windows == 4
    [folder] = (share.work / scratch.FOLDER).iterdir()
    return folder


@pytest.mark.parametrize("spoil", [b"", b"no tile", b"cut"])
def test_a_tile_that_a_power_cut_has_spoilt_is_made_anew(share: Share, eyes: Eyes, spoil: bytes) -> None:
    half_done(share, eyes)
    tile = sorted(kept(share))[1]
    tile.write_bytes(tile.read_bytes()[:-40] if spoil == b"cut" else spoil)
    with watching(share):
        wait_until(lambda: answered(share))
    assert (eyes.windows, share.tree("failed")) == (50, [])


def test_what_is_done_is_looked_through_before_it_is_the_devices_turn(
    share: Share, eyes: Eyes, monkeypatch: pytest.MonkeyPatch
) -> None:
    half_done(share, eyes)
    really, looks = State.table, list[int]()

    def table(self: State, number: int) -> Any:
        looks.append(number)
        return really(self, number)

    monkeypatch.setattr(State, "table", table)
    with door(share, once=True) as opened:
        job = next(opened.jobs(threading.Event()))
        pieces = jobs.begin(job, lambda: None, model="fake")
        assert looks == [0, 1, 2, 3]
        assert pieces.take(FakeEngine())
        pieces.close()
        opened.release(job)
    assert looks == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("body", [b"", b"{", b"[]"])
def test_where_it_cannot_be_read_what_was_begun_it_begins_anew(share: Share, eyes: Eyes, body: bytes) -> None:
    folder = half_done(share, eyes)
    (folder / "job.json").write_bytes(body)
    drain(share)
    assert answered(share)
    assert share.tree("failed") == []


def test_what_is_taken_away_in_the_middle_is_done_again(share: Share, eyes: Eyes) -> None:
    eyes.stops_after = 3
    drop_mosaic(share)
    with watching(share):
        assert eyes.stopped.wait(60)
        shutil.rmtree(share.work / scratch.FOLDER)
        eyes.waits.set()
        wait_until(lambda: answered(share))
    assert (share.tree("failed"), share.tree("work")) == ([], [])


def test_who_comes_too_late_to_help_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="over"):
        State(SafePath.at(tmp_path / "gone"), {"picture": "a"}, "join")
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize(
    "about",
    [
        "[]",
        '{"claim": [], "waits": {}, "picture": 3, "id": 1, "name": null, "prompts": []}',
        '{"claim": ".a", "waits": "a", "picture": 3, "id": "a", "name": "a", "prompts": {"mosaic": true}}',
        '{"claim": ".a", "waits": "a", "picture": ["moon", "a"], "id": "a", "name": "a", "prompts": {"mosaic": true}}',
        '{"claim": ".a", "waits": "a", "picture": ["in", "a"], "id": "a", "name": "a", "prompts": {"later": true}}',
        '{"claim": ".a", "waits": "a", "picture": ["work", ""], "id": "a", "name": "", "prompts": {"point": 1}}',
    ],
)
def test_a_note_of_another_version_is_passed_over(share: Share, about: str) -> None:
    drop_small(share, "ortho")
    folder = share.work / scratch.FOLDER / "of-another"
    folder.mkdir(parents=True)
    (folder / "open.json").write_text(about)
    assert Scratch(share.layout).helps(3, lambda outer: False) == []
    drain(share)
    assert answered(share)


def test_one_that_this_user_may_not_read_is_refused(share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_no_thread_and_no_file_stays_open_after_a_mosaic(share: Share, eyes: Eyes) -> None:
    def open_now() -> tuple[list[str], int]:
        links = [path.resolve() for path in Path("/proc/self/fd").iterdir()]
        return [t.name for t in threading.enumerate() if "windows" in t.name], sum(".tif" in str(p) for p in links)

    for number in range(3):
        drop_small(share, f"ortho{number}")
    share.drop("bad.tif", b"none")
    share.drop("bad.json", {"mosaic": True})
    drain(share)
    wait_until(lambda: open_now() == ([], 0))
    assert door(share).hands == 1
