"""From each tile's own labels to those of the mosaic: joined over seams, slivers merged, written as one GeoTIFF.

Tables hold a few numbers a label; pixels are held for one tile and a line of its neighbours at a time.

What can still go wrong here: what is below the least area altogether and touches no other object is left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.errors import NotGeoreferencedWarning
from rasterio.windows import Window

from sam_poll.mosaic.seams import Joined, Labels, matches
from sam_poll.mosaic.source import Source
from sam_poll.mosaic.state import State
from sam_poll.mosaic.tiles import Cut

Between = Callable[[int], None]  # called with each tile's number before work on it
BLOCKS = (512, 256, 128, 64, 32, 16)  # sides of the file's blocks, the first that divides the tiles


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


def tables(state: State, cut: Cut) -> Tables:
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


def joined(state: State, cut: Cut, known: Tables, between: Between) -> tuple[Joined, int]:
    """The labels that are one object across a seam, and how many joins there were."""
    sets, joins = Joined(len(known.scores)), 0
    for number in range(len(cut)):
        between(number)
        for other, side, opposite in ((cut.right(number), "right", "left"), (cut.below(number), "bottom", "top")):
            if other is None:
                continue
            one = known.of(state.bands(number, side)[side], number)
            two = known.of(state.bands(other, opposite)[opposite], other)
            area, core = cut.bands(number)[side], cut[number].core
            if side == "right":
                pairs = matches(one, two, core.x1 - area.x0)
            else:
                pairs = matches(one.T, two.T, core.y1 - area.y0)
            joins += sum([sets.join(a, b) for a, b in pairs])
    return sets, joins


def merged(
    state: State, cut: Cut, known: Tables, sets: Joined, min_area: int, between: Between
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


def finals(state: State, cut: Cut, known: Tables, stands: Labels) -> Final:
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


def core_of(state: State, known: Tables, final: Final, number: int) -> npt.NDArray[np.uint32]:
    """The mosaic's labels in a tile's core, uint32."""
    return final.names[known.of(state.numbers(number), number)]


def write(path: Path, source: Source, state: State, cut: Cut, known: Tables, final: Final, between: Between) -> None:
    """The labels as a tiled, compressed GeoTIFF of uint32, on the map where the picture is; 0 is nodata. OSError."""
    side = next(side for side in BLOCKS if cut.tile % side == 0)
    profile: dict[str, Any] = {
        "driver": "GTiff",
        "dtype": "uint32",
        "count": 1,
        "width": cut.size.width,
        "height": cut.size.height,
        "crs": source.crs,
        "transform": source.transform,
        "nodata": 0,
        "tiled": True,
        "blockxsize": side,
        "blockysize": side,
        "compress": "deflate",
        "predictor": 2,
        "bigtiff": "IF_SAFER",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, "w", **profile) as dataset:
            for tile in cut:
                between(tile.number)
                core = tile.core
                window = Window(core.x0, core.y0, core.width, core.height)
                dataset.write(core_of(state, known, final, tile.number), 1, window=window)


def _framed(state: State, cut: Cut, known: Tables, roots: Labels, number: int) -> Labels:
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
