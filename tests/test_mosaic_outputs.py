"""What comes out of a mosaic: the same labels in all three files, where the picture lies, whole or not at all."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyogrio
import pytest
import rasterio
import rasterio.features
import shapely
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.rpc import RPC
from rasterio.transform import Affine

from sam_poll.engines.fake import FakeEngine
from sam_poll.errors import ShareError
from sam_poll.mosaic import labels, run, work
from sam_poll.safe_path import SafePath
from sam_poll.types import Size
from tests.mosaic_paths import mosaic
from tests.test_mosaic import WISH, Eyes, blobs, files, shown
from tools import mosaics

TRUTH = blobs(3, Size(300, 200), 40)
TURNED = Affine.translation(400_000, 5_000_000) * Affine.rotation(30) * Affine.scale(0.1, -0.1)
DEGREES = Affine(1e-6, 0, 8.5, 0, -1e-6, 47.3)
LOCAL = 'LOCAL_CS["site grid",UNIT["metre",1],AXIS["x",EAST],AXIS["y",NORTH]]'
ALIKE = "+proj=utm +zone=33 +ellps=WGS84 +units=m"  # like EPSG:32633, but of no known datum
POINTS = [GroundControlPoint(0, 0, 10, 50), GroundControlPoint(0, 300, 11, 50), GroundControlPoint(200, 0, 10, 49)]


@pytest.fixture(autouse=True)
def _eyes_that_err_nowhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(work, "labelled", Eyes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        yield


def made(folder: Path, truth: npt.NDArray[np.uint16] = TRUTH, **more: Any) -> Path:
    """The outputs for a picture of these regions."""
    pixels = np.moveaxis(shown(truth), 2, 0)
    height, width = truth.shape
    profile = {"driver": "GTiff", "dtype": "uint8", "count": 3, "width": width, "height": height, **more}
    with rasterio.open(folder / "a.tif", "w", **profile) as file:
        file.write(pixels)
    mosaic(folder / "a.tif", folder / "out", WISH, FakeEngine)
    return folder / "out"


def drawn(out: Path, name: str) -> tuple[Any, npt.NDArray[np.int64], npt.NDArray[np.object_]]:
    """A file's CRS, labels and polygons."""
    meta, _, geometry, fields = pyogrio.raw.read(out / name)
    return meta["crs"], dict(zip(meta["fields"], fields, strict=True))["label"], shapely.from_wkb(geometry)


# ── where they lie ──


@pytest.mark.parametrize(
    "transform",
    [
        Affine.identity(),
        TURNED,
        Affine(0.1, 0.05, 400_000, 0.02, -0.1, 5e6),
        Affine(0.1, 0, 400_000, 0, 0.1, 5e6),
        Affine(-0.1, 0, 400_000, 0, -0.1, 5e6),
        Affine(1e-3, 0, 5e6, 0, -1e-3, 9e6),
    ],
    ids=["none", "turned", "sheared", "south up", "mirrored", "small far off"],
)
def test_polygons_give_the_labels_back_however_the_picture_lies(tmp_path: Path, transform: Affine) -> None:
    out = made(tmp_path, crs="EPSG:32633", transform=transform)
    with rasterio.open(out / run.RASTER) as file:
        expected = file.read(1)
        assert file.transform == transform
    assert np.count_nonzero(expected) == np.count_nonzero(TRUTH)
    for name in (run.GEOPACKAGE, run.GEOJSON):
        _, numbers, polygons = drawn(out, name)
        again = rasterio.features.rasterize(
            zip(polygons, numbers.tolist(), strict=True), expected.shape, transform=transform, dtype="int32"
        )
        np.testing.assert_array_equal(again, expected)
        assert shapely.is_valid(polygons).all()
        assert all(part.exterior.is_ccw for polygon in polygons for part in polygon.geoms)


@pytest.mark.parametrize(
    ("crs", "name"),
    [
        ("EPSG:32633", "urn:ogc:def:crs:EPSG::32633"),
        ("EPSG:31467", "urn:ogc:def:crs:EPSG::31467"),  # its axes are north, east; ours are x, y all the same
        ("EPSG:4326", "urn:ogc:def:crs:OGC:1.3:CRS84"),
        ("EPSG:4269", "urn:ogc:def:crs:EPSG::4269"),
        ("ESRI:102008", None),
        ("EPSG:25832+7837", None),
        (LOCAL, None),
        (ALIKE, None),
    ],
)
def test_all_outputs_are_in_the_pictures_crs(tmp_path: Path, crs: str, name: str | None) -> None:
    given = CRS.from_user_input(crs)
    transform = DEGREES if given.is_geographic else TURNED
    out = made(tmp_path, crs=given, transform=transform)
    with rasterio.open(tmp_path / "a.tif") as before, rasterio.open(out / run.RASTER) as after:
        assert before.crs == after.crs
        known = before.crs
    for output in (run.GEOPACKAGE, run.GEOJSON):
        crs_of_output, _, polygons = drawn(out, output)
        assert CRS.from_user_input(crs_of_output) == known, output
        x, y = transform * (150, 100)
        assert shapely.distance(shapely.box(*shapely.total_bounds(polygons)), shapely.Point(x, y)) == 0, "x, y swapped"
    if name:
        assert json.loads((out / run.GEOJSON).read_text())["crs"]["properties"]["name"] == name


def test_without_a_crs_none_is_named(tmp_path: Path) -> None:
    out = made(tmp_path)
    found = json.loads((out / run.GEOJSON).read_text())
    assert found["crs"] is None
    assert drawn(out, run.GEOPACKAGE)[0] is None


def test_points_and_coefficients_stay_with_the_labels(tmp_path: Path) -> None:
    line = [0.0, 1.0] + [0.0] * 18
    rpc = RPC(500, 500, 47, 1, line, line, 100, 100, 8, 1, line, line, 150, 150)
    for more in ({"gcps": POINTS, "crs": "EPSG:4326"}, {"rpcs": rpc}):
        folder = tmp_path / next(iter(more))
        folder.mkdir()
        with rasterio.open(made(folder, **more) / run.RASTER) as after, rasterio.open(folder / "a.tif") as before:
            points, crs = after.gcps
            assert [(p.row, p.col, p.x, p.y) for p in points] == [(p.row, p.col, p.x, p.y) for p in before.gcps[0]]
            assert crs == before.gcps[1]
            assert (after.rpcs and after.rpcs.to_dict()) == (before.rpcs and before.rpcs.to_dict())


# ── what they are ──


def test_blocks_are_as_large_as_the_tiles_allow() -> None:
    for tile, side in ((1024, 512), (128, 128), (1040, 208), (16 * 67, 16)):
        assert next(side for side in labels.BLOCKS if tile % side == 0) == side


def test_a_label_over_many_tiles_keeps_its_holes_and_touches_itself_at_corners(tmp_path: Path) -> None:
    truth = np.ones((500, 500), np.uint16)
    truth[10:490:8, 10:490:8] = 0
    truth[200:300, 200:300] = 0
    truth[[203, 204], [203, 204]] = 2  # these two meet at a corner only: two things, both too small
    truth[210:250, 210:250] = truth[250:290, 250:290] = 3
    out = made(tmp_path, truth)
    _, numbers, polygons = drawn(out, run.GEOPACKAGE)
    assert shapely.is_valid(polygons).all()
    assert sorted(shapely.area(polygons).tolist()) == [1600, 1600, np.count_nonzero(truth == 1)]
    holes = shapely.get_num_interior_rings(shapely.get_parts(polygons[shapely.area(polygons) > 1600]))
    assert holes.sum() == len(range(10, 490, 8)) ** 2 - len(range(202, 300, 8)) ** 2 + 1
    assert len(numbers) == 3


def test_the_geopackage_is_one_for_sqlite_as_well(tmp_path: Path) -> None:
    out = made(tmp_path, crs="EPSG:32633", transform=TURNED)
    with sqlite3.connect(out / run.GEOPACKAGE) as file:
        assert file.execute("pragma integrity_check").fetchall() == [("ok",)]
        assert file.execute("pragma application_id").fetchone() == (int.from_bytes(b"GPKG", "big"),)
        contents = file.execute("select table_name, data_type, min_x, max_x, srs_id from gpkg_contents").fetchall()
        kind = file.execute("select table_name, geometry_type_name from gpkg_geometry_columns").fetchall()
        rows = file.execute("select label, area_px from labels order by label").fetchall()
    file.close()
    bounds = shapely.total_bounds(drawn(out, run.GEOPACKAGE)[2])
    assert contents == [("labels", "features", pytest.approx(bounds[0]), pytest.approx(bounds[2]), 32633)]
    assert kind == [("labels", "MULTIPOLYGON")]
    counts = np.bincount(mosaics.read(out / run.RASTER).ravel())
    assert rows == [(n, count) for n, count in enumerate(counts.tolist()) if n]


# ── the disk ──

FULL = """
import resource, signal, sys
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from sam_poll.engines.fake import FakeEngine
from sam_poll.errors import ShareError
from sam_poll.mosaic import labels, polygons, work
from tests.mosaic_paths import mosaic
from tests.test_mosaic import WISH, Eyes
folder, limit, module, name = Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
work.labelled = Eyes()
room = {"labels": labels, "polygons": polygons}[module]
plain = getattr(room, name)
def limited(*args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return plain(*args)
setattr(room, name, limited)
try:
    mosaic(folder / "a.tif", folder / "out", WISH, FakeEngine)
except ShareError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize(
    ("module", "before", "limit", "output"),
    [
        ("labels", "write", 100, run.RASTER),
        ("labels", "write", -1, run.RASTER),  # but for the last byte: what GDAL writes as it closes the file
        ("polygons", "write", 50_000, run.GEOPACKAGE),
        ("polygons", "_feature", 50_000, run.GEOJSON),
    ],
)
def test_where_nothing_more_can_be_written_it_says_so_and_ends_alike_later(
    tmp_path: Path, module: str, before: str, limit: int, output: str
) -> None:
    whole = made(tmp_path, blobs(3, Size(300, 200), 8))
    expected = files(whole)
    if limit < 0:
        limit += (whole / output).stat().st_size
    whole.rename(tmp_path / "whole")
    command = [sys.executable, "-c", FULL, str(tmp_path), str(limit), module, before]
    root = Path(__file__).parent.parent
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, check=False, capture_output=True, text=True
    )
    assert re.search(rf"refused: .*{re.escape(output)}: the (labels|polygons) .*make room", done.stdout), done
    assert not any((tmp_path / "out" / name).exists() for name in (run.RASTER, run.GEOPACKAGE, run.GEOJSON, run.STATS))
    mosaic(tmp_path / "a.tif", tmp_path / "out", WISH, FakeEngine)
    assert files(tmp_path / "out") == expected


def test_what_is_not_on_the_disk_as_it_was_written_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = iter(range(10**6))
    monkeypatch.setattr(labels, "_sum", lambda _: next(sums))
    with pytest.raises(ShareError, match="not on the disk as they were written"):
        made(tmp_path)


def test_half_an_older_output_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = iter(range(10**6))
    with monkeypatch.context() as patch:
        patch.setattr(labels, "_sum", lambda _: next(sums))
        with pytest.raises(ShareError):
            made(tmp_path)
    (left,) = (tmp_path / "out").rglob("made-*")
    (left / run.RASTER).write_bytes(b"II*\0 and no more")
    (left / run.GEOPACKAGE).write_bytes(b"SQLite format 3\0 and no more")
    (left / f"{run.GEOPACKAGE}-journal").write_bytes(b"something")
    mosaic(tmp_path / "a.tif", tmp_path / "out", WISH, FakeEngine)
    assert mosaics.read(tmp_path / "out" / run.RASTER).any()


def test_what_lies_beside_an_older_output_is_not_taken_for_the_new_ones(tmp_path: Path) -> None:
    out = made(tmp_path)
    new = tmp_path / "new.gpkg"
    new.write_bytes((out / run.GEOPACKAGE).read_bytes())
    with sqlite3.connect(out / run.GEOPACKAGE, isolation_level=None) as other:  # has it open, as QGIS does
        other.execute("pragma journal_mode=wal")
        other.execute("create table of_the_old_one (a)")
        assert (out / f"{run.GEOPACKAGE}-wal").exists()
        labels.put(SafePath.beside(new), SafePath.at(out) / run.GEOPACKAGE)
        with sqlite3.connect(out / run.GEOPACKAGE) as file:
            tables = {name for (name,) in file.execute("select name from sqlite_master")}
        file.close()
    other.close()
    assert "labels" in tables
    assert "of_the_old_one" not in tables
