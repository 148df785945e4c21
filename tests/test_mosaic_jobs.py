"""A picture larger than memory dropped into the folder: answered as the command answers it, in turns with other jobs,
by several daemons; and whatever happens on the way nothing that is done is done again."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from sam_poll import formats, settings
from sam_poll.app import pieces_of
from sam_poll.cli import app
from sam_poll.doors import scratch
from sam_poll.doors.folder import FolderDoor
from sam_poll.doors.scan import Manners
from sam_poll.engines.fake import FakeEngine
from sam_poll.fleet import Fleet, Post
from sam_poll.member import Equipment
from sam_poll.mosaic import jobs, work
from sam_poll.mosaic.passes import Labelled, Passes
from sam_poll.pipeline import Pipeline, Sizes
from sam_poll.types import ADVANCED, Everything
from tests.conftest import Share, wait_until
from tests.mosaic_paths import mosaic
from tools import mosaics

SIDE, TILE = 400, 64  # 49 tiles
ASKED = {"tile": TILE, "padding": 16, "points_per_side": 4, "min_area": 20, "iou": 0.5, "stability": 0.5}
WISH = work.Wish(TILE, 16, Passes(Everything(points_per_side=4, min_area=20, iou=0.5, stability=0.5)), "fake")
NAMES = (".labels.geojson", ".labels.gpkg", ".labels.tif", ".stats.json")


def drop_mosaic(share: Share, stem: str = "ortho", seed: int = 1, **asked: Any) -> None:
    noise = np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    share.input.joinpath(stem).parent.mkdir(parents=True, exist_ok=True)
    mosaics.write(share.input / f"{stem}.tif", noise)
    share.drop(f"{stem}.json", {"mosaic": ASKED, **asked})


@dataclass
class Eyes:
    """In the place of the network: quick, counts, and stops the world where it is told to."""

    windows: int = 0
    stops_after: int | None = None
    waits: threading.Event = field(default_factory=threading.Event)
    stopped: threading.Event = field(default_factory=threading.Event)

    def __call__(self, engine: Any, pixels: Any, valid: Any, *_: Any, **__: Any) -> Labelled:
        if self.windows == self.stops_after:
            self.stopped.set()
            assert self.waits.wait(60)
        self.windows += 1
        bright = pixels[..., 0].reshape(-1).mean() > 0
        return Labelled((valid & bright).astype(np.uint16), np.array([0.5], np.float32))


@pytest.fixture
def eyes(monkeypatch: pytest.MonkeyPatch) -> Eyes:
    made = Eyes()
    monkeypatch.setattr(work, "labelled", made)
    return made


def pipeline(**more: Any) -> Pipeline:
    chosen = formats.load(["mask"], formats.FormatOptions())
    return Pipeline(FakeEngine(), chosen, pieces=partial(jobs.begin, model="fake"), **more)


def door(share: Share, **manners: Any) -> FolderDoor:
    made = FolderDoor(share.layout, Manners(**{"quiet_s": 0.0, "events": False, "rescan_s": 0.05, **manners}))
    made.hands = 1
    return made


def drain(share: Share, **more: Any) -> Pipeline:
    made = pipeline(**more)
    with door(share, once=True) as opened:
        made.run(opened, threading.Event())
    return made


@contextmanager
def watching(share: Share, made: Pipeline | Fleet | None = None, **manners: Any) -> Iterator[threading.Event]:
    """A daemon in a thread, until the end of the block; the event stops it."""
    stop, running = threading.Event(), made or pipeline()

    def watch() -> None:
        with door(share, **manners) as opened:
            opened.hands = running.hands
            running.run(opened, stop)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        thread.join(60)
        assert not thread.is_alive()


def kept(share: Share) -> list[Path]:
    return list((share.work / scratch.FOLDER).glob("*/*/tile-*.npz"))


def test_a_dropped_mosaic_is_answered_as_the_command_answers_it(share: Share) -> None:
    drop_mosaic(share, "cam1/ortho")
    expected = mosaic(share.input / "cam1/ortho.tif", share.root / "alone", WISH, FakeEngine)
    assert expected["labels"] > 9
    assert drain(share).stats.now().objects == expected["labels"]
    assert share.tree("output") == [f"cam1/ortho{name}" for name in NAMES]
    out = share.output / "cam1"
    assert (out / "ortho.labels.tif").read_bytes() == (share.root / "alone/labels.tif").read_bytes()
    assert (out / "ortho.labels.geojson").read_bytes() == (share.root / "alone/labels.geojson").read_bytes()
    assert json.loads((out / "ortho.stats.json").read_text()) == expected
    assert share.tree("done") == ["cam1/ortho.json", "cam1/ortho.tif"]
    assert not list(share.work.glob(f"{scratch.FOLDER}/*"))


def test_between_two_tiles_it_is_the_turn_of_others(share: Share, eyes: Eyes) -> None:
    eyes.stops_after = 5
    drop_mosaic(share)
    with watching(share):
        assert eyes.stopped.wait(60)
        share.pair("dog")
        wait_until(lambda: "dog.jpg" in share.at_work())
        eyes.stops_after = 40
        eyes.stopped.clear()
        eyes.waits.set()
        wait_until(lambda: "dog.mask.png" in share.tree("output"))
        wait_until(lambda: "ortho.stats.json" in share.tree("output"))
    [dog] = share.output.glob("dog.mask.png")
    assert dog.stat().st_mtime_ns < (share.output / "ortho.stats.json").stat().st_mtime_ns


def stop_after_a_part(share: Share, eyes: Eyes) -> None:
    """A daemon that is asked to stop while it makes the 21st of the 49 tiles."""
    eyes.stops_after = 20
    drop_mosaic(share)
    with watching(share) as stop:
        assert eyes.stopped.wait(60)
        stop.set()
        eyes.waits.set()


def test_stopped_it_goes_back_and_what_is_done_is_not_done_again(share: Share, eyes: Eyes) -> None:
    stop_after_a_part(share, eyes)
    assert share.tree("input") == ["ortho.json", "ortho.tif"]
    assert len(kept(share)) == eyes.windows == 21
    drain(share)
    assert eyes.windows == 49
    assert share.tree("output") == [f"ortho{name}" for name in NAMES]
    assert not kept(share)


def test_another_picture_of_the_same_name_begins_anew(share: Share, eyes: Eyes) -> None:
    stop_after_a_part(share, eyes)
    drop_mosaic(share, seed=2)
    drain(share)
    assert eyes.windows == 21 + 49


def test_a_run_that_did_a_part_is_no_failed_attempt(share: Share) -> None:
    drop_mosaic(share)
    attempts = []
    for advances in (True, True, False, False, False, False):
        with door(share, once=True, attempts=2) as opened:
            job = next(opened.jobs(threading.Event()))
            attempts.append((job.attempt, job.fault and job.fault.code))
            if advances:
                assert job.scratch
                (job.scratch / ADVANCED).touch()
    assert attempts == [(1, None), (1, None), (1, None), (2, None), (3, "poison"), (4, "poison")]


def test_who_is_idle_takes_tiles_of_anothers_mosaic(share: Share, eyes: Eyes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "LOOK_S", 0.0)
    eyes.stops_after = 3
    drop_mosaic(share)
    with watching(share):
        assert eyes.stopped.wait(60)  # and holds one tile
        eyes.stops_after = None
        with watching(share):
            wait_until(lambda: len(kept(share)) == 48)
        assert share.tree("output") == []
        eyes.waits.set()
        wait_until(lambda: share.tree("output") == [f"ortho{name}" for name in NAMES])
        wait_until(lambda: share.tree("work") == [])
    assert eyes.windows == 49


def test_whose_model_is_another_does_not_help(share: Share, eyes: Eyes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "LOOK_S", 0.0)
    eyes.stops_after = 3
    drop_mosaic(share)
    other = Pipeline(FakeEngine(), [], pieces=partial(jobs.begin, model="other"))
    with watching(share):
        assert eyes.stopped.wait(60)
        eyes.stops_after = None
        with watching(share, other):
            wait_until(lambda: other.stats.now().released)
        assert len(kept(share)) == 3
        eyes.waits.set()
        wait_until(lambda: share.tree("output") == [f"ortho{name}" for name in NAMES])
    assert (eyes.windows, share.tree("failed")) == (49, [])


class Slow(FakeEngine):
    """Says in a file which process has worked."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def encode(self, pictures: Any) -> Any:
        (self._folder / str(os.getpid())).touch()
        wait_until(lambda: len(list(self._folder.iterdir())) == 2, 60)
        return super().encode(pictures)


def equipped(folder: Path) -> Equipment:
    chosen = formats.load(["mask"], formats.FormatOptions())
    return Equipment(Slow(folder), chosen, Sizes(), partial(jobs.begin, model="fake"))


def test_all_devices_of_a_daemon_take_tiles(share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "LOOK_S", 0.0)
    drop_mosaic(share)
    expected = mosaic(share.input / "ortho.tif", share.root / "alone", WISH, FakeEngine)
    (share.root / "who").mkdir()
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    posts = [Post(f"cpu #{n}", partial(equipped, share.root / "who"), env) for n in range(2)]
    with Fleet(posts, threading.Event(), pieces=True) as fleet, watching(share, fleet):
        wait_until(lambda: share.tree("output") == [f"ortho{name}" for name in NAMES], 60)
    stats = json.loads((share.output / "ortho.stats.json").read_text())
    assert stats == expected
    assert (share.tree("work"), fleet.stats.now().at_work) == ([], 0)


def refusal(share: Share, **more: Any) -> dict[str, Any]:
    drain(share, **more)
    assert share.tree("output") == []
    assert not kept(share)
    return share.error("ortho")


def test_what_cannot_be_is_refused_with_the_place(share: Share) -> None:
    drop_mosaic(share, mosaic={"tile": 100})
    said = refusal(share)
    assert (said["place"], said["reason"]) == ("mosaic.tile", "must be a multiple of 16")
    assert share.tree("failed") == ["ortho.error.json", "ortho.json", "ortho.tif"]


def test_a_picture_that_gdal_cannot_read_is_refused(share: Share) -> None:
    share.drop("ortho.tif", b"no picture at all")
    share.drop("ortho.json", {"mosaic": True})
    said = refusal(share)
    assert (said["code"], said["place"]) == ("picture", "ortho.tif")
    assert "GeoTIFF, PNG, JPEG" in said["reason"]
    assert str(share.root) not in json.dumps(said)


def test_without_the_extra_it_is_refused_with_a_remedy(share: Share) -> None:
    drop_mosaic(share)
    plain = Pipeline(FakeEngine(), [])
    with door(share, once=True) as opened:
        plain.run(opened, threading.Event())
    assert "geo" in share.error("ortho")["remedy"]


def test_a_library_that_the_wheels_miss_is_told_with_a_remedy(share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sam_poll.mosaic.jobs", None)  # its import fails
    made = settings.load(None, env={}, flags={"model": "fake"})
    drop_mosaic(share)
    plain = Pipeline(FakeEngine(), [], pieces=pieces_of(made, None))
    with door(share, once=True) as opened:
        plain.run(opened, threading.Event())
    assert "libexpat1" in share.error("ortho")["remedy"]


def test_predict_refuses_it_and_names_the_command(tmp_path: Path) -> None:
    mosaics.write(tmp_path / "a.tif", np.zeros((64, 64, 3), np.uint8))
    (tmp_path / "a.json").write_text('{"mosaic": true}')
    done = CliRunner().invoke(app, ["predict", str(tmp_path / "a.tif"), "-o", str(tmp_path / "out"), "-m", "fake"])
    assert done.exit_code != 0
    assert "sam-poll mosaic" in " ".join(done.output.split())


def test_it_must_be_the_file_that_the_prompt_names(share: Share, eyes: Eyes) -> None:
    drop_mosaic(share)
    body = (share.input / "ortho.tif").read_bytes()
    share.drop("ortho.json", {"mosaic": ASKED, "image_sha256": "0" * 64})
    assert "SHA-256" in refusal(share)["reason"]
    share.drop("right.tif", body)
    named = {"image_sha256": hashlib.sha256(body).hexdigest(), "image_bytes": len(body)}
    share.drop("right.json", {"mosaic": ASKED, **named})
    drain(share)
    assert share.tree("output") == [f"right{name}" for name in NAMES]


def test_one_that_is_cut_off_waits_for_the_rest(share: Share, eyes: Eyes) -> None:
    drop_mosaic(share)
    body = (share.input / "ortho.tif").read_bytes()
    share.drop("ortho.tif", body[: len(body) // 2])
    made = pipeline()
    with watching(share, made, patience_s=60.0):
        wait_until(lambda: made.stats.now().released)
        share.drop("ortho.tif", body)
        wait_until(lambda: share.tree("output") == [f"ortho{name}" for name in NAMES])
    assert share.tree("failed") == []


def test_what_nobody_asks_for_any_more_is_swept(share: Share, eyes: Eyes) -> None:
    stop_after_a_part(share, eyes)
    assert kept(share)
    (share.input / "ortho.json").unlink()
    (share.input / "ortho.tif").unlink()
    with watching(share, lease_s=2.0):
        wait_until(lambda: not kept(share), 20)


def test_answers_that_cannot_be_written_are_tried_again(
    share: Share, eyes: Eyes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sam_poll.fs import Whole

    tries, really = [], Whole.take

    def take(self: Whole, path: Path, file: Path) -> None:
        tries.append(path)
        if len(tries) == 2:
            raise OSError(28, "No space left on device", str(path))
        really(self, path, file)

    monkeypatch.setattr(Whole, "take", take)
    drop_mosaic(share)
    drain(share)
    assert share.tree("output") == [f"ortho{name}" for name in NAMES]
    assert len(tries) == 5
    assert share.tree("work") == []


def test_where_a_share_has_no_links_the_outputs_are_copied(
    share: Share, eyes: Eyes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: Any, **__: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    drop_mosaic(share)
    drain(share)
    assert mosaics.read(share.output / "ortho.labels.tif").shape == (SIDE, SIDE)
