"""A large picture, read window by window: upright RGB, valid pixels, and georeference.

A picture without a georeference is turned upright by its EXIF or TIFF orientation, window by
window. A georeferenced picture is read as it is stored: GDAL ignores the orientation, and the
georeference is that of the stored pixels.

Security: GDAL opens only this one file, with only a few of its drivers. Otherwise a user who drops
a picture could make the daemon read, and answer with, files that only the daemon may read: through
a VRT, or through the metadata of a TIFF. So the driver is chosen by the file's first bytes, an
overview in another file is refused, and files beside the picture are read by `imaging.sidecars`.
Nothing is fetched over the network.

Limitations: JPEG and PNG are decoded line by line from the top. Where a row of tiles does not fit
into GDAL's cache, or the picture is turned on its side, each tile decodes everything above it
again. A tiled GeoTIFF has no such problem. An orientation stored behind a PNG's pixels is not read.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import rasterio
from PIL import Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from rasterio._err import CPLE_BaseError
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, Interleaving, MaskFlags
from rasterio.errors import CRSError, RasterioError
from rasterio.transform import Affine
from rasterio.windows import Window

from sam_poll.core.errors import FileChangedError, IncompleteFileError, PictureError
from sam_poll.core.files import NO_FILE, NOT_THERE
from sam_poll.core.safe_path import SafePath
from sam_poll.core.types import BoolArray, RgbArray, Size
from sam_poll.imaging import sidecars
from sam_poll.imaging.damage import COPY_AGAIN
from sam_poll.imaging.heif import is_heif
from sam_poll.mosaic import hints
from sam_poll.mosaic.grid import Area

# GDAL's cache, whose default is 5 % of the machine's memory. A row of tiles of a picture 40,000
# pixels wide fits.
CACHE_MIB = 128
# Largest piece of a file, in MiB of pixels, that can only be decoded as a whole.
BLOCK_MIB = 1024
# Side in pixels of the reduced picture from which the contrast stretch of values other than 8-bit
# ones is computed.
_SAMPLE = 1024
# Valid pixels that the reduced picture must have; with fewer the whole picture is read, and at most
# so many pixels of each window are used.
_MIN_SAMPLE_PX = 1000
_MAX_WINDOW_SAMPLE_PX = 4096
_TAIL = 2  # per cent of the values that are clipped at both ends of the contrast stretch
FAILED = (RasterioError, CPLE_BaseError)  # rasterio's errors, and GDAL's that it passes on
_NO_NETWORK = "none://the-network-is-not-used"  # a proxy that curl refuses before it sends anything
_ENVIRONMENT = {
    "GDAL_CACHEMAX": CACHE_MIB * 2**20,
    "GDAL_HTTP_PROXY": _NO_NETWORK,
    "GDAL_HTTPS_PROXY": _NO_NETWORK,
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # makes GDAL ignore files beside the picture
}
KINDS = "GeoTIFF, PNG, JPEG, JPEG 2000, BMP and WebP"
# GDAL's drivers by a file's first bytes. All of them read only the file that they are given.
_DRIVERS = {
    b"II*\0": "GTiff",
    b"MM\0*": "GTiff",
    b"II+\0": "GTiff",
    b"MM\0+": "GTiff",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JP2OpenJPEG",
    b"\xff\x4f\xff\x51": "JP2OpenJPEG",
    b"RIFF": "WEBP",
    b"BM": "BMP",
}
_VRT, _SERVER = b"<VRTDataset", b"<GDAL_WMS"
# Common formats that are refused, by a file's first bytes, with a name for the error.
_FOREIGN = {
    _VRT: "a VRT, which names other files",
    _SERVER: "the description of a map server",
    b"GIF8": "a GIF",
    b"CDF": "netCDF",
    b"\x89HDF": "HDF or netCDF",
    b"EHFA_HEADER_TAG": "an ERDAS image",
    b"%PDF": "a PDF",
}
_XML = (_VRT, _SERVER)  # may follow a comment or a declaration
_HEADER_BYTES = 2048  # read to recognise a format
_TILED = (
    "convert it to a tiled GeoTIFF: gdal_translate -co TILED=YES -co COMPRESS=DEFLATE IN OUT.tif"
)
# Tags of TIFF 6.0: orientation (also of EXIF); offsets and byte counts of strips, and of tiles.
_ORIENTATION = 274
_OFFSETS_AND_LENGTHS = ((273, 279), (324, 325))
_Reader = Callable[[BinaryIO], Image.Image]
# By a file's first bytes. `Image.open` is not used, because it refuses large pictures.
_READERS: dict[bytes, _Reader] = {
    b"\xff\xd8": JpegImagePlugin.JpegImageFile,
    b"\x89PNG": PngImagePlugin.PngImageFile,
    b"RIFF": WebPImagePlugin.WebPImageFile,
}
_RGB = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)


class _Turn(NamedTuple):
    """How stored pixels become upright: transposed first, then flipped left-right and up-down."""

    transposed: bool = False
    flip_columns: bool = False
    flip_rows: bool = False

    def size(self, stored: Size) -> Size:
        """Return the upright size."""
        return Size(stored.height, stored.width) if self.transposed else stored

    def stored(self, area: Area, upright: Size) -> Area:
        """Return where an area of the upright picture, of size `upright`, is stored."""
        x0, y0, x1, y1 = area
        if self.flip_columns:
            x0, x1 = upright.width - x1, upright.width - x0
        if self.flip_rows:
            y0, y1 = upright.height - y1, upright.height - y0
        return Area(y0, x0, y1, x1) if self.transposed else Area(x0, y0, x1, y1)

    def __call__(self, pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return stored pixels, H×W×…, upright."""
        pixels = np.swapaxes(pixels, 0, 1) if self.transposed else pixels
        row_step = -1 if self.flip_rows else 1
        column_step = -1 if self.flip_columns else 1
        return np.ascontiguousarray(pixels[::row_step, ::column_step])


# By EXIF orientation.
_TURNS = {
    1: _Turn(),
    2: _Turn(flip_columns=True),
    3: _Turn(flip_columns=True, flip_rows=True),
    4: _Turn(flip_rows=True),
    5: _Turn(transposed=True),
    6: _Turn(transposed=True, flip_columns=True),
    7: _Turn(transposed=True, flip_columns=True, flip_rows=True),
    8: _Turn(transposed=True, flip_rows=True),
}


class WindowedRaster(Protocol):
    """A picture that is read window by window, with its georeference; see `Raster`."""

    @property
    def size(self) -> Size:
        """Return the upright size in pixels."""
        ...

    @property
    def crs(self) -> Any:
        """Return the CRS; None where there is none."""
        ...

    @property
    def transform(self) -> Any:
        """Return the affine transform from pixels to the CRS; the identity where there is none."""
        ...

    @property
    def nodata(self) -> float | None:
        """Return the nodata value of the first band shown; None where there is none."""
        ...

    @property
    def gcps(self) -> Any:
        """Return the ground control points and their CRS."""
        ...

    @property
    def rpcs(self) -> Any:
        """Return the rational polynomial coefficients; None where there are none."""
        ...

    @property
    def beside(self) -> list[tuple[str, int, int]]:
        """Return the files beside the picture that were read (`sidecars.Sidecars.seen`)."""
        ...

    def notes(self) -> list[str]:
        """Return warnings for the picture's owner."""
        ...

    def read(self, area: Area) -> tuple[RgbArray, BoolArray]:
        """Return the pixels of an area as RGB, and which of them are valid."""
        ...


class Raster:
    """An open picture.

    `crs` is None and `transform` the identity where the picture has no georeference. `gcps` (points
    and their CRS) and `rpcs` are the georeference of a picture without a transform. `beside` lists
    the files beside the picture that were read.
    """

    def __init__(
        self,
        dataset: Any,
        file: BinaryIO,
        place: str,
        orientation: int,
        beside: sidecars.Sidecars | None = None,
    ) -> None:
        beside = beside or sidecars.Sidecars()
        self._dataset = dataset
        self._file = file
        self._place = place
        self._opened_version = _version(file)
        self._sidecar_notes = beside.notes
        self.beside = beside.seen
        self._notes: list[str] | None = None
        self._set_georeference(beside)
        is_georeferenced = self.crs or not self.transform.is_identity or self.gcps[0] or self.rpcs
        self._turn = _TURNS[1 if is_georeferenced else orientation]
        self.size = self._turn.size(Size(dataset.width, dataset.height))
        self._bands = _colour_bands(_interpretations(dataset))
        self._palette = _palette(dataset)
        # The picture's own nodata value takes precedence over those of the .aux.xml.
        absent = [beside.nodata.get(band) for band in self._bands]
        self._absent = None if dataset.nodata is not None or None in absent else absent
        self.nodata = absent[0] if self._absent else dataset.nodata
        self._outlier: float | None = None
        self._inverted = (
            self._palette is None and dataset.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES"
        )
        self._stretch = None if self._palette is not None else self._stretch_limits()

    def _set_georeference(self, beside: sidecars.Sidecars) -> None:
        """Set the georeference, with GDAL's precedence: .aux.xml, the picture, a world file."""
        dataset = self._dataset
        self.crs = _crs_of(beside.crs, self._place) or dataset.crs
        self.transform = dataset.transform
        self.gcps = dataset.gcps
        self.rpcs = dataset.rpcs
        if beside.points:
            points = [
                GroundControlPoint(each.row, each.column, each.x, each.y, each.z)
                for each in beside.points
            ]
            self.gcps = points, _crs_of(beside.points_crs, self._place)
        if beside.transform:
            self.transform = Affine(*beside.transform)
        elif beside.world and self.transform.is_identity and not self.gcps[0]:
            self.transform = Affine(*beside.world)

    def notes(self) -> list[str]:
        """Return warnings for the picture's owner, in sentences.

        The first call reads the picture's corners. Raises as `read` does.
        """
        if self._notes is None:
            self._notes = [*self._sidecar_notes]
            if self.transform.is_identity and (self.gcps[0] or self.rpcs):
                self._notes.append(hints.without_transform(len(self.gcps[0])))
            if not self._declares_nodata():
                value = hints.margin(self._values, Size(self._dataset.width, self._dataset.height))
                if not value and self._outlier is not None:
                    value = [self._outlier]
                if value:
                    self._notes.append(hints.undeclared(value))
        return self._notes

    def _declares_nodata(self) -> bool:
        flags = self._dataset.mask_flag_enums
        return self._absent is not None or any(
            MaskFlags.all_valid not in flags[band - 1] for band in self._bands
        )

    def read(self, area: Area) -> tuple[RgbArray, BoolArray]:
        """Return an area as RGB (uint8, H×W×3), and which pixels are valid (bool, H×W).

        A pixel is valid if it is neither nodata nor transparent. Raises PictureError, and
        FileChangedError where the file has been written to since it was opened.
        """
        bands, valid = self._values(self._turn.stored(area, self.size))
        if _version(self._file) != self._opened_version:
            raise FileChangedError(
                "the picture was changed while it was read", place=self._place, remedy="start again"
            )
        if self._palette is not None:
            valid &= self._palette[bands[0], 3] > 0
        return self._turn(self._rgb(bands)), self._turn(valid)

    def _values(self, stored: Area, size: Size | None = None) -> tuple[npt.NDArray[Any], BoolArray]:
        """Return the bands that are shown (C×H×W), and which pixels are valid (H×W).

        `stored` is an area of the stored picture; `size` is the size to reduce it to. Raises
        PictureError.
        """
        width, height = size or (stored.width, stored.height)
        window = Window(stored.x0, stored.y0, stored.width, stored.height)
        try:
            if len({self._dataset.dtypes[band - 1] for band in self._bands}) == 1:
                bands = self._dataset.read(
                    self._bands, out_shape=(len(self._bands), height, width), window=window
                )
            else:
                bands = np.stack(
                    [
                        self._dataset.read(band, out_shape=(height, width), window=window)
                        for band in self._bands
                    ]
                )
            valid = self._dataset.dataset_mask(out_shape=(height, width), window=window) > 0
        except FAILED as error:
            reason = gdal_message(error, self._file, self._place)
            raise PictureError(
                f"pixels from {stored.x0}, {stored.y0} on cannot be read: {reason}",
                place=self._place,
            ) from error
        if self._absent:
            valid &= ~np.all(
                [band == value for band, value in zip(bands, self._absent, strict=True)], axis=0
            )
        if np.issubdtype(bands.dtype, np.floating):
            valid &= np.isfinite(bands).all(axis=0)
        return bands, valid

    def _rgb(self, bands: npt.NDArray[Any]) -> RgbArray:
        """Return the bands (C×H×W) as RGB, uint8, H×W×3."""
        if self._palette is not None:
            return self._palette[bands[0], :3]
        if self._stretch is not None:
            bands = np.stack(
                [
                    _stretched(band, *limits)
                    for band, limits in zip(bands, self._stretch, strict=True)
                ]
            )
        if self._inverted:
            bands = 255 - bands
        return np.moveaxis(bands if len(bands) == 3 else np.repeat(bands, 3, axis=0), 0, 2)

    def _stretch_limits(self) -> list[tuple[float, float]] | None:
        """Return the values of each band that become black and white; None means 0 and 255.

        They are the same for all tiles, so that the contrast does not change at seams.
        """
        bits = [
            self._dataset.tags(band, ns="IMAGE_STRUCTURE").get("NBITS", "8") for band in self._bands
        ]
        if all(self._dataset.dtypes[band - 1] == "uint8" for band in self._bands):
            return None if set(bits) == {"8"} else [(0.0, 2.0 ** int(n) - 1) for n in bits]
        whole = Area(0, 0, self._dataset.width, self._dataset.height)
        scale = min(1.0, _SAMPLE / max(whole))
        bands, valid = self._values(
            whole, Size(max(1, int(whole.x1 * scale)), max(1, int(whole.y1 * scale)))
        )
        values = bands[:, valid]
        if values.shape[1] < _MIN_SAMPLE_PX and scale < 1:
            values = np.concatenate([values, *self._sampled_windows(whole)], axis=1)
        self._outlier = hints.outlier(values[0])
        return [_limits(band) for band in values.astype(np.float64)]

    def _sampled_windows(self, whole: Area) -> Iterator[npt.NDArray[Any]]:
        """Yield a sample of the valid values (C×n) of each window of the picture.

        It is for pictures whose few valid pixels the reduced picture misses.
        """
        for y in range(0, whole.y1, _SAMPLE):
            for x in range(0, whole.x1, _SAMPLE):
                bands, valid = self._values(
                    Area(x, y, min(x + _SAMPLE, whole.x1), min(y + _SAMPLE, whole.y1))
                )
                values = bands[:, valid]
                step = -(-values.shape[1] // _MAX_WINDOW_SAMPLE_PX) or 1
                yield values[:, ::step]


def _stretched(band: npt.NDArray[Any], low: float, high: float) -> npt.NDArray[np.uint8]:
    """Return a band scaled linearly from `low` … `high` to 0 … 255 and clipped."""
    with np.errstate(all="ignore"):  # values that are not finite belong to invalid pixels
        fractions = (band.astype(np.float64) - low) / (high - low)
    return np.asarray(np.nan_to_num(fractions).clip(0, 1) * 255).astype(np.uint8)


def _limits(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return the values that become black and white.

    They are percentiles; where these are equal, because nearly all pixels have one value, they are
    the minimum and maximum.
    """
    if not len(values):
        return 0.0, 1.0
    low, high = np.percentile(values, [_TAIL, 100 - _TAIL])
    if low == high:
        low, high = values.min(), values.max()
    return float(low), float(high if high > low else np.nextafter(low, np.inf))


def _interpretations(dataset: Any) -> Sequence[ColorInterp]:
    """Return the colour interpretation of each band.

    The first call makes GDAL read a JPEG's EXIF, which may fail; a broken EXIF is ignored by the
    second call.
    """
    with suppress(CPLE_BaseError):
        return list(dataset.colorinterp)
    return list(dataset.colorinterp)


def _colour_bands(interpretations: Sequence[ColorInterp]) -> list[int]:
    """Return the bands that are shown, counted from 1.

    They are those marked red, green and blue; else the first three that are not alpha; else the
    first of these.
    """
    if all(colour in interpretations for colour in _RGB):
        return [interpretations.index(colour) + 1 for colour in _RGB]
    bands = [
        band
        for band, interpretation in enumerate(interpretations, 1)
        if interpretation != ColorInterp.alpha
    ] or [1]
    return bands[:3] if len(bands) >= 3 else bands[:1]


def _palette(dataset: Any) -> npt.NDArray[np.uint8] | None:
    """Return the RGBA colour of each value; None where the values are not indices of colours."""
    if _interpretations(dataset)[0] != ColorInterp.palette or dataset.dtypes[0] not in (
        "uint8",
        "uint16",
    ):
        return None
    table = np.zeros((int(np.iinfo(dataset.dtypes[0]).max) + 1, 4), np.uint8)
    table[:, 3] = 255
    for value, colour in dataset.colormap(1).items():
        table[value] = colour
    return table


@contextmanager
def opened(picture: SafePath) -> Iterator[Raster]:
    """Open a picture.

    Raises PictureError where the file is not a picture or cannot be read in windows,
    IncompleteFileError where it is empty or truncated, and OSError.
    """
    place = str(picture)
    with rasterio.Env(**_ENVIRONMENT), _file(picture) as file:
        if not _version(file)[0]:
            raise IncompleteFileError("the file is empty", place=place, remedy=COPY_AGAIN)
        driver = _driver(file, place)
        orientation = _orientation(file, place)
        beside = sidecars.read(picture)
        try:
            dataset = rasterio.open(_name_of(file), driver=driver)
            _check(dataset, place)
            raster = Raster(dataset, file, place, orientation, beside)
        except FAILED as error:
            raise PictureError(
                f"the picture cannot be opened: {gdal_message(error, file, place)}", place=place
            ) from error
        with dataset:
            yield raster


def _name_of(file: BinaryIO) -> str:
    """Return a path by which GDAL opens an open file.

    It leads to this file even if its own path leads to another one by now, and no files are beside
    it.
    """
    return f"/dev/fd/{file.fileno()}"


def _driver(file: BinaryIO, place: str) -> str:
    """Return GDAL's driver for a file, by its first bytes. Raises PictureError for other kinds."""
    header = file.read(_HEADER_BYTES)
    file.seek(0)
    driver = next((driver for start, driver in _DRIVERS.items() if header.startswith(start)), None)
    if driver == "WEBP" and header[8:12] != b"WEBP":
        driver = None
    if driver is None:
        formats = (
            name
            for start, name in _FOREIGN.items()
            if header.startswith(start) or (start in _XML and start in header)
        )
        other = "an AVIF or HEIC" if is_heif(header) else "none of them"
        reason = (
            f"the picture cannot be opened: supported formats are {KINDS}, "
            f"and it is {next(formats, other)}"
        )
        raise PictureError(reason, place=place, remedy=_TILED)
    return driver


def _file(path: SafePath) -> BinaryIO:
    """Open the file here, so that GDAL does not take its name for a URL or a virtual file."""
    try:
        return path.open()
    except OSError as error:
        if error.errno not in NO_FILE | NOT_THERE:
            raise
        raise PictureError(
            f"the picture cannot be opened: {error.strerror}", place=str(path)
        ) from error


def _check(dataset: Any, place: str) -> None:
    """Raise PictureError for a picture that is not readable in windows or names another file."""
    if any(key.upper() == "OVERVIEW_FILE" for key in dataset.tags(ns="OVERVIEWS")):
        raise PictureError(
            "the picture's metadata name another file for its overviews, which is not read",
            place=place,
            remedy=f"remove that entry (`gdalinfo -mdd OVERVIEWS` shows it), or {_TILED}",
        )
    if any(dtype.startswith("complex") for dtype in dataset.dtypes):
        raise PictureError("pictures of complex values are not supported", place=place)
    height, width = dataset.block_shapes[0]
    bands = dataset.count if dataset.interleaving == Interleaving.pixel else 1
    size = np.dtype(dataset.dtypes[0]).itemsize * height * width * bands / 2**20
    if size > BLOCK_MIB:
        raise PictureError(
            f"the picture is stored in pieces of {width} × {height} pixels, "
            f"{size:,.0f} MiB each, that can only be read as a whole",
            place=place,
            remedy=f"on a machine with enough memory, {_TILED}",
        )


def _orientation(file: BinaryIO, place: str) -> int:
    """Return the EXIF orientation, 1 to 8, from the tags of a TIFF or the EXIF of other pictures.

    Raises IncompleteFileError where a TIFF is truncated.
    """
    header = file.read(16)
    try:
        if header[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return _tiff_orientation(file, header, place)
        reader = next(
            (reader for start, reader in _READERS.items() if header.startswith(start)), None
        )
        if reader is None:
            return 1
        file.seek(0)
        # Not the method of PngImageFile, which would decode the whole picture.
        orientation = Image.Image.getexif(reader(file)).get(_ORIENTATION, 1)
    except (
        ArithmeticError,
        EOFError,
        LookupError,
        OSError,
        SyntaxError,
        TypeError,
        ValueError,
        struct.error,
    ):
        return 1  # a broken orientation is ignored; GDAL reports other damage
    return orientation if orientation in _TURNS else 1


def _tiff_orientation(file: BinaryIO, header: bytes, place: str) -> int:
    is_bigtiff = header[2:4] in (b"+\0", b"\0+")
    directory = TiffImagePlugin.ImageFileDirectory_v2(header if is_bigtiff else header[:8])
    file.seek(directory.next)
    directory.load(file)
    for offsets, lengths in _OFFSETS_AND_LENGTHS:
        pieces = zip(directory.get(offsets, ()), directory.get(lengths, ()), strict=False)
        needed = max((start + length for start, length in pieces), default=0)
        actual = _version(file)[0]
        if needed > actual:
            raise IncompleteFileError(
                f"the TIFF is truncated: it has {actual:,} bytes of {needed:,}",
                place=place,
                remedy=COPY_AGAIN,
            )
    orientation = directory.get(_ORIENTATION, 1)
    return orientation if orientation in _TURNS else 1


def _version(file: BinaryIO) -> tuple[int, int]:
    """Return length and modification time of an open file, even if its path leads to another."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _crs_of(definition: int | str | None, place: str) -> Any:
    """Return the CRS of an EPSG number or a WKT. Raises PictureError."""
    if definition is None:
        return None
    try:
        if isinstance(definition, int):
            return CRS.from_epsg(definition)
        return CRS.from_wkt(definition)
    except CRSError as error:
        reason = f"the CRS in the .aux.xml beside the picture is invalid: {gdal_message(error)}"
        raise PictureError(reason, place=place, remedy="correct or remove the .aux.xml") from error


def gdal_message(error: Exception, file: BinaryIO | None = None, place: str = "") -> str:
    """Return GDAL's message in one line, with `place` instead of GDAL's path of an open file."""
    message = " ".join(str(error.__cause__ or error).split())
    if file is None:
        return message
    return re.sub(rf"{_name_of(file)}(?!\d)", lambda _: place, message)
