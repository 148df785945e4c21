"""World files and .aux.xml beside a mosaic's picture: they move with it and place its labels."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pyogrio
import pytest
import rasterio

from sam_poll.core.safe_path import SafePath
from sam_poll.share.claims.model import list_work
from sam_poll.share.claims.store import ClaimStore
from sam_poll.share.status import retry
from tests.conftest import BOX, Share, picture_bytes
from tests.support.mosaic_jobs import ASKED, Eyes, drain, pipeline, source
from tests.support.mosaic_jobs import eyes as eyes
from tests.support.mosaic_paths import opened
from tools import mosaics

WORLD = "0.5\n0\n0\n-0.5\n1000.25\n1999.75\n"
PLACE = (0.5, 0, 1000, 0, -0.5, 2000)


def drop(share: Share, name: str = "ortho.tif", *, prompt: object = None) -> None:
    """Drop a picture of four tiles without a georeference, and its prompt."""
    noise = np.random.default_rng(3).integers(0, 255, (100, 100, 3), np.uint8)
    path = share.input / name
    path.parent.mkdir(parents=True, exist_ok=True)
    mosaics.write(path, noise, georeferenced=False)
    share.drop(f"{path.relative_to(share.input).with_suffix('')}.json", prompt or {"mosaic": ASKED})  # type: ignore[arg-type]


def lies_at(path: Path) -> tuple[float, ...]:
    with rasterio.open(path) as file:
        return tuple(file.transform)[:6]


def take_over(share: Share) -> None:
    """Process a share on which the claims of others expire soon."""
    with source(share, once=True, lease_s=0.3) as opened_door:
        pipeline().run(opened_door, threading.Event())


@pytest.mark.parametrize("beside", ["ortho.tfw", "ortho.TFW", "ortho.wld"])
def test_world_file_georeferences_the_labels_and_moves_with_the_picture(
    share: Share, eyes: Eyes, beside: str
) -> None:
    share.drop(f"cam1/{beside}", WORLD)
    drop(share, "cam1/ortho.tif")
    drain(share)
    assert lies_at(share.output / "cam1/ortho.labels.tif") == PLACE
    bounds = pyogrio.read_info(share.output / "cam1/ortho.labels.gpkg")["total_bounds"]
    assert bounds == pytest.approx((1000, 1950, 1050, 2000))
    assert share.tree("done") == sorted(["cam1/ortho.json", "cam1/ortho.tif", f"cam1/{beside}"])
    assert (share.tree("input"), share.tree("work"), share.tree("failed")) == ([], [], [])


def test_aux_xml_is_no_annotation_file_and_moves_with_the_picture(share: Share, eyes: Eyes) -> None:
    share.drop(
        "ortho.tif.aux.xml",
        "<PAMDataset><GeoTransform>1000, 0.5, 0, 2000, 0, -0.5</GeoTransform></PAMDataset>",
    )
    share.drop("of_no_mosaic.jpg.aux.xml", "<PAMDataset/>")
    drop(share)
    drain(share)
    assert lies_at(share.output / "ortho.labels.tif") == PLACE
    assert "ortho.tif.aux.xml" in share.tree("done")
    assert share.tree("input") == ["of_no_mosaic.jpg.aux.xml"]
    assert share.tree("failed") == []


def test_world_file_keeps_the_stem_of_its_renamed_picture(share: Share, eyes: Eyes) -> None:
    for taken in ("ortho.tfw", "ortho~2.tif.aux.xml"):
        share.done.mkdir(exist_ok=True)
        (share.done / taken).write_text("of an earlier one")
    share.drop("ortho.tfw", WORLD)
    share.drop("ortho.tif.aux.xml", "<PAMDataset/>")
    drop(share)
    drain(share)
    assert {"ortho~3.tif", "ortho~3.tfw", "ortho~3.tif.aux.xml"} <= set(share.tree("done"))
    with opened(share.done / "ortho~3.tif") as picture:
        assert tuple(picture.transform)[:6] == PLACE


def test_later_mosaic_finds_the_world_file_in_done(share: Share, eyes: Eyes) -> None:
    share.drop("ortho.tfw", WORLD)
    drop(share)
    drain(share)
    share.drop("ortho.again.json", {"mosaic": ASKED})
    drain(share)
    assert lies_at(share.output / "ortho.again.labels.tif") == PLACE


def test_rejected_mosaic_moves_its_world_file_and_retry_returns_it(
    share: Share, eyes: Eyes
) -> None:
    share.drop("ortho.wld", "no numbers")
    drop(share)
    drain(share)
    assert share.tree("failed") == ["ortho.error.json", "ortho.json", "ortho.tif", "ortho.wld"]
    assert "six numbers" in share.error("ortho")["reason"]
    assert share.error("ortho")["place"] == "ortho.wld"
    (share.failed / "ortho.wld").write_text(WORLD)
    assert retry(share.layout) == 1
    assert share.tree("input") == ["ortho.json", "ortho.tif", "ortho.wld"]
    drain(share)
    assert lies_at(share.output / "ortho.labels.tif") == PLACE


def test_other_jobs_leave_world_files(share: Share) -> None:
    share.drop("dog.jgw", WORLD)
    share.pair("dog")
    share.run_once()
    assert share.tree("input") == ["dog.jgw"]
    assert share.tree("done") == ["dog.jpg", "dog.json"]


def test_world_file_moves_once_with_two_jobs_of_a_picture(share: Share, eyes: Eyes) -> None:
    share.drop("ortho.tfw", WORLD)
    drop(share)
    share.drop("ortho.box.json", BOX)
    drain(share)
    assert lies_at(share.output / "ortho.labels.tif") == PLACE
    assert share.tree("done") == ["ortho.box.json", "ortho.json", "ortho.tfw", "ortho.tif"]


@pytest.mark.parametrize(
    "beside", ["ortho.tfw", "ortho.wld"]
)  # before and after the picture in alphabetical order
def test_recovered_mosaic_separates_the_picture_from_its_world_file(
    share: Share, eyes: Eyes, beside: str
) -> None:
    drop(share)
    claim = share.work / ".ortho.tif/g1.a1.n1@gone-1-0-0"
    claim.mkdir(parents=True)
    for name in ("ortho.tif", "ortho.json"):
        (share.input / name).rename(claim / name)
    (claim / beside).write_text(WORLD)
    take_over(share)
    assert lies_at(share.output / "ortho.labels.tif") == PLACE
    assert share.tree("done") == sorted(["ortho.json", "ortho.tif", beside])


def test_recovered_mosaic_keeps_a_world_file_that_was_not_claimed_yet(
    share: Share, eyes: Eyes
) -> None:
    drop(share)
    claim = share.work / ".ortho.tif/g1.a1.n1@gone-1-0-0"
    claim.mkdir(parents=True)
    for name in ("ortho.tif", "ortho.json"):
        (share.input / name).rename(claim / name)
    share.drop("ortho.tfw", WORLD)
    take_over(share)
    assert lies_at(share.output / "ortho.labels.tif") == PLACE
    assert "ortho.tfw" in share.tree("done")


def test_world_file_is_requeued_before_its_picture(share: Share, eyes: Eyes) -> None:
    share.drop("ortho.wld", WORLD)
    drop(share)
    claims = ClaimStore(share.layout, "me-1-0-0", lambda: None)
    claim = claims.take("ortho.tif", "ortho.tif", ["ortho.json"])
    assert claim
    (share.input / "ortho.wld").rename(claim.path.path / "ortho.wld")
    claim.sidecars.add("ortho.wld")
    assert claims._files(claim) == ["ortho.wld", "ortho.tif", "ortho.json"]
    claims.close(claim, "input", claims.free(claim, "input"))
    assert share.tree("input") == ["ortho.json", "ortho.tif", "ortho.wld"]
    assert not list_work(share.layout.work).claims


@pytest.mark.parametrize("planted", ["link", "pipe", "folder"])
def test_file_named_like_a_world_file_that_is_none_stays(
    share: Share, eyes: Eyes, tmp_path: Path, planted: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text(WORLD)
    path = share.input / "ortho.tfw"
    if planted == "link":
        path.symlink_to(secret)
    elif planted == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    drop(share)
    drain(share)
    assert lies_at(share.output / "ortho.labels.tif") != PLACE
    assert os.path.lexists(path)
    assert secret.read_text() == WORLD


def test_world_file_that_cannot_be_moved_rejects_its_mosaic_only(
    share: Share, eyes: Eyes, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = SafePath.rename

    def refused(path: SafePath, target: SafePath) -> None:
        if path.name == "ortho.tfw":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        really(path, target)

    monkeypatch.setattr(SafePath, "rename", refused)
    share.drop("ortho.tfw", WORLD)
    drop(share)
    share.drop("dog.jpg", picture_bytes())
    share.drop("dog.json", BOX)
    drain(share)
    assert share.error("ortho")["place"] == "ortho.tfw"
    assert "cannot be taken along" in share.error("ortho")["reason"]
    assert share.tree("input") == ["ortho.tfw"]
    assert "dog.mask.png" in share.tree("output")
