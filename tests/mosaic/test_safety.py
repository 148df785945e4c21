"""Security of mosaics of untrusted pictures.

A mosaic reads the named file and its sidecar files only, writes to the output folder only, and
discloses no file that only the daemon may read.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
import rasterio.shutil
from rasterio.control import GroundControlPoint

from sam_poll.core.errors import PictureError, SamPollError
from sam_poll.core.safe_path import SafePath
from sam_poll.core.types import Size
from sam_poll.engines.fake import FakeEngine
from sam_poll.mosaic import assembly, run
from tests.support.mosaic_paths import mosaic, opened
from tests.support.mosaics import OPTIONS, Eyes, blobs, shown
from tests.support.rasters import virtual
from tools import mosaics

SIDE = 256
NOISE = np.random.default_rng(0).integers(0, 255, (3, SIDE, SIDE), np.uint8)
WORLD = "0.1\n0\n0\n-0.1\n400000.05\n4999999.95\n"


@pytest.fixture(autouse=True)
def _pictures_on_no_map_are_meant() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        yield


def write(path: Path, bands: npt.NDArray[Any] = NOISE, **more: Any) -> Path:
    count, height, width = bands.shape
    profile = {
        "driver": "GTiff",
        "dtype": bands.dtype,
        "count": count,
        "width": width,
        "height": height,
        **more,
    }
    with rasterio.open(path, "w", **profile) as file:
        file.write(bands)
    return path


def refusal(path: Path) -> PictureError:
    with pytest.raises(PictureError) as caught, opened(path):
        pass
    return caught.value


# ── the named file only ──


@pytest.mark.parametrize("before", ["", "\ufeff", "<?xml version='1.0'?>\n<!-- a comment -->\n"])
def test_vrt_is_refused_alike_whether_its_file_exists_or_not(tmp_path: Path, before: str) -> None:
    write(tmp_path / "secret.tif")
    path, said = tmp_path / "local.tif", []
    for name in ("secret.tif", "nothing.tif"):
        virtual(path, name)
        path.write_text(before + path.read_text())
        said.append(str(refusal(path)))
    assert said[0] == said[1]
    assert "VRT, which names other files" in said[0]
    assert "gdal_translate" in said[0]


def test_vrt_is_refused_on_the_command_line(tmp_path: Path) -> None:
    from tests.support.mosaics import invoke

    write(tmp_path / "secret.tif")
    done = invoke(
        str(virtual(tmp_path / "a.vrt", "secret.tif")), "-o", str(tmp_path / "out"), "-m", "fake"
    )
    assert done.exit_code == 3
    assert not list((tmp_path / "out").glob("labels*"))


@pytest.mark.parametrize("name", ["secret.tif", "nothing.tif"])
@pytest.mark.parametrize("kind", ["GTiff", "JP2OpenJPEG"])
def test_picture_that_names_an_overview_file_is_refused(
    tmp_path: Path, name: str, kind: str
) -> None:
    write(tmp_path / "secret.tif", np.full((1, 64, 64), 77, np.uint8))
    path = write(tmp_path / "a.tif", np.arange(SIDE * SIDE, dtype=np.uint16).reshape(1, SIDE, SIDE))
    with rasterio.open(path, "r+") as file:
        file.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=str(tmp_path / name))
    if kind == "JP2OpenJPEG":
        rasterio.shutil.copy(path, tmp_path / "a.jp2", driver=kind, WRITE_METADATA="YES")
        path = tmp_path / "a.jp2"
    error = refusal(path)
    assert "overviews" in error.reason
    assert name not in str(error)


@pytest.mark.parametrize("ending", [".ovr", ".msk", ".aux.xml", "_RPC.TXT", ".RPB"])
def test_gdal_opens_no_file_beside_a_picture(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.tif", NOISE.astype(np.uint16))
    beside = tmp_path / (f"a{ending}" if ending[0] == "_" or ending == ".RPB" else f"a.tif{ending}")
    expected = _whole(path)
    os.mkfifo(beside)  # opening it hangs or fails
    if ending == ".aux.xml":
        assert "links are not followed" in str(refusal(path).remedy)
    else:
        np.testing.assert_array_equal(_whole(path), expected)


def _whole(path: Path) -> npt.NDArray[np.uint8]:
    with opened(path) as picture:
        from sam_poll.mosaic.grid import Area

        return picture.read(Area(0, 0, *picture.size))[0]


@pytest.mark.parametrize("kind", ["broken.tif", "cut.png", "none.tif", "a.nc"])
def test_errors_name_the_picture_and_no_descriptor(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    body = {
        "broken.tif": b"II*\0\xff\xff\xff\xff",
        "cut.png": b"\x89PNG\r\n\x1a\n\0\0",
        "none.tif": b"nothing of the kind",
        "a.nc": b"CDF\x01",
    }[kind]
    path.write_bytes(body)
    error = refusal(path)
    assert error.place == str(path)
    assert "/dev/fd" not in str(error)


# ── files beside the picture ──


def placed(path: Path) -> tuple[Any, Any]:
    with opened(path) as picture:
        return picture.crs, tuple(picture.transform)[:6]


@pytest.mark.parametrize(
    ("picture", "beside"),
    [
        ("a.tif", "a.tfw"),
        ("a.tif", "a.TFW"),
        ("a.tif", "a.tifw"),
        ("a.TIFF", "a.tfw"),
        ("a.tif", "a.wld"),
        ("a.png", "a.pgw"),
        ("a.jpg", "a.jgw"),
        ("a.jpeg", "a.JGW"),
        ("a.b.png", "a.b.wld"),
    ],
)
def test_world_file_gives_the_transform_of_the_corner(
    tmp_path: Path, picture: str, beside: str
) -> None:
    driver = {"p": "PNG", "j": "JPEG"}.get(picture.rpartition(".")[2][0], "GTiff")
    path = write(tmp_path / picture, driver=driver)
    (tmp_path / beside).write_text(WORLD)
    assert placed(path) == (None, pytest.approx((0.1, 0, 400000, 0, -0.1, 5000000)))


def test_world_file_rotations_are_read_in_column_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif")
    (tmp_path / "a.tfw").write_text("0.3\r\n0.4\r\n0.4\r\n-0.3\r\n10.35\r\n20.05\r\n")
    ours = placed(path)
    with rasterio.open(path) as file:  # GDAL without restrictions
        assert ours[1] == pytest.approx(tuple(file.transform)[:6])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "six numbers"),
        (b"0.1\n0\n0\n-0.1\n400000", "six numbers"),
        (b"0.1\n0\n0\n-0.1\n400000\nfive", "six numbers"),
        (b"0\n0\n0\n0\n1\n1\n", "no area"),
        (b"nan\n0\n0\n1\n1\n1\n", "no area"),
        (b"1\n" * 9999, "more than"),
        (b"\xff\xfe\0", "six numbers"),
    ],
)
def test_world_file_that_is_broken_is_refused_by_name(
    tmp_path: Path, body: bytes, reason: str
) -> None:
    path = write(tmp_path / "a.tif")
    (tmp_path / "a.tfw").write_bytes(body)
    error = refusal(path)
    assert error.place == str(tmp_path / "a.tfw")
    assert reason in error.reason


def test_georeference_precedence_is_aux_xml_picture_world_file(
    tmp_path: Path,
) -> None:
    mosaics.write(tmp_path / "a.tif", np.moveaxis(NOISE, 0, 2))
    (tmp_path / "a.tfw").write_text("7\n0\n0\n-7\n1\n1\n")
    own = placed(tmp_path / "a.tif")
    assert own[1][0] == pytest.approx(mosaics.METRE)
    (tmp_path / "a.tif.aux.xml").write_text(
        "<PAMDataset><SRS>EPSG:32632</SRS>"
        "<GeoTransform> 1, 2, 0, 3, 0, -2</GeoTransform></PAMDataset>"
    )
    crs, transform = placed(tmp_path / "a.tif")
    assert (crs.to_epsg(), transform) == (32632, (2, 0, 1, 0, -2, 3))


def test_aux_xml_is_read_as_gdal_reads_it(tmp_path: Path) -> None:
    more = {
        "crs": "EPSG:32633",
        "transform": rasterio.transform.from_origin(400_000, 5_000_000, 0.1, 0.1),
    }
    path = write(tmp_path / "a.png", driver="PNG", nodata=7, **more)
    (tmp_path / "a.wld").unlink(missing_ok=True)
    assert (tmp_path / "a.png.aux.xml").exists()
    with rasterio.open(path) as file:
        expected = file.crs, tuple(file.transform)[:6]
    assert placed(path) == expected


@pytest.mark.parametrize(
    "body",
    [
        b"<!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><PAMDataset><SRS>&b;</SRS></PAMDataset>",
        b"<PAMDataset><GeoTransform>1, 2, 3</GeoTransform></PAMDataset>",
        b"<PAMDataset><GeoTransform>0, 0, 0, 0, 0, 0</GeoTransform></PAMDataset>",
        b"<PAMDataset><PAMRasterBand band='x'><NoDataValue>1</NoDataValue></PAMRasterBand>"
        b"</PAMDataset>",
        b"<PAMDataset><SRS>PROJCS[nothing of the kind</SRS></PAMDataset>",
        b"<PAMDataset>",
        b"",
    ],
)
def test_aux_xml_that_is_broken_is_refused(tmp_path: Path, body: bytes) -> None:
    path = write(tmp_path / "a.tif")
    (tmp_path / "a.tif.aux.xml").write_bytes(body)
    assert "aux.xml" in str(refusal(path))


@pytest.mark.parametrize(
    "named", ["secret.prj", "/vsicurl/http://127.0.0.1:9/a.prj", "http://127.0.0.1:9/a.prj"]
)
def test_aux_xml_crs_that_names_a_file_is_not_opened(tmp_path: Path, named: str) -> None:
    (tmp_path / "secret.prj").write_text(rasterio.crs.CRS.from_epsg(32633).to_wkt())
    path = write(tmp_path / "a.tif")
    (tmp_path / "a.tif.aux.xml").write_text(
        f"<PAMDataset><SRS>{tmp_path / named}</SRS></PAMDataset>"
    )
    with opened(path) as picture:
        assert picture.crs is None
        assert "neither WKT nor an EPSG number" in picture.notes()[0]


def test_link_beside_a_picture_is_refused_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(WORLD)
    path = write(tmp_path / "a.tif")
    (tmp_path / "a.tfw").symlink_to("secret")
    error = refusal(path)
    assert error.place == str(tmp_path / "a.tfw")
    assert "links are not followed" in str(error.remedy)


def test_notes_report_a_mask_file_that_is_ignored(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif")
    (tmp_path / "a.tif.msk").write_bytes(b"of no matter what")
    with opened(path) as picture:
        assert "a.tif.msk" in picture.notes()[0]


# ── notes ──


def _notes(path: Path) -> list[str]:
    with opened(path) as picture:
        return picture.notes()


@pytest.mark.parametrize("value", [0, 255])
def test_notes_report_a_margin_of_one_colour_unless_nodata_is_declared(
    tmp_path: Path, value: int
) -> None:
    bands = NOISE.copy()
    bands[:, :, :80] = value
    (note,) = _notes(write(tmp_path / "a.tif", bands))
    assert f"-a_nodata {value}" in note
    assert _notes(write(tmp_path / "b.tif", bands, nodata=value)) == []
    assert _notes(write(tmp_path / "c.tif", NOISE)) == []


def test_notes_report_a_margin_of_a_mixed_colour_with_another_remedy(tmp_path: Path) -> None:
    bands = NOISE.copy()
    bands[:, :, :80] = np.array([1, 2, 3])[:, None, None]
    (note,) = _notes(write(tmp_path / "a.tif", bands))
    assert "(1, 2, 3)" in note
    assert "alpha band" in note


@pytest.mark.parametrize("value", [-9999.0, 0.0, -3.4e38])
def test_notes_report_an_outlier_in_a_raster_of_measurements(tmp_path: Path, value: float) -> None:
    heights = np.random.default_rng(0).uniform(300, 420, (1, SIDE, SIDE)).astype(np.float32)
    heights[0, 90:150, 90:180] = value
    (note,) = _notes(write(tmp_path / "a.tif", heights))
    assert f"-a_nodata {value:g}" in note
    assert _notes(write(tmp_path / "b.tif", heights, nodata=value)) == []


def test_notes_report_a_georeference_by_points_in_stats_and_log(
    tmp_path: Path, logged: list[str]
) -> None:
    points = [
        GroundControlPoint(0, 0, 10, 50),
        GroundControlPoint(0, 99, 11, 50),
        GroundControlPoint(99, 0, 10, 49),
    ]
    path = write(tmp_path / "a.tif", gcps=points, crs="EPSG:4326")
    stats = mosaic(path, tmp_path / "out", OPTIONS, FakeEngine)
    (note,) = stats["notes"]
    assert "3 ground control points" in note
    assert "gdalwarp" in note
    assert any(line.startswith("WARNING") and note in line for line in logged)


# ── outputs ──


OUTPUTS = (run.RASTER, run.GEOPACKAGE, run.GEOJSON)
KEPT = (*OUTPUTS, run.STATS, "job.json", "end.lock")


def plant(folder: Path, outside: Path, *, links: bool) -> None:
    """Replace a folder by one that holds links, or by a link. OSError where it is gone."""
    folder.rename(folder.with_name(f"{folder.name}-aside"))
    if not links:
        folder.symlink_to(outside)
        return
    folder.mkdir()
    for name in KEPT:
        (folder / name).symlink_to(outside / name)


class Swaps:
    """A user with write access who replaces the folders from a stage of the mosaic on."""

    def __init__(self, share: Path, outside: Path, stage: str) -> None:
        self._share = share
        self._outside = outside
        self._stage = stage
        self._begin, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.swapped = 0

    def on_tile(self, step: run.Step) -> None:
        if step.stage == self._stage:
            self._begin.set()

    def __enter__(self) -> Swaps:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._begin.set()
        self._thread.join()

    def _run(self) -> None:
        self._begin.wait()
        while not self._stop.is_set():
            for folder in [
                path for path in self._share.rglob("*") if path.is_dir() and not path.is_symlink()
            ]:
                with suppress(OSError):
                    plant(folder, self._outside, links=bool(self.swapped % 2))
                    self.swapped += 1


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """Return a folder of another user, in which nothing may change."""
    made = tmp_path / "outside"
    made.mkdir()
    for name in KEPT:
        (made / name).write_text("of somebody else")
    yield made
    assert {path.name: path.read_text() for path in made.iterdir()} == dict.fromkeys(
        KEPT, "of somebody else"
    )


@pytest.mark.parametrize("stage", ["tiles", "seams", "slivers", "labels", "polygons"])
def test_folders_replaced_by_links_during_a_mosaic_are_not_followed(
    tmp_path: Path, outside: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "label_window", Eyes())
    mosaics.write(tmp_path / "a.tif", shown(blobs(3, Size(300, 200))))
    swapped, said = 0, ""
    for number in range(1000):
        out = tmp_path / f"out-{number}"
        out.mkdir()
        with Swaps(out, outside, stage) as swaps:
            try:
                mosaic(tmp_path / "a.tif", out, OPTIONS, FakeEngine, swaps.on_tile)
            except (
                OSError,
                SamPollError,
            ) as error:  # the mosaic itself may fail
                said += f"{error}\n"
        swapped += swaps.swapped
        if swapped > 20 and number >= 5:
            break
    assert said
    assert "/dev/fd" not in said


@pytest.mark.parametrize("stage", ["labels", "polygons"])
@pytest.mark.parametrize("planted", ["link", "folder with links"])
def test_links_planted_just_before_an_output_are_not_followed(
    tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch, stage: str, planted: str
) -> None:
    monkeypatch.setattr(assembly, "label_window", Eyes())
    mosaics.write(tmp_path / "a.tif", shown(blobs(3, Size(300, 200))))
    really = SafePath.create

    def create(path: SafePath) -> Any:
        if path.name == {"labels": run.RASTER, "polygons": run.GEOPACKAGE}[stage]:
            plant(path.parent.path, outside, links=planted == "folder with links")
        return really(path)

    monkeypatch.setattr(SafePath, "create", create)
    said = ""
    try:
        mosaic(tmp_path / "a.tif", tmp_path / "out", OPTIONS, FakeEngine)
    except Exception as error:  # noqa: BLE001  an error and the use of the open folder are both safe
        said = str(error)
    assert "/dev/fd" not in said
    whole = all(
        (tmp_path / "out" / name).is_file() for name in (run.RASTER, run.GEOPACKAGE, run.GEOJSON)
    )
    assert whole != bool(said), "it ends with an error, or with all its outputs"
