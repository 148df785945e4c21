"""Pictures of a mosaic: every format is read upright, complete, and without network access."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
from PIL import Image
from rasterio._env import get_gdal_config
from rasterio.enums import ColorInterp

from sam_poll.core.errors import FileChangedError, IncompleteFileError, PictureError
from sam_poll.core.types import AutomaticMaskRequest, Size
from sam_poll.engines.fake import FakeEngine
from sam_poll.imaging import decode
from sam_poll.mosaic import raster, run
from sam_poll.mosaic.grid import Area, TileGrid
from sam_poll.mosaic.run import MosaicOptions
from sam_poll.mosaic.segment_tile import Passes
from tests.support.mosaic_paths import mosaic, opened
from tests.support.rasters import virtual
from tools import mosaics

HEIGHT, WIDTH = 60, 90
RAMP = np.linspace(0, 1, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
NOISE = np.random.default_rng(0).integers(0, 255, (3, HEIGHT, WIDTH), np.uint8)
OPTIONS = MosaicOptions(
    64,
    16,
    Passes(AutomaticMaskRequest(points_per_side=4, min_area=20, iou=0.5, stability=0.5)),
    "fake",
)


@pytest.fixture(autouse=True)
def _pictures_on_no_map_are_meant() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        yield


def write(
    path: Path, bands: npt.NDArray[Any], colours: Any = None, table: Any = None, **more: Any
) -> Path:
    """Write C×H×W or H×W as a GeoTIFF, or with another driver."""
    bands = bands if bands.ndim == 3 else bands[None]
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
        if colours:
            file.colorinterp = colours
        if table:
            file.write_colormap(1, table)
    return path


def read(path: Path, tile: int = 10**6) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Return a picture assembled from its windows."""
    with opened(path) as picture:
        shape = picture.size.height, picture.size.width
        pixels, valid = np.zeros((*shape, 3), np.uint8), np.zeros(shape, bool)
        for piece in TileGrid(picture.size, tile, 8):
            where = piece.core.within(Area(0, 0, *picture.size))
            pixels[where], valid[where] = picture.read(piece.core)
    return pixels, valid


# ── upright ──


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "tif", "webp", "png"])
def test_raster_is_read_upright_as_elsewhere_in_the_program(
    tmp_path: Path, ending: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"a.{ending}"
    smooth = np.dstack([RAMP * 255, RAMP[::-1] * 255, RAMP[:, ::-1] * 255]).astype(np.uint8)
    lossless: Any = {"lossless": True} if ending == "webp" else {}
    Image.fromarray(smooth).save(path, exif=exif, **lossless)
    expected = decode.decode(path.read_bytes()).pixels
    assert expected.shape == ((HEIGHT, WIDTH, 3) if orientation < 5 else (WIDTH, HEIGHT, 3))
    seen, valid = read(path, tile=32)
    assert valid.all()
    np.testing.assert_allclose(
        seen.astype(int), expected, atol=8 if ending == "jpg" else 0
    )  # two decoders


@pytest.mark.parametrize("place", ["world file", "points", "crs"])
def test_raster_with_a_georeference_is_read_as_stored(tmp_path: Path, place: str) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.moveaxis(NOISE, 0, 2)).save(tmp_path / "a.tif", exif=exif)
    if place == "world file":
        (tmp_path / "a.tfw").write_text("0.1\n0\n0\n-0.1\n400000\n5000000\n")
    elif place == "points":
        (tmp_path / "a.tif.aux.xml").write_text(
            "<PAMDataset><GCPList Projection='EPSG:4326'>"
            + "".join(
                f"<GCP Id='{x}' Pixel='{x}' Line='{y}' X='{x}' Y='{y}'/>"
                for x, y in ((0, 0), (9, 0), (0, 9))
            )
            + "</GCPList></PAMDataset>"
        )
    else:
        (tmp_path / "a.tif.aux.xml").write_text("<PAMDataset><SRS>EPSG:32633</SRS></PAMDataset>")
    np.testing.assert_array_equal(read(tmp_path / "a.tif")[0], np.moveaxis(NOISE, 0, 2))


def test_labels_are_upright_as_the_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    stored = np.moveaxis(NOISE, 0, 2)
    Image.fromarray(stored).save(tmp_path / "turned.tif", exif=exif)
    Image.fromarray(np.rot90(stored, -1).copy()).save(tmp_path / "upright.tif")
    for name in ("turned", "upright"):
        mosaic(tmp_path / f"{name}.tif", tmp_path / name, OPTIONS, FakeEngine)
    labels = mosaics.read(tmp_path / "turned" / run.RASTER)
    assert labels.shape == (WIDTH, HEIGHT)
    assert labels.any()
    np.testing.assert_array_equal(labels, mosaics.read(tmp_path / "upright" / run.RASTER))


@pytest.mark.parametrize(
    "note", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nothing of the kind", b"Exif\0\0"]
)
def test_raster_with_a_broken_orientation_is_not_turned(tmp_path: Path, note: bytes) -> None:
    Image.fromarray(np.moveaxis(NOISE, 0, 2)).save(tmp_path / "a.jpg", exif=note)
    assert read(tmp_path / "a.jpg")[0].shape == (HEIGHT, WIDTH, 3)


# ── values ──


def flat(*values: int) -> npt.NDArray[np.uint8]:
    return np.stack([np.full((HEIGHT, WIDTH), value, np.uint8) for value in values])


BLUE_FIRST = [ColorInterp.blue, ColorInterp.green, ColorInterp.red, ColorInterp.undefined]


@pytest.mark.parametrize(
    ("bands", "more", "expected"),
    [
        (flat(10, 20, 30, 40), {"colours": BLUE_FIRST}, (30, 20, 10)),
        (flat(10, 20), {}, (10, 10, 10)),
        (flat(255, 0, 0, 0), {"photometric": "CMYK"}, (0, 255, 255)),
        (flat(200, 20, 30), {"photometric": "YCBCR", "compress": "jpeg"}, (200, 20, 31)),
        (flat(1), {"nbits": 1, "driver": "PNG"}, (255, 255, 255)),
        (flat(5), {"nbits": 4}, (85, 85, 85)),
        (flat(200), {"photometric": "MINISWHITE"}, (55, 55, 55)),
        (flat(1), {"photometric": "MINISWHITE", "nbits": 1}, (0, 0, 0)),
        (
            flat(2).astype(np.uint16),
            {"photometric": "palette", "table": {2: (1, 2, 3, 255)}},
            (1, 2, 3),
        ),
    ],
    ids=[
        "bgr",
        "two",
        "cmyk",
        "ycbcr",
        "1 bit",
        "4 bits",
        "white is zero",
        "fax",
        "16-bit palette",
    ],
)
def test_raster_shows_the_colours_of_a_viewer(
    tmp_path: Path, bands: Any, more: Any, expected: Any
) -> None:
    seen, valid = read(write(tmp_path / "a.tif", bands, **more))
    assert {tuple(colour) for colour in seen.reshape(-1, 3).tolist()} == {expected}
    assert valid.all()


@pytest.mark.parametrize(
    "values",
    [
        (RAMP * 4000).astype(np.uint16),
        (RAMP * 4000 - 2000).astype(np.int16),
        (RAMP * 200 - 100).astype(np.int8),
        (RAMP * 4000 + 4e9).astype(np.uint32),
        (RAMP * 4000).astype(np.int64),
        RAMP * 1e-3 + 2_459_000.5,
        ((RAMP - 0.5) * 6e38).astype(np.float32),
    ],
    ids=["uint16", "int16", "int8", "large uint32", "int64", "days", "huge float32"],
)
def test_raster_stretches_every_range_of_values(tmp_path: Path, values: npt.NDArray[Any]) -> None:
    seen = read(write(tmp_path / "a.tif", values))[0][..., 0]
    assert (seen[0, 0], seen[-1, -1]) == (0, 255)
    assert abs(int(seen[HEIGHT // 2, 0]) - 128) < 4


def test_raster_excludes_infinities_from_data_and_stretch(tmp_path: Path) -> None:
    values = (RAMP * 100).astype(np.float32)
    values[0, :2] = np.inf, -np.inf
    seen, valid = read(write(tmp_path / "a.tif", values))
    assert np.count_nonzero(~valid) == 2
    assert abs(int(seen[HEIGHT // 2, 0, 0]) - 128) < 4


@pytest.mark.parametrize("empty", [0, 7])
def test_raster_shows_few_values_that_differ_from_one(tmp_path: Path, empty: int) -> None:
    values = np.full((HEIGHT, WIDTH), empty, np.uint16)
    values[:4, :4] = np.arange(1000, 1016).reshape(4, 4)
    seen = read(write(tmp_path / "a.tif", values))[0][..., 0]
    assert seen[3, 3] == 255
    assert (seen[10:] == 0).all()


def test_raster_of_one_value_is_read(tmp_path: Path) -> None:
    assert len(np.unique(read(write(tmp_path / "a.tif", np.full((9, 9), 7, np.uint16)))[0])) == 1


def test_raster_with_data_in_a_corner_only_is_stretched_by_it(tmp_path: Path) -> None:
    values = np.zeros((5000, 5000), np.uint16)
    values[4998:, 4998:] = [
        [20000, 20300],
        [20600, 21000],
    ]  # at pixels that the reduced picture skips
    path = write(tmp_path / "a.tif", values, nodata=0, compress="deflate", tiled=True)
    with opened(path) as picture:
        pixels, valid = picture.read(Area(4998, 4998, 5000, 5000))
    assert valid.all()
    assert len(np.unique(pixels)) == 4


@pytest.mark.parametrize(
    "kind", ["value", "nan", "mask", "aux.xml", "alpha", "16-bit alpha", "palette"]
)
def test_raster_recognises_every_declaration_of_nodata(tmp_path: Path, kind: str) -> None:
    gone = np.zeros((HEIGHT, WIDTH), bool)
    gone[:, :30] = True
    there = np.where(gone, 0, 255).astype(np.uint8)
    path = tmp_path / "a.tif"
    if kind == "value":
        write(path, np.where(gone, -9999, RAMP).astype(np.float32), nodata=-9999)
    elif kind == "nan":
        write(path, np.where(gone, np.nan, RAMP).astype(np.float32))
    elif kind == "mask":
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
            write(path, NOISE)
            with rasterio.open(path, "r+") as file:
                file.write_mask(there)
    elif kind == "alpha":
        write(path, np.concatenate([NOISE, there[None]]), photometric="RGB", alpha="yes")
    elif kind == "16-bit alpha":
        write(
            path,
            np.concatenate([NOISE * np.uint16(200), there[None] * np.uint16(257)]),
            photometric="RGB",
            alpha="yes",
        )
    elif kind == "aux.xml":
        write(path, np.where(gone, np.array([5, 6, 7])[:, None, None], 0).astype(np.uint8))
        bands = "".join(
            f"<PAMRasterBand band='{n}'><NoDataValue>{n + 4}</NoDataValue></PAMRasterBand>"
            for n in (1, 2, 3)
        )
        (tmp_path / "a.tif.aux.xml").write_text(f"<PAMDataset>{bands}</PAMDataset>")
    else:
        table = {0: (9, 9, 9, 0), 1: (9, 9, 9, 0), 2: (10, 20, 30, 128), 3: (200, 100, 50, 255)}
        write(
            path,
            np.where(gone, NOISE[0] % 2, NOISE[0] % 2 + 2).astype(np.uint8),
            table=table,
            driver="PNG",
        )
    assert (read(path, tile=32)[1] == ~gone).all()


# ── files ──


@pytest.mark.parametrize("kind", ["name", "vsicurl", "part", "part by vsicurl", "service"])
def test_raster_fetches_nothing_over_the_network(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/a.tif"
        path = tmp_path / "a.vrt"
        if kind in ("name", "vsicurl"):
            path = Path(address if kind == "name" else f"/vsicurl/{address}")
        elif kind == "service":
            path.write_text(
                f'<GDAL_WMS><Service name="TMS"><ServerUrl>{address}'
                "/${z}/${x}/${y}.png</ServerUrl></Service>"
                "<DataWindow><UpperLeftX>0</UpperLeftX><UpperLeftY>0</UpperLeftY><LowerRightX>9</LowerRightX>"
                "<LowerRightY>-9</LowerRightY><TileLevel>2</TileLevel></DataWindow></GDAL_WMS>"
            )
        else:
            virtual(path, address if kind == "part" else f"/vsicurl/{address}")
        with pytest.raises(PictureError):
            read(path)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):  # nothing has connected
            server.accept()


@pytest.mark.parametrize(
    "name",
    [
        "a b.tif",
        "ä.tif",
        "a\nb.tif",
        "GTIFF_DIR:1:a.tif",
        "zip+a!b.tif",
        "a?b#c.tif",
        os.fsdecode(b"no utf-8 \xff.tif"),
    ],
)
def test_raster_takes_every_name_as_a_file_name(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "plain.tif", NOISE).rename(name)
    assert read(Path(name))[1].all()


def test_raster_refuses_what_is_not_a_picture_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "empty.tif").touch()
    (tmp_path / "folder.tif").mkdir()
    os.mkfifo(tmp_path / "pipe.tif")
    for path, reason in (
        (tmp_path / "empty.tif", "empty"),
        (tmp_path / "folder.tif", "not a file"),
        (tmp_path / "pipe.tif", "not a file"),
        (tmp_path / "none.tif", "No such file"),
    ):
        with pytest.raises(PictureError, match=reason) as caught, opened(path):
            pass
        assert caught.value.place == str(path)


def test_raster_of_complex_values_is_refused(tmp_path: Path) -> None:
    for kind in ("complex64", "complex_int16"):
        path = write(tmp_path / f"{kind}.tif", RAMP.astype(np.complex64), dtype=kind)
        with pytest.raises(PictureError, match="complex"), opened(path):
            pass


@pytest.mark.parametrize(
    "more", [{"tiled": True, "blockxsize": 16, "blockysize": 16}, {}, {"compress": "deflate"}]
)
def test_raster_of_a_truncated_tiff_is_refused_before_the_first_tile(
    tmp_path: Path, more: Any
) -> None:
    body = write(tmp_path / "a.tif", NOISE, **more).read_bytes()
    (tmp_path / "cut.tif").write_bytes(body[:-30])
    with (
        pytest.raises(IncompleteFileError, match=f"{len(body) - 30:,} bytes"),
        opened(tmp_path / "cut.tif"),
    ):
        pass


def test_raster_sets_the_gdal_cache(tmp_path: Path) -> None:
    with opened(write(tmp_path / "a.tif", NOISE)):
        assert get_gdal_config("GDAL_CACHEMAX") == 128 * 2**20


def test_raster_that_can_only_be_read_whole_is_refused_if_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.tif", NOISE, compress="deflate", blockysize=HEIGHT)
    monkeypatch.setattr(raster, "BLOCK_MIB", 3 * HEIGHT * WIDTH / 2**20)
    assert read(path)[1].all()
    monkeypatch.setattr(raster, "BLOCK_MIB", 2 * HEIGHT * WIDTH / 2**20)
    with pytest.raises(PictureError, match=f"pieces of {WIDTH} × {HEIGHT}") as caught, opened(path):
        pass
    assert "TILED=YES" in str(caught.value.remedy)


def test_raster_that_is_written_to_raises_file_changed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", NOISE)
    with opened(path) as picture:
        picture.read(Area(0, 0, 9, 9))
        with path.open("ab") as file:
            file.write(b"more")
        with pytest.raises(FileChangedError, match="changed while"):
            picture.read(Area(0, 0, 9, 9))


@pytest.mark.parametrize("how", ["replaced", "removed"])
def test_raster_that_is_replaced_is_read_as_it_was(tmp_path: Path, how: str) -> None:
    path = write(tmp_path / "a.tif", NOISE, tiled=True, blockxsize=16, blockysize=16)
    with opened(path) as picture:
        if how == "replaced":
            write(tmp_path / "b.tif", 255 - NOISE).replace(path)
        else:
            path.unlink()
        seen, _ = picture.read(Area(0, 0, WIDTH, HEIGHT))
    np.testing.assert_array_equal(seen, np.moveaxis(NOISE, 0, 2))


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (64, 64), (65, 129), (3, 64)])
def test_mosaics_of_pictures_of_every_shape_are_complete(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    width, height = size
    write(
        tmp_path / "a.tif", np.random.default_rng(1).integers(0, 255, (3, height, width), np.uint8)
    )
    stats = mosaic(tmp_path / "a.tif", tmp_path / "out", OPTIONS, FakeEngine)
    assert stats["tiles"] == len(TileGrid(Size(width, height), OPTIONS.tile, OPTIONS.padding))
    assert mosaics.read(tmp_path / "out" / run.RASTER).shape == (height, width)
