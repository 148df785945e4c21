"""Labels as polygons: traced tile by tile, joined where a label is done, written as it goes.

The polygons run along the pixels' edges, so they fit without gaps and give the labels back exactly; holes are kept.

What can still go wrong here: readers that hold GeoJSON to RFC 7946 take its numbers for degrees, whatever CRS it
names, and a CRS without a number is named by its WKT, which few but GDAL understand. The perimeter is that of pixels'
edges, up to 4/π of a smooth border's. With a CRS of degrees, areas are square degrees. A label that spans very many
tiles is held until its last one.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import rasterio.features
import shapely
from rasterio.crs import CRS
from rasterio.errors import CRSError
from shapely import affinity

from sam_poll.errors import ShareError
from sam_poll.mosaic.labels import MAKE_ROOM, Between, Final, Tables, core_of, made_aside
from sam_poll.mosaic.source import Windows
from sam_poll.mosaic.state import Finished
from sam_poll.mosaic.tiles import Cut
from sam_poll.safe_path import SafePath

LAYER = "labels"
AT_ONCE = 2000  # polygons written together

Row = tuple[int, float, int, float, float]  # label, score, area_px, area, perimeter
FIELDS = ("label", "score", "area_px", "area", "perimeter")


def shapes(
    state: Finished, cut: Cut, known: Tables, final: Final, transform: Any, between: Between
) -> Iterator[tuple[Row, Any]]:
    """Each label's row and its multipolygon on the map, once its last tile has been read."""
    pieces: dict[int, list[Any]] = {}
    matrix = (transform.a, transform.b, transform.d, transform.e, transform.c, transform.f)
    for tile in cut:
        between(tile.number)
        core = core_of(state, known, final, tile.number)
        # GDAL traces no uint32; as int32 the labels are the same bits
        traced = rasterio.features.shapes(core.view(np.int32), mask=core > 0, connectivity=4)
        for drawn, value in traced:
            own = pieces.setdefault(int(value), [])
            own.append(affinity.translate(shapely.geometry.shape(drawn), tile.core.x0, tile.core.y0))
        for label in sorted(label for label in pieces if final.last[label] <= tile.number):
            own = pieces.pop(label)
            whole = shapely.union_all(own) if len(own) > 1 else own[0]
            # on the grid of pixels: where a seam has cut a straight edge, a point would be left on it
            placed = affinity.affine_transform(shapely.simplify(whole, 0) if len(own) > 1 else whole, matrix)
            parts = placed.geoms if placed.geom_type == "MultiPolygon" else [placed]
            placed = shapely.MultiPolygon([shapely.orient_polygons(part) for part in parts])
            row = (label, round(float(final.scores[label]), 4), int(final.areas[label]), placed.area, placed.length)
            yield row, placed


def write(folder: SafePath, names: tuple[str, str], source: Windows, found: Iterator[tuple[Row, Any]]) -> None:
    """A GeoPackage and a GeoJSON, both of `names`, made in `folder`. ShareError, OSError."""
    with made_aside(folder / names[0]) as made:
        _write(made, folder / names[1], source, found)


def _write(geopackage: Path, geojson: SafePath, source: Windows, found: Iterator[tuple[Row, Any]]) -> None:
    crs = source.crs.to_wkt() if source.crs else None
    with _written(geojson), io.TextIOWrapper(geojson.create(), encoding="utf-8") as text:
        text.write(json.dumps({"type": "FeatureCollection", "name": LAYER, "crs": _crs_of(source)})[:-1])
        text.write(', "features": [')
        first = True
        for some in _by(found, AT_ONCE):
            _append(geopackage, crs, some)
            for row, drawn in some:
                text.write(("\n" if first else ",\n") + json.dumps(_feature(row, drawn)))
                first = False
        if first:
            _append(geopackage, crs, [])
        text.write("\n]}\n")


@contextmanager
def _written(path: SafePath) -> Iterator[None]:
    """An OSError of this file names it, and what to do."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and str(error.filename) != str(path):
            raise  # of a tile
        reason = f"the polygons cannot be written: {error.strerror or error}"
        raise ShareError(reason, place=str(path), remedy=MAKE_ROOM) from error


def _by(found: Iterator[tuple[Row, Any]], count: int) -> Iterator[list[tuple[Row, Any]]]:
    some: list[tuple[Row, Any]] = []
    for one in found:
        some.append(one)
        if len(some) == count:
            yield some
            some = []
    if some:
        yield some


def _append(path: Path, crs: str | None, some: list[tuple[Row, Any]]) -> None:
    columns = list(zip(*(row for row, _ in some), strict=True)) or [()] * len(FIELDS)
    kinds = (np.int64, np.float64, np.int64, np.float64, np.float64)
    try:
        pyogrio.raw.write(
            path,
            geometry=np.array([drawn.wkb for _, drawn in some], dtype=object),
            field_data=[np.array(column, kind) for column, kind in zip(columns, kinds, strict=True)],
            fields=list(FIELDS),
            layer=LAYER,
            driver="GPKG",
            geometry_type="MultiPolygon",
            crs=crs,
            append=path.exists(),
        )
    except (pyogrio.errors.DataSourceError, pyogrio.errors.FeatureError) as error:
        reason = f"the polygons cannot be written: {error}"
        raise ShareError(reason, place=str(path), remedy=MAKE_ROOM) from error


def _feature(row: Row, drawn: Any) -> Mapping[str, Any]:
    values = {name: value for name, value in zip(FIELDS, row, strict=True) if not _infinite(value)}
    return {"type": "Feature", "properties": values, "geometry": shapely.geometry.mapping(drawn)}


def _infinite(value: float) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _crs_of(source: Windows) -> Mapping[str, Any] | None:
    """As GDAL names it where it has a number; coordinates are x, y all the same, so 4326 is called CRS84. None: the
    picture has none, and none is to be assumed."""
    crs = source.crs
    if not crs:
        return None
    code = crs.to_epsg()
    if code is None or not _same(crs, code):
        name = crs.to_wkt()
    else:
        name = "urn:ogc:def:crs:OGC:1.3:CRS84" if code == 4326 else f"urn:ogc:def:crs:EPSG::{code}"
    return {"type": "name", "properties": {"name": name}}


def _same(crs: Any, code: int) -> bool:
    """Whether it is the CRS of that number, and not only alike."""
    try:
        return bool(CRS.from_epsg(code) == crs)
    except CRSError:
        return False
