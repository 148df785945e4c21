"""Files beside a picture that say where it lies on a map: world files, and GDAL's `.aux.xml`.

GDAL is not let to look for them: it would follow a planted link, and an `.aux.xml` may name further files. They are
found by name beside the picture, opened as the picture is, and of an `.aux.xml` no more is taken than stands in it:
CRS, transform, ground control points and nodata.

What can still go wrong here: a world file that is still being written when it is read, and ends within a number, is
taken for a whole one.
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

from sam_poll import xml_safely
from sam_poll.errors import InputError, PictureError
from sam_poll.fs import NO_FILE
from sam_poll.safe_path import SafePath

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
_WORLD_ENDINGS = frozenset(f".{ending}" for endings in (*_WORLD.values(), (_ANY,)) for ending in endings)
_MOST = 4096  # bytes of a world file
_MOST_AUX = 16 << 20
_WKT = re.compile(r"\s*[A-Z][A-Z0-9_]*\s*\[")
_EPSG = re.compile(r"\s*EPSG:(\d{1,9})\s*", re.IGNORECASE)
_ABSENT = {errno.ENOENT, errno.ENAMETOOLONG}
_REMEDY = "write it anew, or remove it"

Six = tuple[float, float, float, float, float, float]


@dataclass(frozen=True, slots=True)
class Point:
    """A ground control point: a place in the picture, in pixels, and where it lies on the map."""

    column: float
    row: float
    x: float
    y: float
    z: float = 0.0


@dataclass(slots=True)
class Sidecars:
    """What lies beside a picture.

    `transform` (of an `.aux.xml`) and `world` are a, b, c, d, e, f of x = a · column + b · row + c,
    y = d · column + e · row + f, from the upper left corner of the upper left pixel. A CRS is an EPSG number, or WKT.
    `nodata` is by band, from 1. `seen` is the name, length and time of change of each file that was read.
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
    """Whether a file of this name is one that belongs to a picture."""
    return is_aux(name) or os.path.splitext(name)[1].lower() in _WORLD_ENDINGS


def is_aux(name: str) -> bool:
    """Whether a file of this name is GDAL's `.aux.xml`."""
    return name[-len(AUX_ENDING) :].lower() == AUX_ENDING


def names_of(picture: str) -> list[str]:
    """Return the names that the sidecars of a picture may have, in the order in which they are looked for."""
    return [*_world_names(picture), picture + AUX_ENDING]


def read(picture: SafePath) -> Sidecars:
    """Return what lies beside a picture. Raises PictureError for a file there that cannot be understood; OSError."""
    found = Sidecars()
    for name in _world_names(picture.name):
        path = picture.with_name(name)
        body = _body(path, _MOST, found)
        if body is not None:
            found.world = _six_of_world(body, path)
            break
    aux = picture.with_name(picture.name + AUX_ENDING)
    body = _body(aux, _MOST_AUX, found)
    if body is not None:
        _take_aux(body, aux, found)
    if _exists(picture.with_name(picture.name + ".msk")):
        found.notes.append(
            f"the mask {picture.name}.msk beside it is not read: put it into the picture, "
            "gdal_translate -co TILED=YES --config GDAL_TIFF_INTERNAL_MASK YES IN OUT.tif"
        )
    return found


def _world_names(picture: str) -> Iterator[str]:
    stem, ending = os.path.splitext(picture)
    for world in (*_WORLD.get(ending.lower(), ()), _ANY):
        yield f"{stem}.{world}"
        yield f"{stem}.{world.upper()}"


def _body(path: SafePath, most: int, found: Sidecars) -> bytes | None:
    """Return a file's content, and note that it was read; None: there is none of this name."""
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
    found.seen.append((path.name, about.st_size, about.st_mtime_ns))
    return body


def _exists(path: SafePath) -> bool:
    try:
        path.lstat()
    except OSError:
        return False
    return True


def _six_of_world(body: bytes, path: SafePath) -> Six:
    """Return a world file's transform. It counts from the middle of the first pixel, and columns before rows."""
    words = body.decode("ascii", "replace").replace("\ufffd", "?").split()
    try:
        a, d, b, e, x, y = (float(word.replace(",", ".")) for word in words)
    except ValueError:
        raise PictureError(
            f"is no world file: it must hold six numbers, a line each, and holds {len(words)} words",
            place=str(path),
            remedy=_REMEDY,
        ) from None
    six = (a, b, x - (a + b) / 2, d, e, y - (d + e) / 2)
    if not _usable(six):
        raise PictureError("is no world file: its numbers span no area", place=str(path), remedy=_REMEDY)
    return six


def _usable(six: Six) -> bool:
    return all(map(math.isfinite, six)) and six[0] * six[4] - six[1] * six[3] != 0


def _take_aux(body: bytes, path: SafePath, found: Sidecars) -> None:
    """Take what an `.aux.xml` says."""
    try:
        root = xml_safely.parse(body)
    except (InputError, RecursionError) as error:
        reason = error.reason if isinstance(error, InputError) else "is nested too deeply"
        raise PictureError(reason, place=str(path), remedy=_REMEDY) from None
    try:
        found.crs = _crs(root.findtext("SRS"), found, path)
        found.transform = _six_of_aux(root.findtext("GeoTransform"))
        points = root.find("GCPList")
        if points is not None:
            found.points = [_point(each) for each in points.findall("GCP")]
            found.points_crs = _crs(points.get("Projection") or points.findtext("SRS"), found, path)
        for band in root.findall("PAMRasterBand"):
            nodata = band.findtext("NoDataValue")
            if nodata is not None:
                found.nodata[int(band.get("band", "1"))] = float(nodata)
    except (ValueError, TypeError) as error:
        raise PictureError(f"cannot be understood: {error}", place=str(path), remedy=_REMEDY) from None


def _six_of_aux(text: str | None) -> Six | None:
    """Return GDAL's transform, whose numbers come in another order."""
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


def _crs(text: str | None, found: Sidecars, path: SafePath) -> Any:
    """Return a CRS that is written out, or an EPSG number. What else it may be could name a file or an address."""
    if not text or not text.strip():
        return None
    number = _EPSG.fullmatch(text)
    if number:
        return int(number[1])
    if _WKT.match(text):
        return text
    found.notes.append(f"the CRS in {path.name} is neither WKT nor an EPSG number, and is not used")
    return None
