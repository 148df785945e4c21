"""From each tile's own labels to those of the mosaic: joined over seams, slivers merged, written as one GeoTIFF.

Tables hold a few numbers a label; pixels are held for one tile and a line of its neighbours at a time.

GDAL tells nobody what it could not write as it closed a file, so labels.tif is read back before it counts. It is made
in a private folder of this machine and then copied.

What can still go wrong here: what is below the least area altogether and touches no other object is left out.
"""

from __future__ import annotations

import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.windows import Window

from sam_poll.errors import ShareError
from sam_poll.fs import TEMP_PREFIX
from sam_poll.mosaic.passes import Numbers
from sam_poll.mosaic.seams import Joined, Labels, around, matches
from sam_poll.mosaic.source import FAILED, Windows, words
from sam_poll.mosaic.state import Finished
from sam_poll.mosaic.tiles import Area, Cut, Tile
from sam_poll.safe_path import SafePath

Between = Callable[[int], None]  # called with each tile's number before work on it
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
BLOCKS = range(512, 0, -16)  # sides that the file's blocks may have; it is the first that divides the tiles
BESIDE = ("-journal", "-wal", "-shm", ".aux.xml", ".ovr", ".msk")  # how what is made beside a file is called
MAKE_ROOM = "make room on the disk and start it again: finished tiles are kept"


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """Of all labels that tiles have given, one after another; 0 is none. Label n of tile t is `first[t] + n - 1`."""

    first: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    areas: npt.NDArray[np.int64]
    valid: int
    skipped: int

    def of(self, numbers: npt.NDArray[np.uint16], tile: int) -> Labels:
        """A tile's numbers as labels of these tables, int64."""
        labels = numbers.astype(np.int64)
        labels[numbers > 0] += self.first[tile] - 1
        return labels


@dataclass(frozen=True, slots=True, eq=False)
class Final:
    """`names`: for every label of the tables the one in the mosaic (uint32, 0: left out). Of those, from 1: `scores`,
    `areas` in pixels, and `last`, the number of the last tile that each lies in."""

    names: npt.NDArray[np.uint32]
    scores: npt.NDArray[np.float32]
    areas: npt.NDArray[np.int64]
    last: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.areas) - 1


def tables(state: Finished, cut: Cut) -> Tables:
    """What the finished tiles hold."""
    first, scores, areas = [1], [np.zeros(1, np.float32)], [np.zeros(1, np.int64)]
    valid = skipped = 0
    for number in range(len(cut)):
        score, area, there, left_out = state.table(number)
        first.append(first[-1] + len(score))
        scores.append(score)
        areas.append(area)
        valid, skipped = valid + there, skipped + left_out
    return Tables(np.array(first), np.concatenate(scores), np.concatenate(areas), valid, skipped)


def joined(state: Finished, cut: Cut, known: Tables, between: Between) -> tuple[Joined, int]:
    """The labels that are one object across a seam or a corner, and how many joins there were."""
    sets, joins = Joined(len(known.scores)), 0
    for number in range(len(cut)):
        between(number)
        for (one, a), (other, b) in _same(state, cut, number):
            joins += sets.join(int(known.first[one]) + a - 1, int(known.first[other]) + b - 1)
    return sets, joins


def _same(state: Finished, cut: Cut, number: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """What is one object of a tile and those to the right and below: tile and number of the one, and of the other."""
    right, below = cut.right(number), cut.below(number)
    if right is not None:
        [one], [other] = state.bands(number, "right").values(), state.bands(right, "left").values()
        for a, b in matches(one, other, cut[number].core.x1 - cut.bands(number)["right"].x0):
            yield (number, a), (right, b)
    if below is not None:
        [one], [other] = state.bands(number, "bottom").values(), state.bands(below, "top").values()
        for a, b in matches(one.T, other.T, cut[number].core.y1 - cut.bands(number)["bottom"].y0):
            yield (number, a), (below, b)
    if right is None or below is None:
        return
    # the corner of each of the four, as the two beside it see it
    across = right + cut.columns
    sides = {number: ("right", "bottom"), right: ("left", "bottom"), below: ("right", "top"), across: ("left", "top")}
    beside = {number: (right, below), right: (number, across), below: (across, number), across: (below, right)}
    for tile, (aside, updown) in sides.items():
        one, other = (
            _corner(state.bands(seer, OPPOSITE[side])[OPPOSITE[side]], cut, tile, side, (aside, updown))
            for seer, side in zip(beside[tile], (aside, updown), strict=True)
        )
        for a, b in around(one, other):
            yield (beside[tile][0], a), (beside[tile][1], b)


def _corner(band: Numbers, cut: Cut, tile: int, side: str, sides: tuple[str, str]) -> Numbers:
    """What the band along a `side` of a tile shows of the corner between two sides of it; turned so that the corner
    itself is the first pixel."""
    areas = cut.bands(tile)
    one, other = (areas[name] for name in sides)
    corner = Area(max(one.x0, other.x0), max(one.y0, other.y0), min(one.x1, other.x1), min(one.y1, other.y1))
    seen = band[corner.within(areas[side])]
    return seen[:: -1 if "bottom" in sides else 1, :: -1 if "right" in sides else 1]


def merged(
    state: Finished, cut: Cut, known: Tables, sets: Joined, min_area: int, between: Between
) -> tuple[Labels, int, int]:
    """For every label the one that stands for it, 0 for what is left out; how many slivers were merged, and left out.

    A sliver is an object of less than `min_area` pixels in all: it goes to the neighbour that it has the longest border
    with, and nowhere if it has none.
    """
    roots = sets.roots()
    totals = np.zeros(len(roots), np.int64)
    np.add.at(totals, roots, known.areas)
    sliver = (totals > 0) & (totals < min_area)
    sliver[0] = False
    borders: dict[int, dict[int, int]] = {}
    for number in range(len(cut)):
        between(number)
        mine = roots[known.first[number] : known.first[number + 1]]
        if sliver[mine].any():
            for (small, large), length in _borders(_framed(state, cut, known, roots, number), sliver).items():
                near = borders.setdefault(small, {})
                near[large] = near.get(large, 0) + length
    goes = np.arange(len(roots))
    goes[sliver] = 0
    for small, near in borders.items():
        goes[small] = min(near, key=lambda large: (-near[large], large))
    return goes[roots], len(borders), int(np.count_nonzero(sliver)) - len(borders)


def finals(state: Finished, cut: Cut, known: Tables, stands: Labels) -> Final:
    """The mosaic's labels, without gaps, in the order of their first tile."""
    there = stands * (known.areas > 0)  # seen in the padding only: in no pixel of the mosaic
    order = np.unique(there[there > 0])
    names = np.zeros(len(stands), np.uint32)
    names[order] = np.arange(1, len(order) + 1)
    names = names[stands]
    areas = np.zeros(len(order) + 1, np.int64)
    weighted = np.zeros(len(order) + 1)
    last = np.zeros(len(order) + 1, np.int64)
    np.add.at(areas, names, known.areas)
    np.add.at(weighted, names, known.scores * known.areas)
    tiles = np.repeat(np.arange(len(cut)), np.diff(known.first))
    seen = known.areas[1:] > 0
    np.maximum.at(last, names[1:][seen], tiles[seen])
    areas[0] = 0
    return Final(names, (weighted / np.maximum(areas, 1)).astype(np.float32), areas, last)


def core_of(state: Finished, known: Tables, final: Final, number: int) -> npt.NDArray[np.uint32]:
    """The mosaic's labels in a tile's core, uint32."""
    return final.names[known.of(state.numbers(number), number)]


def write(
    place: SafePath, source: Windows, state: Finished, cut: Cut, known: Tables, final: Final, between: Between
) -> None:
    """The labels as a tiled, compressed GeoTIFF of uint32, on the map where the picture is; 0 is nodata. ShareError,
    OSError."""
    with made_aside(place) as path:
        sums: list[int] = []
        try:
            with rasterio.open(path, "w", **_profile(source, cut)) as dataset:
                for tile in cut:
                    between(tile.number)
                    core = core_of(state, known, final, tile.number)
                    dataset.write(core, 1, window=_window(tile))
                    sums.append(_sum(core))
            with rasterio.open(path) as dataset:
                whole = all(_sum(dataset.read(1, window=_window(tile))) == sums[tile.number] for tile in cut)
        except FAILED as error:
            reason = f"the labels cannot be written: {words(error)}"
            raise ShareError(reason, place=str(path), remedy=MAKE_ROOM) from error
        if not whole:
            reason = "the labels are not on the disk as they were written"
            raise ShareError(reason, place=str(path), remedy=MAKE_ROOM)


@contextmanager
def made_aside(place: SafePath) -> Iterator[Path]:
    """Yield a path in a private folder of this machine for a library that opens files by name, and copy what it has
    made there to `place`, at the end.

    Whoever may write to the share could put another folder in a folder's place, with a link of the file's name in it,
    and the library would follow that. ShareError where the copy cannot be made.
    """
    with tempfile.TemporaryDirectory(prefix=TEMP_PREFIX) as private:
        made = Path(private) / place.name
        yield made
        try:
            with made.open("rb") as whole, place.create() as copy:
                shutil.copyfileobj(whole, copy)
        except OSError as error:
            reason = f"it cannot be written: {error.strerror or error}"
            raise ShareError(reason, place=str(place), remedy=MAKE_ROOM) from error


def put(made: SafePath, place: SafePath) -> None:
    """Rename an output to its place. What programs have made beside an older one of that name goes first: SQLite would
    play its journal into the new GeoPackage, GDAL show its overviews for those of the new raster. OSError."""
    for ending in BESIDE:
        place.with_name(place.name + ending).unlink(missing_ok=True)
    made.rename(place)


def _profile(source: Windows, cut: Cut) -> dict[str, Any]:
    side = next(side for side in BLOCKS if cut.tile % side == 0)
    points, crs_of_points = source.gcps
    placed = {"gcps": points, "crs": crs_of_points} if points else {"crs": source.crs, "transform": source.transform}
    return {
        "driver": "GTiff",
        "dtype": "uint32",
        "count": 1,
        "width": cut.size.width,
        "height": cut.size.height,
        **placed,
        **({"rpcs": source.rpcs} if source.rpcs else {}),
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


def _sum(pixels: npt.NDArray[np.uint32]) -> int:
    return zlib.crc32(np.ascontiguousarray(pixels).data)


def _framed(state: Finished, cut: Cut, known: Tables, roots: Labels, number: int) -> Labels:
    """A tile's labels, each as the one that stands for it, with a line of each neighbour around."""

    def of(tile: int) -> Labels:
        return roots[known.of(state.numbers(tile), tile)]

    own = np.pad(of(number), 1)
    right, below = cut.right(number), cut.below(number)
    if right is not None:
        own[1:-1, -1] = of(right)[:, 0]
    if below is not None:
        own[-1, 1:-1] = of(below)[0]
    if number % cut.columns:
        own[1:-1, 0] = of(number - 1)[:, -1]
    if number >= cut.columns:
        own[0, 1:-1] = of(number - cut.columns)[-1]
    return own


def _borders(framed: Labels, sliver: npt.NDArray[np.bool_]) -> dict[tuple[int, int], int]:
    """How many pixel edges each sliver of the inner part shares with each object that is none."""
    inner = framed[1:-1, 1:-1]
    found: dict[tuple[int, int], int] = {}
    small = sliver[inner]
    for beside in (framed[1:-1, :-2], framed[1:-1, 2:], framed[:-2, 1:-1], framed[2:, 1:-1]):
        meets = small & (beside > 0) & ~sliver[beside]
        pairs, counts = np.unique(np.stack([inner[meets], beside[meets]], 1), axis=0, return_counts=True)
        for (a, b), count in zip(pairs.tolist(), counts.tolist(), strict=True):
            found[a, b] = found.get((a, b), 0) + count
    return found
