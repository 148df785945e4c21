"""Read the georeference files beside a picture: world files, and GDAL's `.aux.xml`.

GDAL itself is not allowed to look for them: it would follow planted links, and an `.aux.xml` may
name further files. They are found by name beside the picture, opened as the picture is, and of an
`.aux.xml` only its own content is used: CRS, transform, ground control points and nodata.

Limitations: a world file that is read while it is written, and ends within a number, is taken as
complete.
"""

from __future__ import annotations

import errno
import math
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sam_poll.core import xml_reader
from sam_poll.core.errors import InputError, PictureError
from sam_poll.core.files import NO_FILE
from sam_poll.core.safe_path import SafePath

AUX_STEM = ".aux"
AUX_ENDING = f"{AUX_STEM}.xml"
_WORLD = {  # by the picture's ending, the usual one first
    ".tif": ("tfw", "tifw"),
    ".tiff": ("tfw", "tiffw"),
    ".jpg": ("jgw", "jpgw"),
    ".jpeg": ("jgw", "jpegw"),
    ".jpe": ("jgw", "jpew"),
    ".png": ("pgw", "pngw"),
    ".bmp": ("bpw", "bmpw"),
    ".webp": ("wpw", "webpw"),
    ".jp2": ("j2w", "jp2w"),
}
_ANY = "wld"
_WORLD_ENDINGS = frozenset(
    f".{ending}" for endings in (*_WORLD.values(), (_ANY,)) for ending in endings
)
_MOST = 4096  # bytes of a world file
_MOST_AUX = 16 << 20
_WKT = re.compile(r"\s*[A-Z][A-Z0-9_]*\s*\[")
_EPSG = re.compile(r"\s*EPSG:(\d{1,9})\s*", re.IGNORECASE)
_ABSENT = {errno.ENOENT, errno.ENAMETOOLONG}
_REMEDY = "write it again, or remove it"

Six = tuple[float, float, float, float, float, float]


@dataclass(frozen=True, slots=True)
class Point:
    """A ground control point: a position in the picture, in pixels, and its map coordinates."""

    column: float
    row: float
    x: float
    y: float
    z: float = 0.0


@dataclass(slots=True)
class Sidecars:
    """The content of the files beside a picture.

    `transform` (of an `.aux.xml`) and `world` are a, b, c, d, e, f of x = a · column + b · row + c,
    y = d · column + e · row + f, from the upper left corner of the upper left pixel. A CRS is an
    EPSG number, or WKT. `nodata` is by band, from 1. `seen` is the name, length and modification
    time of each file that was read.
    """

    transform: Six | None = None
    world: Six | None = None
    crs: int | str | None = None
    points: list[Point] = field(default_factory=list)
    points_crs: int | str | None = None
    nodata: dict[int, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seen: list[tuple[str, int, int]] = field(default_factory=list)


def is_sidecar(name: str) -> bool:
    """Return whether a file of this name belongs to a picture."""
    return is_aux(name) or os.path.splitext(name)[1].lower() in _WORLD_ENDINGS


def is_aux(name: str) -> bool:
    """Return whether a file of this name is a GDAL `.aux.xml`."""
    return name[-len(AUX_ENDING) :].lower() == AUX_ENDING


def names_of(picture: str) -> list[str]:
    """Return the possible names of a picture's sidecars, in the order of preference."""
    return [*_world_names(picture), picture + AUX_ENDING]


def read(picture: SafePath) -> Sidecars:
    """Read the sidecars of a picture.

    Raises PictureError for an invalid file, and OSError.
    """
    sidecars = Sidecars()
    for name in _world_names(picture.name):
        path = picture.with_name(name)
        body = _body(path, _MOST, sidecars)
        if body is not None:
            sidecars.world = _six_of_world(body, path)
            break
    aux = picture.with_name(picture.name + AUX_ENDING)
    body = _body(aux, _MOST_AUX, sidecars)
    if body is not None:
        _take_aux(body, aux, sidecars)
    if _exists(picture.with_name(picture.name + ".msk")):
        sidecars.notes.append(
            f"the mask {picture.name}.msk beside it is not read: put it into the picture, "
            "gdal_translate -co TILED=YES --config GDAL_TIFF_INTERNAL_MASK YES IN OUT.tif"
        )
    return sidecars


def _world_names(picture: str) -> Iterator[str]:
    stem, ending = os.path.splitext(picture)
    for world in (*_WORLD.get(ending.lower(), ()), _ANY):
        yield f"{stem}.{world}"
        yield f"{stem}.{world.upper()}"


def _body(path: SafePath, most: int, sidecars: Sidecars) -> bytes | None:
    """Return a file's content, and record that it was read; None where the file is missing."""
    try:
        with path.open() as file:
            about = os.fstat(file.fileno())
            body = file.read(most + 1)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        if error.errno not in NO_FILE:
            raise
        raise PictureError(
            f"the file beside the picture cannot be read: {error.strerror}",
            place=str(path),
            remedy="put a file that may be read there (links are not followed), or remove it",
        ) from error
    if len(body) > most:
        raise PictureError(f"has more than {most:,} bytes", place=str(path), remedy=_REMEDY)
    sidecars.seen.append((path.name, about.st_size, about.st_mtime_ns))
    return body


def _exists(path: SafePath) -> bool:
    try:
        path.lstat()
    except OSError:
        return False
    return True


def _six_of_world(body: bytes, path: SafePath) -> Six:
    """Return a world file's transform.

    It refers to the centre of the first pixel, and has columns before rows.
    """
    words = body.decode("ascii", "replace").replace("\ufffd", "?").split()
    try:
        a, d, b, e, x, y = (float(word.replace(",", ".")) for word in words)
    except ValueError:
        raise PictureError(
            "is not a world file: it must contain six numbers, a line each, "
            f"and contains {len(words)} words",
            place=str(path),
            remedy=_REMEDY,
        ) from None
    six = (a, b, x - (a + b) / 2, d, e, y - (d + e) / 2)
    if not _usable(six):
        raise PictureError(
            "is not a world file: its numbers span no area", place=str(path), remedy=_REMEDY
        )
    return six


def _usable(six: Six) -> bool:
    return all(map(math.isfinite, six)) and six[0] * six[4] - six[1] * six[3] != 0


def _take_aux(body: bytes, path: SafePath, sidecars: Sidecars) -> None:
    """Store the content of an `.aux.xml` in `found`."""
    try:
        root = xml_reader.parse(body)
    except (InputError, RecursionError) as error:
        reason = error.reason if isinstance(error, InputError) else "is nested too deeply"
        raise PictureError(reason, place=str(path), remedy=_REMEDY) from None
    try:
        sidecars.crs = _crs(root.findtext("SRS"), sidecars, path)
        sidecars.transform = _six_of_aux(root.findtext("GeoTransform"))
        points = root.find("GCPList")
        if points is not None:
            sidecars.points = [_point(each) for each in points.findall("GCP")]
            sidecars.points_crs = _crs(
                points.get("Projection") or points.findtext("SRS"), sidecars, path
            )
        for band in root.findall("PAMRasterBand"):
            nodata = band.findtext("NoDataValue")
            if nodata is not None:
                sidecars.nodata[int(band.get("band", "1"))] = float(nodata)
    except (ValueError, TypeError) as error:
        raise PictureError(
            f"cannot be understood: {error}", place=str(path), remedy=_REMEDY
        ) from None


def _six_of_aux(text: str | None) -> Six | None:
    """Return GDAL's transform, whose numbers have another order."""
    if text is None or not text.strip():
        return None
    c, a, b, f, d, e = (float(word) for word in text.split(","))
    six = (a, b, c, d, e, f)
    if not _usable(six):
        raise ValueError("its GeoTransform spans no area")
    return six


def _point(element: ET.Element) -> Point:
    def number(name: str) -> float:
        return float(element.get(name, "0"))

    return Point(number("Pixel"), number("Line"), number("X"), number("Y"), number("Z"))


def _crs(text: str | None, sidecars: Sidecars, path: SafePath) -> Any:
    """Return a CRS as WKT or EPSG number.

    Any other text could name a file or an address, and is not used.
    """
    if not text or not text.strip():
        return None
    number = _EPSG.fullmatch(text)
    if number:
        return int(number[1])
    if _WKT.match(text):
        return text
    sidecars.notes.append(
        f"the CRS in {path.name} is neither WKT nor an EPSG number, and is not used"
    )
    return None
