"""Outputs of a mosaic: equal labels in all three files, the picture's georeference, atomicity."""

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

from sam_poll.core.errors import ShareError
from sam_poll.core.safe_path import SafePath
from sam_poll.core.types import Size
from sam_poll.engines.fake import FakeEngine
from sam_poll.mosaic import assembly, labels, run
from tests.support.mosaic_paths import mosaic
from tests.support.mosaics import OPTIONS, Eyes, blobs, files, shown
from tests.support.paths import ROOT
from tools import mosaics

TRUTH = blobs(3, Size(300, 200), 40)
TURNED = Affine.translation(400_000, 5_000_000) * Affine.rotation(30) * Affine.scale(0.1, -0.1)
DEGREES = Affine(1e-6, 0, 8.5, 0, -1e-6, 47.3)
LOCAL = 'LOCAL_CS["site grid",UNIT["metre",1],AXIS["x",EAST],AXIS["y",NORTH]]'
ALIKE = "+proj=utm +zone=33 +ellps=WGS84 +units=m"  # like EPSG:32633, but with an unknown datum
POINTS = [
    GroundControlPoint(0, 0, 10, 50),
    GroundControlPoint(0, 300, 11, 50),
    GroundControlPoint(200, 0, 10, 49),
]


@pytest.fixture(autouse=True)
def _eyes_that_err_nowhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(assembly, "label_window", Eyes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        yield


def made(folder: Path, truth: npt.NDArray[np.uint16] = TRUTH, **more: Any) -> Path:
    """Write a picture of these regions and return its outputs."""
    pixels = np.moveaxis(shown(truth), 2, 0)
    height, width = truth.shape
    profile = {
        "driver": "GTiff",
        "dtype": "uint8",
        "count": 3,
        "width": width,
        "height": height,
        **more,
    }
    with rasterio.open(folder / "a.tif", "w", **profile) as file:
        file.write(pixels)
    mosaic(folder / "a.tif", folder / "out", OPTIONS, FakeEngine)
    return folder / "out"


def drawn(out: Path, name: str) -> tuple[Any, npt.NDArray[np.int64], npt.NDArray[np.object_]]:
    """Return the CRS, labels and polygons of a file."""
    meta, _, geometry, fields = pyogrio.raw.read(out / name)
    return (
        meta["crs"],
        dict(zip(meta["fields"], fields, strict=True))["label"],
        shapely.from_wkb(geometry),
    )


# ── georeference ──


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
def test_polygons_reproduce_the_labels_for_any_georeference(
    tmp_path: Path, transform: Affine
) -> None:
    out = made(tmp_path, crs="EPSG:32633", transform=transform)
    with rasterio.open(out / run.RASTER) as file:
        expected = file.read(1)
        assert file.transform == transform
    assert np.count_nonzero(expected) == np.count_nonzero(TRUTH)
    for name in (run.GEOPACKAGE, run.GEOJSON):
        _, numbers, polygons = drawn(out, name)
        again = rasterio.features.rasterize(
            zip(polygons, numbers.tolist(), strict=True),
            expected.shape,
            transform=transform,
            dtype="int32",
        )
        np.testing.assert_array_equal(again, expected)
        assert shapely.is_valid(polygons).all()
        assert all(part.exterior.is_ccw for polygon in polygons for part in polygon.geoms)


@pytest.mark.parametrize(
    ("crs", "name"),
    [
        ("EPSG:32633", "urn:ogc:def:crs:EPSG::32633"),
        (
            "EPSG:31467",
            "urn:ogc:def:crs:EPSG::31467",
        ),  # its axes are north, east; the files have x, y nevertheless
        ("EPSG:4326", "urn:ogc:def:crs:OGC:1.3:CRS84"),
        ("EPSG:4269", "urn:ogc:def:crs:EPSG::4269"),
        ("ESRI:102008", None),
        ("EPSG:25832+7837", None),
        (LOCAL, None),
        (ALIKE, None),
    ],
)
def test_outputs_have_the_pictures_crs(tmp_path: Path, crs: str, name: str | None) -> None:
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
        assert (
            shapely.distance(shapely.box(*shapely.total_bounds(polygons)), shapely.Point(x, y)) == 0
        ), "x, y swapped"
    if name:
        assert json.loads((out / run.GEOJSON).read_text())["crs"]["properties"]["name"] == name


def test_outputs_name_no_crs_without_one(tmp_path: Path) -> None:
    out = made(tmp_path)
    found = json.loads((out / run.GEOJSON).read_text())
    assert found["crs"] is None
    assert drawn(out, run.GEOPACKAGE)[0] is None


def test_labels_keep_control_points_and_coefficients(tmp_path: Path) -> None:
    line = [0.0, 1.0] + [0.0] * 18
    rpc = RPC(500, 500, 47, 1, line, line, 100, 100, 8, 1, line, line, 150, 150)
    for more in ({"gcps": POINTS, "crs": "EPSG:4326"}, {"rpcs": rpc}):
        folder = tmp_path / next(iter(more))
        folder.mkdir()
        with (
            rasterio.open(made(folder, **more) / run.RASTER) as after,
            rasterio.open(folder / "a.tif") as before,
        ):
            points, crs = after.gcps
            assert [(p.row, p.col, p.x, p.y) for p in points] == [
                (p.row, p.col, p.x, p.y) for p in before.gcps[0]
            ]
            assert crs == before.gcps[1]
            assert (after.rpcs and after.rpcs.to_dict()) == (before.rpcs and before.rpcs.to_dict())


# ── content ──


def test_labels_have_blocks_as_large_as_the_tiles_allow() -> None:
    for tile, side in ((1024, 512), (128, 128), (1040, 208), (16 * 67, 16)):
        assert next(side for side in labels.BLOCKS if tile % side == 0) == side


def test_polygon_over_many_tiles_keeps_holes_and_corner_contacts(
    tmp_path: Path,
) -> None:
    truth = np.ones((500, 500), np.uint16)
    truth[10:490:8, 10:490:8] = 0
    truth[200:300, 200:300] = 0
    truth[[203, 204], [203, 204]] = (
        2  # two pixels that touch at a corner: two objects, both too small
    )
    truth[210:250, 210:250] = truth[250:290, 250:290] = 3
    out = made(tmp_path, truth)
    _, numbers, polygons = drawn(out, run.GEOPACKAGE)
    assert shapely.is_valid(polygons).all()
    assert sorted(shapely.area(polygons).tolist()) == [1600, 1600, np.count_nonzero(truth == 1)]
    holes = shapely.get_num_interior_rings(
        shapely.get_parts(polygons[shapely.area(polygons) > 1600])
    )
    assert holes.sum() == len(range(10, 490, 8)) ** 2 - len(range(202, 300, 8)) ** 2 + 1
    assert len(numbers) == 3


def test_geopackage_is_valid_for_sqlite(tmp_path: Path) -> None:
    out = made(tmp_path, crs="EPSG:32633", transform=TURNED)
    with sqlite3.connect(out / run.GEOPACKAGE) as file:
        assert file.execute("pragma integrity_check").fetchall() == [("ok",)]
        assert file.execute("pragma application_id").fetchone() == (int.from_bytes(b"GPKG", "big"),)
        contents = file.execute(
            "select table_name, data_type, min_x, max_x, srs_id from gpkg_contents"
        ).fetchall()
        kind = file.execute(
            "select table_name, geometry_type_name from gpkg_geometry_columns"
        ).fetchall()
        rows = file.execute("select label, area_px from labels order by label").fetchall()
    file.close()
    bounds = shapely.total_bounds(drawn(out, run.GEOPACKAGE)[2])
    assert contents == [
        ("labels", "features", pytest.approx(bounds[0]), pytest.approx(bounds[2]), 32633)
    ]
    assert kind == [("labels", "MULTIPOLYGON")]
    counts = np.bincount(mosaics.read(out / run.RASTER).ravel())
    assert rows == [(n, count) for n, count in enumerate(counts.tolist()) if n]


# ── the disk ──

FULL = """
import resource, signal, sys
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from sam_poll.engines.fake import FakeEngine
from sam_poll.core.errors import ShareError
from sam_poll.mosaic import assembly, labels, polygons
from tests.support.mosaic_paths import mosaic
from tests.support.mosaics import OPTIONS, Eyes
folder, limit, module, name = Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
assembly.label_window = Eyes()
room = {"labels": labels, "polygons": polygons}[module]
plain = getattr(room, name)
def limited(*args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return plain(*args)
setattr(room, name, limited)
try:
    mosaic(folder / "a.tif", folder / "out", OPTIONS, FakeEngine)
except ShareError as error:
    print("refused:", error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "before", "limit", "output"),
    [
        ("labels", "write", 100, run.RASTER),
        (
            "labels",
            "write",
            -1,
            run.RASTER,
        ),  # all but the last byte, which GDAL writes when it closes the file
        ("polygons", "write", 50_000, run.GEOPACKAGE),
        ("polygons", "_feature", 50_000, run.GEOJSON),
    ],
)
def test_mosaic_on_a_full_disk_fails_and_succeeds_later(
    tmp_path: Path, module: str, before: str, limit: int, output: str
) -> None:
    whole = made(tmp_path, blobs(3, Size(300, 200), 8))
    expected = files(whole)
    if limit < 0:
        limit += (whole / output).stat().st_size
    whole.rename(tmp_path / "whole")
    command = [sys.executable, "-c", FULL, str(tmp_path), str(limit), module, before]
    root = ROOT
    done = subprocess.run(
        command,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert re.search(
        rf"refused: .*{re.escape(output)}: the (labels|polygons) .*free space", done.stdout
    ), done
    assert not any(
        (tmp_path / "out" / name).exists()
        for name in (run.RASTER, run.GEOPACKAGE, run.GEOJSON, run.STATS)
    )
    mosaic(tmp_path / "a.tif", tmp_path / "out", OPTIONS, FakeEngine)
    assert files(tmp_path / "out") == expected


def test_labels_that_differ_on_disk_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = iter(range(10**6))
    monkeypatch.setattr(labels, "_checksum", lambda _: next(sums))
    with pytest.raises(ShareError, match="not on the disk as they were written"):
        made(tmp_path)


def test_mosaic_overwrites_a_partial_older_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = iter(range(10**6))
    with monkeypatch.context() as patch:
        patch.setattr(labels, "_checksum", lambda _: next(sums))
        with pytest.raises(ShareError):
            made(tmp_path)
    (left,) = (tmp_path / "out").rglob("made-*")
    (left / run.RASTER).write_bytes(b"II*\0 and no more")
    (left / run.GEOPACKAGE).write_bytes(b"SQLite format 3\0 and no more")
    (left / f"{run.GEOPACKAGE}-journal").write_bytes(b"something")
    mosaic(tmp_path / "a.tif", tmp_path / "out", OPTIONS, FakeEngine)
    assert mosaics.read(tmp_path / "out" / run.RASTER).any()


def test_replace_output_removes_files_beside_an_older_output(tmp_path: Path) -> None:
    out = made(tmp_path)
    new = tmp_path / "new.gpkg"
    new.write_bytes((out / run.GEOPACKAGE).read_bytes())
    with sqlite3.connect(
        out / run.GEOPACKAGE, isolation_level=None
    ) as other:  # open in another program, as in QGIS
        other.execute("pragma journal_mode=wal")
        other.execute("create table of_the_old_one (a)")
        assert (out / f"{run.GEOPACKAGE}-wal").exists()
        labels.replace_output(SafePath.beside(new), SafePath.at(out) / run.GEOPACKAGE)
        with sqlite3.connect(out / run.GEOPACKAGE) as file:
            tables = {name for (name,) in file.execute("select name from sqlite_master")}
        file.close()
    other.close()
    assert "labels" in tables
    assert "of_the_old_one" not in tables
