"""What a tile's own window has missed and its neighbour's has seen: the neighbour lends it.

Both windows show the pixels along their seam. An object that goes over it may be seen in one of the two only; then the
tile takes over the neighbour's label as far as the band reaches, where it has none of its own. What it takes becomes a
label of its own, which the seam joins as any other. Neighbours are read as they have seen it themselves, so that the
order of the tiles does not matter and nothing is lent on.

What can still go wrong here: what a neighbour sees wrongly over the seam is taken over as well. What lies deeper in the
tile than the band stays missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from sam_poll.mosaic.labels import OPPOSITE
from sam_poll.mosaic.passes import MOST, Numbers
from sam_poll.mosaic.state import Finished
from sam_poll.mosaic.tiles import Area, Cut

MISSED = 0.5  # of a neighbour's label that must have none of the tile's own: less is a border seen differently
RECENT = 8  # tiles whose loans are kept: a tile, those around it, and some to spare


@dataclass(frozen=True, slots=True, eq=False)
class Loan:
    """What a tile takes over. `patches`: areas of its core with their new labels, 0 where none is new; `scores` and
    `areas` of these labels, in the order of their numbers."""

    patches: tuple[tuple[Area, Numbers], ...]
    scores: npt.NDArray[np.float32]
    areas: npt.NDArray[np.int64]

    def onto(self, numbers: Numbers, area: Area) -> Numbers:
        """A tile's view of an area, with what it has taken over."""
        seen = numbers
        for patch, new in self.patches:
            both = patch.common(area)
            if both.width > 0 and both.height > 0:
                seen = seen.copy() if seen is numbers else seen
                part = seen[both.within(area)]
                np.copyto(part, new[both.within(patch)], where=new[both.within(patch)] > 0)
        return seen

    def and_of(self, area: Area, new: Numbers, scores: npt.NDArray[np.float32], areas: npt.NDArray[np.int64]) -> Loan:
        """This one, and what another neighbour lends."""
        return Loan(
            (*self.patches, (area, new)), np.concatenate([self.scores, scores]), np.concatenate([self.areas, areas])
        )


NOTHING = Loan((), np.zeros(0, np.float32), np.zeros(0, np.int64))


class Lent:
    """The finished tiles of `state`, each with what its neighbours lend it; all else is as there."""

    def __init__(self, state: Finished, cut: Cut, min_area: int) -> None:
        self._raw, self._cut, self._min_area = state, cut, min_area
        self._without: set[int] = set()  # tiles that take nothing: most, and known after the first look
        self._recent = lru_cache(RECENT)(self._reckoned)

    def table(self, number: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], int, bool]:
        scores, areas, valid, skipped = self._raw.table(number)
        loan = self._loan(number)
        return np.concatenate([scores, loan.scores]), np.concatenate([areas, loan.areas]), valid, skipped

    def numbers(self, number: int) -> Numbers:
        return self._loan(number).onto(self._raw.numbers(number), self._cut[number].core)

    def bands(self, number: int, *sides: str) -> dict[str, Numbers]:
        areas, loan = self._cut.bands(number), self._loan(number)
        return {side: loan.onto(band, areas[side]) for side, band in self._raw.bands(number, *sides).items()}

    def _loan(self, number: int) -> Loan:
        if number in self._without:
            return NOTHING
        loan = self._recent(number)
        if not loan.patches:
            self._without.add(number)
        return loan

    def _reckoned(self, number: int) -> Loan:
        bands, core = self._cut.bands(number), self._cut[number].core
        beside = {"left": -1, "right": 1, "top": -self._cut.columns, "bottom": self._cut.columns}
        count = len(self._raw.table(number)[0])
        own = self._raw.bands(number, *bands)
        loan = NOTHING
        for side, band in bands.items():
            lender, there = number + beside[side], OPPOSITE[side]
            theirs = self._raw.bands(lender, there)[there]
            half = band.common(core)
            mine = own[side][half.within(band)]
            mine, held, theirs = (turned(seen, side) for seen in (mine, loan.onto(mine, half), theirs))
            first = count + len(loan.scores) + 1
            new, taken = lent(mine, held, theirs, first, self._min_area)
            if len(taken):
                scores, areas = self._raw.table(lender)[0][taken - 1], np.bincount(new.ravel())[first:]
                loan = loan.and_of(half, turned(new, side, back=True), scores, areas)
        return loan


def lent(
    mine: Numbers, held: Numbers, theirs: Numbers, first: int, min_area: int
) -> tuple[Numbers, npt.NDArray[np.int64]]:
    """What a tile takes over at a seam on its left: its new labels from `first` on, 0 where none is new, and which of
    the neighbour's each is. `mine`: its view of its own half of the band; `held`: the same with what others have lent
    it; `theirs`: the neighbour's view of both halves.

    A label goes over the seam if it lies on both of its lines, on the tile's own where that is free: so the seam joins
    what is taken over to what it comes from.
    """
    seam = theirs.shape[1] - mine.shape[1]
    there, free = theirs[:, seam:], held == 0
    over = np.intersect1d(theirs[:, seam - 1], np.where(free[:, 0], there[:, 0], 0))
    length = int(theirs.max()) + 1
    sizes, missed, open_ = (
        np.bincount(np.where(where, there, 0).ravel(), minlength=length) for where in (True, mine == 0, free)
    )
    taken = over[(over > 0) & (missed[over] > MISSED * sizes[over]) & (open_[over] >= min_area)]
    taken = taken[: MOST + 1 - first]
    names = np.zeros(length, np.uint16)
    names[taken] = np.arange(first, first + len(taken))
    return names[np.where(free, there, 0)], taken.astype(np.int64)


def turned(band: Numbers, side: str, *, back: bool = False) -> Numbers:
    """What is seen along a side of a tile, turned so that the tile lies to the right of it; or back again."""
    steps = slice(None, None, -1 if side in ("right", "bottom") else 1)
    across = side in ("top", "bottom")
    if back:
        return band[:, steps].T if across else band[:, steps]
    return (band.T if across else band)[:, steps]
