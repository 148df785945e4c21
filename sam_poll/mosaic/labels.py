"""The labels of the mosaic, from the labels of its tiles: joined, merged, written as one GeoTIFF.

Labels are joined over seams, and slivers are merged into neighbours. Memory holds tables of a few
numbers per label, and the pixels of one tile with a line of its neighbours at a time.

GDAL does not report errors of writing that occur when it closes a file. So labels.tif is read back
and compared. It is written in a private folder of this machine and then copied.

Limitations: an object that is smaller than the minimum area in total and touches no other object is
left out.
"""

from __future__ import annotations

import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.windows import Window

from sam_poll.core.errors import ShareError
from sam_poll.core.files import TEMP_PREFIX
from sam_poll.core.safe_path import SafePath
from sam_poll.mosaic.grid import Tile, TileGrid
from sam_poll.mosaic.raster import FAILED, WindowedRaster, gdal_message
from sam_poll.mosaic.seams import Labels, LabelSets, around, matches
from sam_poll.mosaic.segment_tile import Numbers
from sam_poll.mosaic.tile_store import TileReader

OnTile = Callable[[int], None]  # called with each tile's number before it is processed
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
# Sides of the file's blocks, in pixels, the preferred ones first; the first that divides the side
# of a tile is used. TIFF requires multiples of 16.
BLOCKS = range(512, 0, -16)
# Suffixes of the files that SQLite and GDAL create beside a file.
BESIDE = ("-journal", "-wal", "-shm", ".aux.xml", ".ovr", ".msk")
MAKE_ROOM = "free space on the disk and start the mosaic again: finished tiles are kept"


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """The labels of all tiles, numbered one tile after the other; 0 is none.

    Label n of tile t has the number `first[t] + n - 1`. `scores` and `areas` are by that number;
    `valid` is the number of valid pixels, `skipped` the number of skipped tiles.
    """

    first: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    areas: npt.NDArray[np.int64]
    valid: int
    skipped: int

    def of(self, numbers: npt.NDArray[np.uint16], tile: int) -> Labels:
        """Return the numbers of a tile's labels, 1 to n, as numbers of these tables, int64."""
        labels = numbers.astype(np.int64)
        labels[numbers > 0] += self.first[tile] - 1
        return labels


@dataclass(frozen=True, slots=True, eq=False)
class MosaicLabels:
    """The labels of the mosaic.

    `names` maps every label of the tables to its label in the mosaic (uint32; 0: left out). By the
    label in the mosaic, from 1: `scores`, `areas` in pixels, and `last`, the number of the last
    tile that the label is in.
    """

    names: npt.NDArray[np.uint32]
    scores: npt.NDArray[np.float32]
    areas: npt.NDArray[np.int64]
    last: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.areas) - 1


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """The labels of the mosaic in one layer: all of them, or those of one text.

    `before` is the number of labels of the layers before. It is added to the labels of this layer,
    so that no two objects of the mosaic have the same label.
    """

    tiles: TileReader
    tables: Tables
    final: MosaicLabels
    before: int = 0

    def core(self, number: int) -> npt.NDArray[np.uint32]:
        """Return the labels in a tile's core, counted in this layer, uint32."""
        return self.final.names[self.tables.of(self.tiles.numbers(number), number)]


class MergedSlivers(NamedTuple):
    """The result of `merge_slivers`.

    `representatives` maps every label of the tables to the label that represents its object; 0 is
    left out. `merged` and `dropped` are the numbers of slivers that were merged and left out.
    """

    representatives: Labels
    merged: int
    dropped: int


def tables(tiles: TileReader, grid: TileGrid) -> Tables:
    """Return the tables of all finished tiles."""
    first = [1]
    scores = [np.zeros(1, np.float32)]
    areas = [np.zeros(1, np.int64)]
    valid = 0
    skipped = 0
    for number in range(len(grid)):
        table = tiles.table(number)
        first.append(first[-1] + len(table.scores))
        scores.append(table.scores)
        areas.append(table.areas)
        valid += table.valid
        skipped += table.skipped
    return Tables(np.array(first), np.concatenate(scores), np.concatenate(areas), valid, skipped)


def join_labels(
    tiles: TileReader, grid: TileGrid, tables: Tables, on_tile: OnTile
) -> tuple[LabelSets, int]:
    """Join the labels that are one object across a seam or a corner.

    Returns the sets of joined labels and the number of joins.
    """
    sets = LabelSets(len(tables.scores))
    joins = 0
    for number in range(len(grid)):
        on_tile(number)
        for (one, a), (other, b) in _matching_labels(tiles, grid, number):
            joins += sets.join(int(tables.first[one]) + a - 1, int(tables.first[other]) + b - 1)
    return sets, joins


def _matching_labels(
    tiles: TileReader, grid: TileGrid, number: int
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yield pairs of labels that are one object, each label as tile and number.

    The pairs are those of a tile with the tiles to the right and below, and those around the corner
    on its lower right.
    """
    right, below = grid.right(number), grid.below(number)
    if right is not None:
        [one], [other] = tiles.bands(number, "right").values(), tiles.bands(right, "left").values()
        for a, b in matches(one, other, grid[number].core.x1 - grid.bands(number)["right"].x0):
            yield (number, a), (right, b)
    if below is not None:
        [one], [other] = tiles.bands(number, "bottom").values(), tiles.bands(below, "top").values()
        for a, b in matches(one.T, other.T, grid[number].core.y1 - grid.bands(number)["bottom"].y0):
            yield (number, a), (below, b)
    if right is None or below is None:
        return
    # For each of the four tiles at the corner: the labels that its two neighbours give to its
    # corner, the neighbour at its vertical side first.
    diagonal = right + grid.columns
    sides = {
        number: ("right", "bottom"),
        right: ("left", "bottom"),
        below: ("right", "top"),
        diagonal: ("left", "top"),
    }
    neighbours = {
        number: (right, below),
        right: (number, diagonal),
        below: (diagonal, number),
        diagonal: (below, right),
    }
    for tile, tile_sides in sides.items():
        one, other = (
            _corner(
                tiles.bands(neighbour, OPPOSITE[side])[OPPOSITE[side]], grid, tile, side, tile_sides
            )
            for neighbour, side in zip(neighbours[tile], tile_sides, strict=True)
        )
        for a, b in around(one, other):
            yield (neighbours[tile][0], a), (neighbours[tile][1], b)


def _corner(band: Numbers, grid: TileGrid, tile: int, side: str, sides: tuple[str, str]) -> Numbers:
    """Return the part of the band along a `side` of a tile that is in the corner of two sides.

    The part is flipped so that the corner itself is its first pixel.
    """
    areas = grid.bands(tile)
    one, other = (areas[name] for name in sides)
    corner = one.common(other)
    part = band[corner.within(areas[side])]
    row_step = -1 if "bottom" in sides else 1
    column_step = -1 if "right" in sides else 1
    return part[::row_step, ::column_step]


def merge_slivers(
    tiles: TileReader,
    grid: TileGrid,
    tables: Tables,
    sets: LabelSets,
    min_area: int,
    on_tile: OnTile,
) -> MergedSlivers:
    """Merge slivers into their neighbours.

    A sliver is an object of less than `min_area` pixels in total. It is merged into the neighbour
    with which it has the longest border, and left out if it has no neighbour.
    """
    roots = sets.roots()
    totals = np.zeros(len(roots), np.int64)
    np.add.at(totals, roots, tables.areas)
    sliver = (totals > 0) & (totals < min_area)
    sliver[0] = False
    borders: dict[int, dict[int, int]] = {}
    for number in range(len(grid)):
        on_tile(number)
        tile_roots = roots[tables.first[number] : tables.first[number + 1]]
        if sliver[tile_roots].any():
            framed = _framed(tiles, grid, tables, roots, number)
            for (small, large), length in _borders(framed, sliver).items():
                lengths = borders.setdefault(small, {})
                lengths[large] = lengths.get(large, 0) + length
    target = np.arange(len(roots))
    target[sliver] = 0
    for small, lengths in borders.items():
        # The longest border; of several the one with the smallest label.
        target[small] = min(lengths, key=lambda large: (-lengths[large], large))
    dropped = int(np.count_nonzero(sliver)) - len(borders)
    return MergedSlivers(target[roots], len(borders), dropped)


def number_labels(grid: TileGrid, tables: Tables, representatives: Labels) -> MosaicLabels:
    """Return the labels of the mosaic, numbered without gaps in the order of their first tile."""
    # A label that a tile gives in its padding only has no pixel of the mosaic.
    visible = representatives * (tables.areas > 0)
    order = np.unique(visible[visible > 0])
    names = np.zeros(len(representatives), np.uint32)
    names[order] = np.arange(1, len(order) + 1)
    names = names[representatives]
    areas = np.zeros(len(order) + 1, np.int64)
    weighted = np.zeros(len(order) + 1)
    last = np.zeros(len(order) + 1, np.int64)
    np.add.at(areas, names, tables.areas)
    np.add.at(weighted, names, tables.scores * tables.areas)
    tile_of_label = np.repeat(np.arange(len(grid)), np.diff(tables.first))
    has_pixels = tables.areas[1:] > 0
    np.maximum.at(last, names[1:][has_pixels], tile_of_label[has_pixels])
    areas[0] = 0
    return MosaicLabels(names, (weighted / np.maximum(areas, 1)).astype(np.float32), areas, last)


def flattened(layers: Sequence[Layer], number: int) -> npt.NDArray[np.uint32]:
    """Return one label for each pixel of a tile's core, uint32.

    Where objects of several layers overlap, the one with the highest score gets the pixel; of
    equal ones that of the first layer.
    """
    first, *others = layers
    labels = first.core(number)
    if not others:
        return labels
    scores = first.final.scores[labels]
    for layer in others:
        own = layer.core(number)
        own_scores = layer.final.scores[own]
        better = (own > 0) & ((labels == 0) | (own_scores > scores))
        labels[better] = own[better] + np.uint32(layer.before)
        scores[better] = own_scores[better]
    return labels


def write(
    place: SafePath,
    source: WindowedRaster,
    grid: TileGrid,
    layers: Sequence[Layer],
    on_tile: OnTile,
) -> int:
    """Write the labels as a tiled, compressed GeoTIFF of uint32, georeferenced as the picture.

    0 is nodata. Returns the number of pixels with a label. Raises ShareError, and OSError of the
    tiles.
    """
    labelled_px = 0
    with private_file(place) as path:
        checksums: list[int] = []
        try:
            with rasterio.open(path, "w", **_profile(source, grid)) as dataset:
                for tile in grid:
                    on_tile(tile.number)
                    core = flattened(layers, tile.number)
                    labelled_px += int(np.count_nonzero(core))
                    dataset.write(core, 1, window=_window(tile))
                    checksums.append(_checksum(core))
            with rasterio.open(path) as dataset:
                intact = all(
                    _checksum(dataset.read(1, window=_window(tile))) == checksums[tile.number]
                    for tile in grid
                )
        except FAILED as error:
            reason = f"the labels cannot be written: {gdal_message(error)}"
            raise ShareError(reason, place=str(path), remedy=MAKE_ROOM) from error
        if not intact:
            reason = "the labels are not on the disk as they were written"
            raise ShareError(reason, place=str(path), remedy=MAKE_ROOM)
    return labelled_px


@contextmanager
def private_file(place: SafePath) -> Iterator[Path]:
    """Yield a path in a private folder of this machine, and copy the file there to `place` then.

    The path is for libraries that open files by name. A user who may write to the share could
    replace a folder by another one that holds a link of the file's name, which the library would
    follow. Raises ShareError where the file cannot be copied.
    """
    with tempfile.TemporaryDirectory(prefix=TEMP_PREFIX) as private:
        path = Path(private) / place.name
        yield path
        try:
            with path.open("rb") as source, place.create() as copy:
                shutil.copyfileobj(source, copy)
        except OSError as error:
            reason = f"the file cannot be written: {error.strerror or error}"
            raise ShareError(reason, place=str(place), remedy=MAKE_ROOM) from error


def replace_output(temporary: SafePath, final: SafePath) -> None:
    """Rename an output to its final name. Raises OSError.

    Files that programs have created beside an older output of that name are removed first: SQLite
    would replay an old journal into the new GeoPackage, and GDAL would show old overviews for the
    new raster.
    """
    for ending in BESIDE:
        final.with_name(final.name + ending).unlink(missing_ok=True)
    temporary.rename(final)


def _profile(source: WindowedRaster, grid: TileGrid) -> dict[str, Any]:
    side = next(side for side in BLOCKS if grid.tile % side == 0)
    points, crs_of_points = source.gcps
    georeference: dict[str, Any]
    if points:
        georeference = {"gcps": points, "crs": crs_of_points}
    else:
        georeference = {"crs": source.crs, "transform": source.transform}
    if source.rpcs:
        georeference["rpcs"] = source.rpcs
    return {
        "driver": "GTiff",
        "dtype": "uint32",
        "count": 1,
        "width": grid.size.width,
        "height": grid.size.height,
        **georeference,
        "nodata": 0,
        "tiled": True,
        "blockxsize": side,
        "blockysize": side,
        "compress": "deflate",
        "predictor": 2,
        "bigtiff": "IF_SAFER",
    }


def _window(tile: Tile) -> Window:
    return Window(tile.core.x0, tile.core.y0, tile.core.width, tile.core.height)


def _checksum(pixels: npt.NDArray[np.uint32]) -> int:
    return zlib.crc32(np.ascontiguousarray(pixels).data)


def _framed(
    tiles: TileReader, grid: TileGrid, tables: Tables, roots: Labels, number: int
) -> Labels:
    """Return a tile's representative labels with a line of each neighbour around them."""

    def roots_of(tile: int) -> Labels:
        return roots[tables.of(tiles.numbers(tile), tile)]

    framed = np.pad(roots_of(number), 1)
    right, below = grid.right(number), grid.below(number)
    if right is not None:
        framed[1:-1, -1] = roots_of(right)[:, 0]
    if below is not None:
        framed[-1, 1:-1] = roots_of(below)[0]
    if number % grid.columns:
        framed[1:-1, 0] = roots_of(number - 1)[:, -1]
    if number >= grid.columns:
        framed[0, 1:-1] = roots_of(number - grid.columns)[-1]
    return framed


def _borders(framed: Labels, sliver: npt.NDArray[np.bool_]) -> dict[tuple[int, int], int]:
    """Return the number of pixel edges that each sliver shares with each larger object.

    Only the slivers of the inner part count.
    """
    inner = framed[1:-1, 1:-1]
    lengths: dict[tuple[int, int], int] = {}
    small = sliver[inner]
    for neighbour in (framed[1:-1, :-2], framed[1:-1, 2:], framed[:-2, 1:-1], framed[2:, 1:-1]):
        touching = small & (neighbour > 0) & ~sliver[neighbour]
        pairs, counts = np.unique(
            np.stack([inner[touching], neighbour[touching]], 1), axis=0, return_counts=True
        )
        for (a, b), count in zip(pairs.tolist(), counts.tolist(), strict=True):
            lengths[a, b] = lengths.get((a, b), 0) + count
    return lengths
