"""Mosaics dropped into the folder: outputs as those of the command, in turns with other jobs.

Several daemons share the tiles, and no finished tile is computed again after an interruption.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from sam_poll.cli.main import app
from sam_poll.config import settings
from sam_poll.core.types import ADVANCED
from sam_poll.engines.fake import FakeEngine
from sam_poll.formats import registry
from sam_poll.mosaic import job as jobs
from sam_poll.pipeline.options import PipelineOptions
from sam_poll.pipeline.pipeline import Pipeline
from sam_poll.pipeline.worker_pool import WorkerPool, WorkerSpec
from sam_poll.pipeline.worker_process import WorkerSetup
from sam_poll.runtime.builders import mosaic_factory_of
from sam_poll.share import mosaic_workspace
from tests.conftest import Share, wait_until
from tests.support.mosaic_jobs import (
    ASKED,
    NAMES,
    OPTIONS,
    SIDE,
    Eyes,
    drain,
    drop_mosaic,
    kept,
    pipeline,
    source,
    watching,
)
from tests.support.mosaic_jobs import eyes as eyes
from tests.support.mosaic_paths import mosaic
from tests.support.paths import ROOT
from tools import mosaics


@pytest.mark.slow
def test_dropped_mosaic_gives_the_outputs_of_the_command(share: Share) -> None:
    drop_mosaic(share, "cam1/ortho")
    expected = mosaic(share.input / "cam1/ortho.tif", share.root / "alone", OPTIONS, FakeEngine)
    assert expected["labels"] > 9
    assert drain(share).stats.now().objects == expected["labels"]
    assert share.tree("output") == [f"cam1/ortho{name}" for name in NAMES]
    out = share.output / "cam1"
    assert (out / "ortho.labels.tif").read_bytes() == (share.root / "alone/labels.tif").read_bytes()
    assert (out / "ortho.labels.geojson").read_bytes() == (
        share.root / "alone/labels.geojson"
    ).read_bytes()
    assert json.loads((out / "ortho.stats.json").read_text()) == expected
    assert share.tree("done") == ["cam1/ortho.json", "cam1/ortho.tif"]
    assert not list(share.work.glob(f"{mosaic_workspace.FOLDER}/*"))


def test_other_jobs_run_between_two_tiles(share: Share, eyes: Eyes) -> None:
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
    """Stop a daemon while it computes the 21st of 49 tiles."""
    eyes.stops_after = 20
    drop_mosaic(share)
    with watching(share) as stop:
        assert eyes.stopped.wait(60)
        stop.set()
        eyes.waits.set()


def test_stopped_mosaic_is_requeued_and_keeps_its_tiles(share: Share, eyes: Eyes) -> None:
    stop_after_a_part(share, eyes)
    assert share.tree("input") == ["ortho.json", "ortho.tif"]
    assert len(kept(share)) == eyes.windows == 21
    drain(share)
    assert eyes.windows == 49
    assert share.tree("output") == [f"ortho{name}" for name in NAMES]
    assert not kept(share)


def test_another_picture_of_the_same_name_starts_a_new_mosaic(share: Share, eyes: Eyes) -> None:
    stop_after_a_part(share, eyes)
    drop_mosaic(share, seed=2)
    drain(share)
    assert eyes.windows == 21 + 49


def test_run_that_finished_a_tile_is_no_failed_attempt(share: Share) -> None:
    drop_mosaic(share)
    attempts = []
    for advances in (True, True, False, False, False, False):
        with source(share, once=True, attempts=2) as opened:
            job = next(opened.jobs(threading.Event()))
            attempts.append((job.attempt, job.error and job.error.code))
            if advances:
                assert job.scratch
                (job.scratch / ADVANCED).touch()
    assert attempts == [(1, None), (1, None), (1, None), (2, None), (3, "poison"), (4, "poison")]


def test_idle_daemon_computes_tiles_of_anothers_mosaic(
    share: Share, eyes: Eyes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mosaic_workspace, "LOOK_S", 0.0)
    eyes.stops_after = 3
    drop_mosaic(share)
    with watching(share):
        assert eyes.stopped.wait(60)  # while it holds one tile
        eyes.stops_after = None
        with watching(share):
            wait_until(lambda: len(kept(share)) == 48)
        assert share.tree("output") == []
        eyes.waits.set()
        wait_until(lambda: share.tree("output") == [f"ortho{name}" for name in NAMES])
        wait_until(lambda: share.tree("work") == [])
    assert eyes.windows == 49


def test_daemon_with_another_model_does_not_help(
    share: Share, eyes: Eyes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mosaic_workspace, "LOOK_S", 0.0)
    eyes.stops_after = 3
    drop_mosaic(share)
    other = Pipeline(FakeEngine(), [], tiled_jobs=partial(jobs.begin, model="other"))
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
    """An engine that appends its process id to a file."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def encode(self, pictures: Any) -> Any:
        (self._folder / str(os.getpid())).touch()
        wait_until(lambda: len(list(self._folder.iterdir())) == 2, 60)
        return super().encode(pictures)


def equipped(folder: Path) -> WorkerSetup:
    chosen = registry.load(["mask"], registry.FormatOptions())
    return WorkerSetup(Slow(folder), chosen, PipelineOptions(), partial(jobs.begin, model="fake"))


@pytest.mark.slow
def test_devices_of_a_daemon_all_compute_tiles(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mosaic_workspace, "LOOK_S", 0.0)
    drop_mosaic(share)
    expected = mosaic(share.input / "ortho.tif", share.root / "alone", OPTIONS, FakeEngine)
    (share.root / "who").mkdir()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    posts = [WorkerSpec(f"cpu #{n}", partial(equipped, share.root / "who"), env) for n in range(2)]
    with WorkerPool(posts, threading.Event(), tiled_jobs=True) as fleet, watching(share, fleet):
        wait_until(lambda: share.tree("output") == [f"ortho{name}" for name in NAMES], 60)
    stats = json.loads((share.output / "ortho.stats.json").read_text())
    assert stats == expected
    assert (share.tree("work"), fleet.stats.now().at_work) == ([], 0)


def refusal(share: Share, **more: Any) -> dict[str, Any]:
    drain(share, **more)
    assert share.tree("output") == []
    assert not kept(share)
    return share.error("ortho")


def test_invalid_request_is_rejected_with_the_key(share: Share) -> None:
    drop_mosaic(share, mosaic={"tile": 100})
    said = refusal(share)
    assert (said["place"], said["reason"]) == ("mosaic.tile", "must be a multiple of 16")
    assert share.tree("failed") == ["ortho.error.json", "ortho.json", "ortho.tif"]


def test_picture_that_gdal_cannot_read_is_rejected(share: Share) -> None:
    share.drop("ortho.tif", b"no picture at all")
    share.drop("ortho.json", {"mosaic": True})
    said = refusal(share)
    assert (said["code"], said["place"]) == ("picture", "ortho.tif")
    assert "GeoTIFF, PNG, JPEG" in said["reason"]
    assert str(share.root) not in json.dumps(said)


def test_mosaic_without_the_extra_is_rejected_with_a_remedy(share: Share) -> None:
    drop_mosaic(share)
    plain = Pipeline(FakeEngine(), [])
    with source(share, once=True) as opened:
        plain.run(opened, threading.Event())
    assert "geo" in share.error("ortho")["remedy"]


def test_missing_system_library_is_reported_with_a_remedy(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sam_poll.mosaic.job", None)  # its import fails
    made = settings.load(None, env={}, flags={"model": "fake"})
    drop_mosaic(share)
    plain = Pipeline(FakeEngine(), [], tiled_jobs=mosaic_factory_of(made, None))
    with source(share, once=True) as opened:
        plain.run(opened, threading.Event())
    assert "libexpat1" in share.error("ortho")["remedy"]


def test_predict_refuses_a_mosaic_and_names_the_command(tmp_path: Path) -> None:
    mosaics.write(tmp_path / "a.tif", np.zeros((64, 64, 3), np.uint8))
    (tmp_path / "a.json").write_text('{"mosaic": true}')
    done = CliRunner().invoke(
        app, ["predict", str(tmp_path / "a.tif"), "-o", str(tmp_path / "out"), "-m", "fake"]
    )
    assert done.exit_code != 0
    assert "sam-poll mosaic" in " ".join(done.output.split())


def test_mosaic_requires_the_file_that_the_prompt_names(share: Share, eyes: Eyes) -> None:
    drop_mosaic(share)
    body = (share.input / "ortho.tif").read_bytes()
    share.drop("ortho.json", {"mosaic": ASKED, "image_sha256": "0" * 64})
    assert "SHA-256" in refusal(share)["reason"]
    share.drop("right.tif", body)
    named = {"image_sha256": hashlib.sha256(body).hexdigest(), "image_bytes": len(body)}
    share.drop("right.json", {"mosaic": ASKED, **named})
    drain(share)
    assert share.tree("output") == [f"right{name}" for name in NAMES]


def test_truncated_picture_waits_for_the_rest(share: Share, eyes: Eyes) -> None:
    drop_mosaic(share)
    body = (share.input / "ortho.tif").read_bytes()
    share.drop("ortho.tif", body[: len(body) // 2])
    made = pipeline()
    with watching(share, made, patience_s=60.0):
        wait_until(lambda: made.stats.now().released)
        share.drop("ortho.tif", body)
        wait_until(lambda: share.tree("output") == [f"ortho{name}" for name in NAMES])
    assert share.tree("failed") == []


def test_abandoned_tiles_are_removed(share: Share, eyes: Eyes) -> None:
    stop_after_a_part(share, eyes)
    assert kept(share)
    (share.input / "ortho.json").unlink()
    (share.input / "ortho.tif").unlink()
    with watching(share, lease_s=2.0):
        wait_until(lambda: not kept(share))


def test_former_owner_of_a_mosaic_does_not_remove_the_outputs_of_its_heir(share: Share) -> None:
    """It may be late: it puts the tiles together while its heir delivers what it has put together.

    What the heir has written goes when it has closed the mosaic.
    """
    drop_mosaic(share)
    with source(share, once=True) as opened:
        mosaic_job = next(opened.jobs(threading.Event()))
        engine = FakeEngine()
        heir, late = (jobs.begin(mosaic_job, lambda: None, model="fake") for _ in range(2))
        while heir.take(engine):
            pass
        of_heir = [output.file for output in heir.documents() if output.file]
        of_late = [output.file for output in late.documents() if output.file]
        late.close()
        assert all(file.is_file() for file in of_heir)
        heir.close()
        third = jobs.begin(mosaic_job, lambda: None, model="fake")
        assert all(output.file.is_file() for output in third.documents() if output.file)
        third.close()
        assert not any(file.is_file() for file in (*of_heir, *of_late))
        opened.requeue(mosaic_job)


def test_outputs_that_cannot_be_written_are_retried(
    share: Share, eyes: Eyes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sam_poll.core.files import AtomicFiles

    tries, really = [], AtomicFiles.take

    def take(self: AtomicFiles, path: Path, file: Path) -> None:
        tries.append(path)
        if len(tries) == 2:
            raise OSError(28, "No space left on device", str(path))
        really(self, path, file)

    monkeypatch.setattr(AtomicFiles, "take", take)
    drop_mosaic(share)
    drain(share)
    assert share.tree("output") == [f"ortho{name}" for name in NAMES]
    assert len(tries) == 5
    assert share.tree("work") == []


def test_outputs_are_copied_on_a_share_without_links(
    share: Share, eyes: Eyes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: Any, **__: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    drop_mosaic(share)
    drain(share)
    assert mosaics.read(share.output / "ortho.labels.tif").shape == (SIDE, SIDE)
