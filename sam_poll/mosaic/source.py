"""A large picture, read window by window: upright RGB, where it holds anything, and how it lies on the map.

A picture without a place on a map is turned as its EXIF or TIFF note says, window by window. One that has a place is
read as it is stored: GDAL ignores the note, and the place is that of the stored pixels.

GDAL opens this one file and no other, by a few of its drivers. Whoever drops a picture could otherwise have the
daemon read, and answer with, files that only the daemon may read: by a VRT, or by the metadata of a TIFF. So the kind
is told by the file's first bytes, an overview in another file is refused, and what lies beside the picture is read by
`sidecars`. Nothing is fetched over the network.

What can still go wrong here: JPEG and PNG are decoded line by line from the top; where a row of tiles does not fit into
GDAL's cache, each tile decodes all that is above it again, as one on its side does (a tiled GeoTIFF has no such
trouble). A note behind a PNG's pixels is not seen.
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

from sam_poll import sidecars
from sam_poll.errors import ChangedError, PictureError, UnfinishedError
from sam_poll.fs import NO_FILE, NOT_THERE
from sam_poll.headers import COPY_AGAIN
from sam_poll.mosaic import hints
from sam_poll.mosaic.tiles import Area
from sam_poll.safe_path import SafePath
from sam_poll.types import Bitmap, Pixels, Size

CACHE_MIB = 128  # of GDAL's, whose default is a twentieth of the machine's memory: a row of tiles of 40,000 pixels
BLOCK_MIB = 1024  # of pixels that a file lets nobody read but all at once
_SAMPLE = 1024  # pixels a side of the reduced picture that other than 8-bit values are stretched by
_ENOUGH = 1000  # of its pixels that must hold something, or the whole picture is looked through
_FROM_EACH = 4096  # pixels of a window, when it is
_TAIL = 2  # per cent of values cut off at both ends when they are stretched
FAILED = (RasterioError, CPLE_BaseError)  # what rasterio raises, and what of GDAL's it lets through
_NO_NETWORK = "none://the-network-is-not-used"  # a proxy that curl refuses before it sends anything
_ENVIRONMENT = {
    "GDAL_CACHEMAX": CACHE_MIB * 2**20,
    "GDAL_HTTP_PROXY": _NO_NETWORK,
    "GDAL_HTTPS_PROXY": _NO_NETWORK,
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # nothing lies beside the picture
}
KINDS = "GeoTIFF, PNG, JPEG, JPEG 2000, BMP and WebP"
_DRIVERS = {  # GDAL's, by how a file begins; all of them read the one file that they are given
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
_FOREIGN = {  # what else is often met
    _VRT: "a VRT, which names other files",
    _SERVER: "the description of a map server",
    b"GIF8": "a GIF",
    b"CDF": "netCDF",
    b"\x89HDF": "HDF or netCDF",
    b"EHFA_HEADER_TAG": "an ERDAS image",
    b"%PDF": "a PDF",
}
_XML = (_VRT, _SERVER)  # what may come behind a comment or the like
_BEGINNING = 2048
_TILED = "make a tiled GeoTIFF of it: gdal_translate -co TILED=YES -co COMPRESS=DEFLATE IN OUT.tif"
_NOTE = 274  # EXIF's and TIFF's orientation
_PLACES = ((273, 279), (324, 325))  # of a TIFF's strips or tiles: where each begins, and its length
_Reader = Callable[[BinaryIO], Image.Image]
_READERS: dict[bytes, _Reader] = {  # by how a file begins; not `Image.open`, which refuses large pictures
    b"\xff\xd8": JpegImagePlugin.JpegImageFile,
    b"\x89PNG": PngImagePlugin.PngImageFile,
    b"RIFF": WebPImagePlugin.WebPImageFile,
}
_RGB = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)


class _Turn(NamedTuple):
    """From stored to upright: rows and columns exchanged, then the columns turned round, then the rows."""

    crosswise: bool = False
    columns: bool = False
    rows: bool = False

    def size(self, stored: Size) -> Size:
        return Size(stored.height, stored.width) if self.crosswise else stored

    def stored(self, area: Area, upright: Size) -> Area:
        """Where an area of the upright picture is stored."""
        x0, y0, x1, y1 = area
        if self.columns:
            x0, x1 = upright.width - x1, upright.width - x0
        if self.rows:
            y0, y1 = upright.height - y1, upright.height - y0
        return Area(y0, x0, y1, x1) if self.crosswise else Area(x0, y0, x1, y1)

    def __call__(self, pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """H×W×… as stored → upright."""
        pixels = np.swapaxes(pixels, 0, 1) if self.crosswise else pixels
        return np.ascontiguousarray(pixels[:: -1 if self.rows else 1, :: -1 if self.columns else 1])


_TURNS = {  # by EXIF orientation
    1: _Turn(),
    2: _Turn(columns=True),
    3: _Turn(columns=True, rows=True),
    4: _Turn(rows=True),
    5: _Turn(crosswise=True),
    6: _Turn(crosswise=True, columns=True),
    7: _Turn(crosswise=True, columns=True, rows=True),
    8: _Turn(crosswise=True, rows=True),
}


class Windows(Protocol):
    """A picture that is read window by window, and how it lies on the map; `Source` says what each is."""

    @property
    def size(self) -> Size: ...
    @property
    def crs(self) -> Any: ...
    @property
    def transform(self) -> Any: ...
    @property
    def nodata(self) -> float | None: ...
    @property
    def gcps(self) -> Any: ...
    @property
    def rpcs(self) -> Any: ...
    @property
    def beside(self) -> list[tuple[str, int, int]]: ...
    def notes(self) -> list[str]: ...
    def read(self, area: Area) -> tuple[Pixels, Bitmap]: ...


class Source:
    """An open picture. `crs` is None and `transform` the identity where it lies on no map; `gcps` (points and their
    CRS) and `rpcs` are how it lies where it has no transform. `beside`: the files beside it that say so."""

    def __init__(
        self, dataset: Any, file: BinaryIO, place: str, orientation: int, found: sidecars.Sidecars | None = None
    ) -> None:
        found = found or sidecars.Sidecars()
        self._dataset, self._file, self._place, self._seen = dataset, file, place, _version(file)
        self._said, self.beside = found.notes, found.seen
        self._notes: list[str] | None = None
        self._lie(found)
        placed = self.crs or not self.transform.is_identity or self.gcps[0] or self.rpcs
        self._turn = _TURNS[1 if placed else orientation]
        self.size = self._turn.size(Size(dataset.width, dataset.height))
        self._bands = _colours(_kinds(dataset))
        self._palette = _palette(dataset)
        absent = [found.nodata.get(band) for band in self._bands]
        self._absent = None if dataset.nodata is not None or None in absent else absent
        self.nodata = absent[0] if self._absent else dataset.nodata
        self._outlier: float | None = None
        self._inverted = self._palette is None and dataset.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES"
        self._stretch = None if self._palette is not None else self._ends()

    def _lie(self, found: sidecars.Sidecars) -> None:
        """Choose how the picture lies on the map, in GDAL's order: an `.aux.xml`, the picture itself, a world file."""
        dataset = self._dataset
        self.crs, self.transform = _crs_of(found.crs, self._place) or dataset.crs, dataset.transform
        self.gcps, self.rpcs = dataset.gcps, dataset.rpcs
        if found.points:
            points = [GroundControlPoint(each.row, each.column, each.x, each.y, each.z) for each in found.points]
            self.gcps = points, _crs_of(found.points_crs, self._place)
        if found.transform:
            self.transform = Affine(*found.transform)
        elif found.world and self.transform.is_identity and not self.gcps[0]:
            self.transform = Affine(*found.world)

    def notes(self) -> list[str]:
        """Return what the picture's owner should know of it, in sentences. Looks at its corners. Raises as `read`."""
        if self._notes is None:
            self._notes = [*self._said]
            if self.transform.is_identity and (self.gcps[0] or self.rpcs):
                self._notes.append(hints.without_transform(len(self.gcps[0])))
            if not self._declares_nodata():
                value = hints.margin(self._values, Size(self._dataset.width, self._dataset.height))
                value = value or (None if self._outlier is None else [self._outlier])
                self._notes += [hints.undeclared(value)] if value else []
        return self._notes

    def _declares_nodata(self) -> bool:
        flags = self._dataset.mask_flag_enums
        return self._absent is not None or any(MaskFlags.all_valid not in flags[band - 1] for band in self._bands)

    def read(self, area: Area) -> tuple[Pixels, Bitmap]:
        """RGB (uint8, H×W×3), and which pixels hold anything (bool H×W: not nodata, not transparent). PictureError;
        ChangedError where the file was written to since it was opened."""
        bands, valid = self._values(self._turn.stored(area, self.size))
        if _version(self._file) != self._seen:
            raise ChangedError("it was changed while it was read", place=self._place, remedy="begin anew")
        if self._palette is not None:
            valid &= self._palette[bands[0], 3] > 0
        return self._turn(self._shown(bands)), self._turn(valid)

    def _values(self, stored: Area, size: Size | None = None) -> tuple[npt.NDArray[Any], Bitmap]:
        """The bands that are shown (C×H×W, reduced to `size`), and where they hold anything. PictureError."""
        width, height = size or (stored.width, stored.height)
        how = {"window": Window(stored.x0, stored.y0, stored.width, stored.height)}
        try:
            if len({self._dataset.dtypes[band - 1] for band in self._bands}) == 1:
                bands = self._dataset.read(self._bands, out_shape=(len(self._bands), height, width), **how)
            else:
                bands = np.stack([self._dataset.read(n, out_shape=(height, width), **how) for n in self._bands])
            valid = self._dataset.dataset_mask(out_shape=(height, width), **how) > 0
        except FAILED as error:
            where = f"pixels from {stored.x0}, {stored.y0} on cannot be read"
            raise PictureError(f"{where}: {words(error, self._file, self._place)}", place=self._place) from error
        if self._absent:
            valid &= ~np.all([band == value for band, value in zip(bands, self._absent, strict=True)], axis=0)
        if np.issubdtype(bands.dtype, np.floating):
            valid &= np.isfinite(bands).all(axis=0)
        return bands, valid

    def _shown(self, bands: npt.NDArray[Any]) -> Pixels:
        if self._palette is not None:
            return self._palette[bands[0], :3]
        if self._stretch is not None:
            bands = np.stack([_stretched(band, *ends) for band, ends in zip(bands, self._stretch, strict=True)])
        if self._inverted:
            bands = 255 - bands
        return np.moveaxis(bands if len(bands) == 3 else np.repeat(bands, 3, axis=0), 0, 2)

    def _ends(self) -> list[tuple[float, float]] | None:
        """The values that become black and white: the same for all tiles, or seams would show. None: 0 and 255."""
        bits = [self._dataset.tags(band, ns="IMAGE_STRUCTURE").get("NBITS", "8") for band in self._bands]
        if all(self._dataset.dtypes[band - 1] == "uint8" for band in self._bands):
            return None if set(bits) == {"8"} else [(0.0, 2.0 ** int(n) - 1) for n in bits]
        whole = Area(0, 0, self._dataset.width, self._dataset.height)
        scale = min(1.0, _SAMPLE / max(whole))
        bands, valid = self._values(whole, Size(max(1, int(whole.x1 * scale)), max(1, int(whole.y1 * scale))))
        values = bands[:, valid]
        if values.shape[1] < _ENOUGH and scale < 1:
            values = np.concatenate([values, *self._looked_through(whole)], axis=1)
        self._outlier = hints.outlier(values[0])
        return [_tails(band) for band in values.astype(np.float64)]

    def _looked_through(self, whole: Area) -> Iterator[npt.NDArray[Any]]:
        """Values of everything that holds any: the reduced picture has missed it."""
        for y in range(0, whole.y1, _SAMPLE):
            for x in range(0, whole.x1, _SAMPLE):
                bands, valid = self._values(Area(x, y, min(x + _SAMPLE, whole.x1), min(y + _SAMPLE, whole.y1)))
                values = bands[:, valid]
                yield values[:, :: -(-values.shape[1] // _FROM_EACH) or 1]


def _stretched(band: npt.NDArray[Any], low: float, high: float) -> npt.NDArray[np.uint8]:
    with np.errstate(all="ignore"):  # what is not finite counts as no data
        parts = (band.astype(np.float64) - low) / (high - low)
    return np.asarray(np.nan_to_num(parts).clip(0, 1) * 255).astype(np.uint8)


def _tails(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """What becomes black and what white. Where nearly all is of one value, the rest is what there is to see."""
    if not len(values):
        return 0.0, 1.0
    low, high = np.percentile(values, [_TAIL, 100 - _TAIL])
    if low == high:
        low, high = values.min(), values.max()
    return float(low), float(high if high > low else np.nextafter(low, np.inf))


def _kinds(dataset: Any) -> Sequence[ColorInterp]:
    """What the bands are. GDAL looks into a JPEG's EXIF when it is first asked, and that one is broken is no matter."""
    with suppress(CPLE_BaseError):
        return list(dataset.colorinterp)
    return list(dataset.colorinterp)


def _colours(kinds: Sequence[ColorInterp]) -> list[int]:
    """The bands that are shown: those that are called red, green and blue; else the first three that are no alpha, or
    the first."""
    if all(colour in kinds for colour in _RGB):
        return [kinds.index(colour) + 1 for colour in _RGB]
    colours = [n for n, kind in enumerate(kinds, 1) if kind != ColorInterp.alpha] or [1]
    return colours[:3] if len(colours) >= 3 else colours[:1]


def _palette(dataset: Any) -> npt.NDArray[np.uint8] | None:
    """RGBA of each value, where the values are no brightness."""
    if _kinds(dataset)[0] != ColorInterp.palette or dataset.dtypes[0] not in ("uint8", "uint16"):
        return None
    table = np.zeros((int(np.iinfo(dataset.dtypes[0]).max) + 1, 4), np.uint8)
    table[:, 3] = 255
    for value, colour in dataset.colormap(1).items():
        table[value] = colour
    return table


@contextmanager
def opened(picture: SafePath) -> Iterator[Source]:
    """The picture, open. PictureError where it is none, or cannot be read in windows; UnfinishedError where it is not
    all there. OSError."""
    place = str(picture)
    with rasterio.Env(**_ENVIRONMENT), _file(picture) as file:
        if not _version(file)[0]:
            raise UnfinishedError("the file is empty", place=place, remedy=COPY_AGAIN)
        driver = _driver(file, place)
        orientation = _orientation(file, place)
        found = sidecars.read(picture)
        try:
            dataset = rasterio.open(_name_of(file), driver=driver)
            _check(dataset, place)
            source = Source(dataset, file, place, orientation, found)
        except FAILED as error:
            raise PictureError(f"it cannot be opened: {words(error, file, place)}", place=place) from error
        with dataset:
            yield source


def _name_of(file: BinaryIO) -> str:
    """Return a name of an open file for GDAL: of this very file, whatever its path is by now, and nothing beside."""
    return f"/dev/fd/{file.fileno()}"


def _driver(file: BinaryIO, place: str) -> str:
    """Return the driver that reads this kind of file, by its first bytes. Raises PictureError where none may."""
    begin = file.read(_BEGINNING)
    file.seek(0)
    driver = next((driver for start, driver in _DRIVERS.items() if begin.startswith(start)), None)
    if driver == "WEBP" and begin[8:12] != b"WEBP":
        driver = None
    if driver is None:
        kinds = (
            kind for start, kind in _FOREIGN.items() if begin.startswith(start) or (start in _XML and start in begin)
        )
        reason = f"it cannot be opened: {KINDS} are read, and it is {next(kinds, 'none of them')}"
        raise PictureError(reason, place=place, remedy=_TILED)
    return driver


def _file(path: SafePath) -> BinaryIO:
    """The file itself, so that a name is one, and neither an address nor a pipe."""
    try:
        return path.open()
    except OSError as error:
        if error.errno not in NO_FILE | NOT_THERE:
            raise
        raise PictureError(f"it cannot be opened: {error.strerror}", place=str(path)) from error


def _check(dataset: Any, place: str) -> None:
    """Raise PictureError for what cannot be read in windows, or would have GDAL read another file."""
    if any(key.upper() == "OVERVIEW_FILE" for key in dataset.tags(ns="OVERVIEWS")):
        raise PictureError(
            "its metadata name another file for its overviews, and only the picture itself is read",
            place=place,
            remedy=f"take that out (`gdalinfo -mdd OVERVIEWS` shows it), or {_TILED}",
        )
    if any(kind.startswith("complex") for kind in dataset.dtypes):
        raise PictureError("complex values cannot be shown", place=place)
    height, width = dataset.block_shapes[0]
    bands = dataset.count if dataset.interleaving == Interleaving.pixel else 1
    size = np.dtype(dataset.dtypes[0]).itemsize * height * width * bands / 2**20
    if size > BLOCK_MIB:
        raise PictureError(
            f"it is stored in pieces of {width} × {height} pixels, {size:,.0f} MiB each, that can only be read whole",
            place=place,
            remedy=f"where there is memory for it, {_TILED}",
        )


def _orientation(file: BinaryIO, place: str) -> int:
    """EXIF's 1 to 8, from a TIFF's or the picture's own note. UnfinishedError where a TIFF is cut off."""
    begin = file.read(16)
    try:
        if begin[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return _of_tiff(file, begin, place)
        reader = next((reader for start, reader in _READERS.items() if begin.startswith(start)), None)
        if reader is None:
            return 1
        file.seek(0)
        noted = Image.Image.getexif(reader(file)).get(_NOTE, 1)  # a PNG's own would decode all of it
    except (ArithmeticError, EOFError, LookupError, OSError, SyntaxError, TypeError, ValueError, struct.error):
        return 1  # a broken note is none; what else is broken GDAL will say
    return noted if noted in _TURNS else 1


def _of_tiff(file: BinaryIO, begin: bytes, place: str) -> int:
    big = begin[2:4] in (b"+\0", b"\0+")
    directory = TiffImagePlugin.ImageFileDirectory_v2(begin if big else begin[:8])
    file.seek(directory.next)
    directory.load(file)
    for starts, lengths in _PLACES:
        pieces = zip(directory.get(starts, ()), directory.get(lengths, ()), strict=False)
        needed = max((start + length for start, length in pieces), default=0)
        if needed > (there := _version(file)[0]):
            raise UnfinishedError(
                f"the TIFF is cut off: it has {there:,} bytes of {needed:,}", place=place, remedy=COPY_AGAIN
            )
    noted = directory.get(_NOTE, 1)
    return noted if noted in _TURNS else 1


def _version(file: BinaryIO) -> tuple[int, int]:
    """Length and time of change of an open file, which another one under its name does not change."""
    about = os.fstat(file.fileno())
    return about.st_size, about.st_mtime_ns


def _crs_of(said: int | str | None, place: str) -> Any:
    """Return the CRS of an EPSG number or a WKT. Raises PictureError."""
    if said is None:
        return None
    try:
        return CRS.from_epsg(said) if isinstance(said, int) else CRS.from_wkt(said)
    except CRSError as error:
        reason = f"the CRS in the .aux.xml beside it cannot be understood: {words(error)}"
        raise PictureError(reason, place=place, remedy="write it anew, or remove it") from error


def words(error: Exception, file: BinaryIO | None = None, place: str = "") -> str:
    """What GDAL says, in one line; with `place` for the name by which it knows an open file."""
    said = " ".join(str(error.__cause__ or error).split())
    return re.sub(rf"{_name_of(file)}(?!\d)", lambda _: place, said) if file else said
