"""Filling of labels that a tile has missed from its neighbour's overlap.

The windows of two neighbouring tiles both show the pixels along their seam. An object that crosses
the seam may be labelled by one of the two only. The other tile then borrows the neighbour's label,
as far as the band reaches and where it has no label of its own. The borrowed pixels become a new
label of the tile, which the seam joins as any other. Neighbours are read without what they have
borrowed themselves, so that the order of the tiles does not matter.

Limitations: wrong labels that a neighbour gives beyond the seam are borrowed, too. Parts of an
object that are deeper in the tile than the band stay missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from sam_poll.core.types import BoolArray
from sam_poll.mosaic.grid import Area, TileGrid
from sam_poll.mosaic.labels import OPPOSITE
from sam_poll.mosaic.segment_tile import MAX_LABELS, Numbers
from sam_poll.mosaic.tile_store import TileReader, TileTable

# Fraction of a neighbour's label that must have no label of the tile. Below it the two tiles only
# disagree about a border.
MISSED = 0.5
# Tiles whose borrowed labels are cached: a tile, its four neighbours, and some more.
RECENT = 8


@dataclass(frozen=True, slots=True, eq=False)
class BorrowedLabels:
    """The labels that a tile borrows.

    `patches` holds areas of its core with their new labels (0: none is new), `scores` and `areas`
    those of the new labels, in the order of their numbers.
    """

    patches: tuple[tuple[Area, Numbers], ...]
    scores: npt.NDArray[np.float32]
    areas: npt.NDArray[np.int64]

    def onto(self, numbers: Numbers, area: Area) -> Numbers:
        """Return a tile's labels of an area with the borrowed ones added; `numbers` is kept."""
        filled = numbers
        for patch, new in self.patches:
            both = patch.common(area)
            if both.width > 0 and both.height > 0:
                if filled is numbers:
                    filled = filled.copy()
                part = filled[both.within(area)]
                np.copyto(part, new[both.within(patch)], where=new[both.within(patch)] > 0)
        return filled

    def and_of(
        self,
        area: Area,
        new: Numbers,
        scores: npt.NDArray[np.float32],
        areas: npt.NDArray[np.int64],
    ) -> BorrowedLabels:
        """Return these labels together with those borrowed from another neighbour."""
        return BorrowedLabels(
            (*self.patches, (area, new)),
            np.concatenate([self.scores, scores]),
            np.concatenate([self.areas, areas]),
        )


NOTHING = BorrowedLabels((), np.zeros(0, np.float32), np.zeros(0, np.int64))


class NeighbourFill:
    """The finished tiles of `tiles`, with the labels that they borrow from their neighbours.

    It is a `TileReader`; scores, areas, labels and bands include the borrowed labels.
    """

    def __init__(self, tiles: TileReader, grid: TileGrid, min_area: int) -> None:
        self._tiles = tiles
        self._grid = grid
        self._min_area = min_area
        # Tiles that borrow nothing, which are most; they are not computed twice.
        self._without_loans: set[int] = set()
        self._cached_borrowed = lru_cache(RECENT)(self._compute_borrowed)

    def table(self, number: int) -> TileTable:
        """Return scores, areas and counts of a tile."""
        table = self._tiles.table(number)
        borrowed = self._borrowed(number)
        return TileTable(
            np.concatenate([table.scores, borrowed.scores]),
            np.concatenate([table.areas, borrowed.areas]),
            table.valid,
            table.skipped,
        )

    def numbers(self, number: int) -> Numbers:
        """Return the labels of a tile's core."""
        return self._borrowed(number).onto(self._tiles.numbers(number), self._grid[number].core)

    def bands(self, number: int, *sides: str) -> dict[str, Numbers]:
        """Return a tile's labels of the bands along some of its seams."""
        areas = self._grid.bands(number)
        borrowed = self._borrowed(number)
        return {
            side: borrowed.onto(band, areas[side])
            for side, band in self._tiles.bands(number, *sides).items()
        }

    def _borrowed(self, number: int) -> BorrowedLabels:
        if number in self._without_loans:
            return NOTHING
        borrowed = self._cached_borrowed(number)
        if not borrowed.patches:
            self._without_loans.add(number)
        return borrowed

    def _compute_borrowed(self, number: int) -> BorrowedLabels:
        bands = self._grid.bands(number)
        core = self._grid[number].core
        columns = self._grid.columns
        neighbours = {"left": -1, "right": 1, "top": -columns, "bottom": columns}
        label_count = len(self._tiles.table(number).scores)
        own_bands = self._tiles.bands(number, *bands)
        borrowed = NOTHING
        for side, band in bands.items():
            lender = number + neighbours[side]
            lender_side = OPPOSITE[side]
            theirs = oriented(self._tiles.bands(lender, lender_side)[lender_side], side)
            half = band.common(core)
            own_half = own_bands[side][half.within(band)]
            mine = oriented(own_half, side)
            filled = oriented(borrowed.onto(own_half, half), side)
            first = label_count + len(borrowed.scores) + 1
            new, lent_labels = borrow(mine, filled, theirs, first, self._min_area)
            if len(lent_labels):
                scores = self._tiles.table(lender).scores[lent_labels - 1]
                areas = np.bincount(new.ravel())[first:]
                borrowed = borrowed.and_of(half, oriented(new, side, back=True), scores, areas)
        return borrowed


def borrow(
    mine: Numbers, filled: Numbers, theirs: Numbers, first: int, min_area: int
) -> tuple[Numbers, npt.NDArray[np.int64]]:
    """Return what a tile borrows across a seam on its left.

    - `mine`: the tile's labels of its own half of the band.
    - `filled`: the same with labels borrowed from other neighbours.
    - `theirs`: the neighbour's labels of both halves.
    - `first`: the number of the first new label.

    Returns the new labels of the tile's half (0: none is new), and for each of them the neighbour's
    label that it comes from.

    A label crosses the seam if it is on both lines beside the seam, and on the tile's line at a
    pixel that is free. So the seam joins the borrowed label to the neighbour's.
    """
    seam = theirs.shape[1] - mine.shape[1]
    their_view = theirs[:, seam:]
    free = filled == 0
    crossing = np.intersect1d(theirs[:, seam - 1], np.where(free[:, 0], their_view[:, 0], 0))
    length = int(theirs.max()) + 1

    def pixels_where(condition: BoolArray | bool) -> npt.NDArray[np.int64]:
        """Count each of the neighbour's labels where the condition holds."""
        return np.bincount(np.where(condition, their_view, 0).ravel(), minlength=length)

    sizes = pixels_where(True)
    missed = pixels_where(mine == 0)
    available = pixels_where(free)
    wanted = (crossing > 0) & (missed[crossing] > MISSED * sizes[crossing])
    labels = crossing[wanted & (available[crossing] >= min_area)]
    labels = labels[: MAX_LABELS + 1 - first]
    names = np.zeros(length, np.uint16)
    names[labels] = np.arange(first, first + len(labels))
    return names[np.where(free, their_view, 0)], labels.astype(np.int64)


def oriented(band: Numbers, side: str, *, back: bool = False) -> Numbers:
    """Return the band along a side of a tile, turned so that the tile is on its right.

    With `back` the turn is undone.
    """
    steps = slice(None, None, -1 if side in ("right", "bottom") else 1)
    is_horizontal = side in ("top", "bottom")
    if back:
        return band[:, steps].T if is_horizontal else band[:, steps]
    return (band.T if is_horizontal else band)[:, steps]
