"""Labels as polygons: traced tile by tile, joined when the last tile of a label is read, written.

The polygons follow the edges of the pixels, so that they fit without gaps and reproduce the labels
exactly; holes are kept.

Limitations:

- Readers that require RFC 7946 interpret the coordinates of GeoJSON as degrees, whatever CRS it
  names. A CRS without an EPSG number is named by its WKT, which few programs other than GDAL
  understand.
- The perimeter is that of the pixels' edges, up to 4/π times that of a smooth outline.
- With a CRS of degrees, areas are in square degrees.
- A label that spans many tiles is held in memory until its last tile.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyogrio
import rasterio.features
import shapely
from rasterio.crs import CRS
from rasterio.errors import CRSError
from shapely import affinity

from sam_poll.core.errors import ShareError
from sam_poll.core.safe_path import SafePath
from sam_poll.mosaic.grid import TileGrid
from sam_poll.mosaic.labels import MAKE_ROOM, Layer, OnTile, private_file
from sam_poll.mosaic.raster import WindowedRaster

LAYER = "labels"
AT_ONCE = 2000  # polygons that are written together


class Row(NamedTuple):
    """The attributes of a polygon; the names are those of the files' fields.

    `score` is the predicted IoU, or that of a found object, `area_px` in pixels, `area` and
    `perimeter` in units of the CRS. A mosaic of texts has one more field, `class`.
    """

    label: int
    score: float
    area_px: int
    area: float
    perimeter: float
    text: str = ""


FIELDS = Row._fields[:-1]
CLASS = "class"


def shapes(
    grid: TileGrid, layer: Layer, transform: Any, on_tile: OnTile, text: str = ""
) -> Iterator[tuple[Row, Any]]:
    """Yield each label's row and its multipolygon on the map, once its last tile has been read.

    `text` is the one whose objects are in the layer.
    """
    final = layer.final
    pieces: dict[int, list[Any]] = {}
    matrix = (transform.a, transform.b, transform.d, transform.e, transform.c, transform.f)
    for tile in grid:
        on_tile(tile.number)
        core = layer.core(tile.number)
        # GDAL cannot trace uint32; as int32 the labels have the same bits.
        traced = rasterio.features.shapes(core.view(np.int32), mask=core > 0, connectivity=4)
        for geometry, value in traced:
            polygon = shapely.geometry.shape(geometry)
            pieces.setdefault(int(value), []).append(
                affinity.translate(polygon, tile.core.x0, tile.core.y0)
            )
        for label in sorted(label for label in pieces if final.last[label] <= tile.number):
            placed = _joined(pieces.pop(label), matrix)
            row = Row(
                label + layer.before,
                round(float(final.scores[label]), 4),
                int(final.areas[label]),
                placed.area,
                placed.length,
                text,
            )
            yield row, placed


def _joined(pieces: list[Any], matrix: tuple[float, ...]) -> Any:
    """Return the pieces of a label as one multipolygon on the map."""
    if len(pieces) == 1:
        outline = pieces[0]
    else:
        # Simplified on the grid of pixels: where a seam cuts a straight edge, the union leaves a
        # vertex on it.
        outline = shapely.simplify(shapely.union_all(pieces), 0)
    placed = affinity.affine_transform(outline, matrix)
    parts = placed.geoms if placed.geom_type == "MultiPolygon" else [placed]
    return shapely.MultiPolygon([shapely.orient_polygons(part) for part in parts])


def write(
    folder: SafePath,
    names: tuple[str, str],
    source: WindowedRaster,
    polygons: Iterator[tuple[Row, Any]],
    fields: Sequence[str] = FIELDS,
) -> None:
    """Write a GeoPackage and a GeoJSON with these names into `folder`.

    `fields` are the names of the first attributes of each row; others are left out. Raises
    ShareError, and OSError of the tiles.
    """
    with private_file(folder / names[0]) as geopackage:
        _write(geopackage, folder / names[1], source, polygons, fields)


def _write(
    geopackage: Path,
    geojson: SafePath,
    source: WindowedRaster,
    polygons: Iterator[tuple[Row, Any]],
    fields: Sequence[str],
) -> None:
    crs = source.crs.to_wkt() if source.crs else None
    with _file_errors(geojson), io.TextIOWrapper(geojson.create(), encoding="utf-8") as text:
        header = {"type": "FeatureCollection", "name": LAYER, "crs": _crs_of(source)}
        text.write(json.dumps(header)[:-1])  # without the closing brace
        text.write(', "features": [')
        first = True
        for chunk in _chunks(polygons, AT_ONCE):
            _append(geopackage, crs, chunk, fields)
            for row, polygon in chunk:
                text.write(("\n" if first else ",\n") + json.dumps(_feature(row, polygon, fields)))
                first = False
        if first:
            _append(geopackage, crs, [], fields)
        text.write("\n]}\n")


@contextmanager
def _file_errors(path: SafePath) -> Iterator[None]:
    """Turn an OSError of the file `path` into a ShareError with a remedy."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and str(error.filename) != str(path):
            raise  # an error of reading a tile
        reason = f"the polygons cannot be written: {error.strerror or error}"
        raise ShareError(reason, place=str(path), remedy=MAKE_ROOM) from error


def _chunks(polygons: Iterator[tuple[Row, Any]], length: int) -> Iterator[list[tuple[Row, Any]]]:
    chunk: list[tuple[Row, Any]] = []
    for polygon in polygons:
        chunk.append(polygon)
        if len(chunk) == length:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _append(
    path: Path, crs: str | None, chunk: list[tuple[Row, Any]], fields: Sequence[str]
) -> None:
    """Append polygons to a GeoPackage, which is created if need be."""
    columns = list(zip(*(row[: len(fields)] for row, _ in chunk), strict=True))
    columns = columns or [()] * len(fields)
    dtypes = (np.int64, np.float64, np.int64, np.float64, np.float64, np.object_)[: len(fields)]
    try:
        pyogrio.raw.write(
            path,
            geometry=np.array([polygon.wkb for _, polygon in chunk], dtype=object),
            field_data=[
                np.array(column, dtype) for column, dtype in zip(columns, dtypes, strict=True)
            ],
            fields=list(fields),
            layer=LAYER,
            driver="GPKG",
            geometry_type="MultiPolygon",
            crs=crs,
            append=path.exists(),
        )
    except (pyogrio.errors.DataSourceError, pyogrio.errors.FeatureError) as error:
        reason = f"the polygons cannot be written: {error}"
        raise ShareError(reason, place=str(path), remedy=MAKE_ROOM) from error


def _feature(row: Row, polygon: Any, fields: Sequence[str]) -> Mapping[str, Any]:
    # A row has an attribute more where there are no texts.
    values = {name: value for name, value in zip(fields, row, strict=False) if _is_json(value)}
    return {"type": "Feature", "properties": values, "geometry": shapely.geometry.mapping(polygon)}


def _is_json(value: object) -> bool:
    """Return whether JSON can represent the value; it has no NaN and no infinity."""
    return not isinstance(value, float) or math.isfinite(value)


def _crs_of(source: WindowedRaster) -> Mapping[str, Any] | None:
    """Return the GeoJSON member `crs`; None where the picture has no CRS, so that none is assumed.

    A CRS with an EPSG number is named as GDAL names it. Coordinates are always in the order x, y,
    so that 4326 is called CRS84.
    """
    crs = source.crs
    if not crs:
        return None
    code = crs.to_epsg()
    if code is None or not _is_epsg(crs, code):
        name = crs.to_wkt()
    elif code == 4326:
        name = "urn:ogc:def:crs:OGC:1.3:CRS84"
    else:
        name = f"urn:ogc:def:crs:EPSG::{code}"
    return {"type": "name", "properties": {"name": name}}


def _is_epsg(crs: Any, code: int) -> bool:
    """Return whether the CRS equals that of the EPSG number, and is not only similar to it."""
    try:
        return bool(CRS.from_epsg(code) == crs)
    except CRSError:
        return False
