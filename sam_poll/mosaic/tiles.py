"""How a large picture is cut: tiles that share no pixel, and the window around each that the network sees (pure).

Windows are all of one size, so that an object has the same scale in each: at the picture's edge the window moves inward
instead of shrinking. What can still go wrong here: nothing; these are numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from sam_poll.types import Size

BAND = 128  # pixels on each side of a seam on which two tiles' views are kept; no more than the padding


class Area(NamedTuple):
    """Pixels x0 ≤ x < x1, y0 ≤ y < y1."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def width(self) -> int:
        return self.x1 - self.x0

    @property
    def height(self) -> int:
        return self.y1 - self.y0

    def common(self, other: Area) -> Area:
        """The pixels of both; of no width or height, or less, where there are none."""
        return Area(max(self.x0, other.x0), max(self.y0, other.y0), min(self.x1, other.x1), min(self.y1, other.y1))

    def within(self, outer: Area) -> tuple[slice, slice]:
        """Rows and columns of this area in an array of the `outer` one."""
        return slice(self.y0 - outer.y0, self.y1 - outer.y0), slice(self.x0 - outer.x0, self.x1 - outer.x0)


@dataclass(frozen=True, slots=True)
class Tile:
    """`core` are the pixels that are this tile's own; `window` is what the network sees of the picture for them."""

    number: int
    core: Area
    window: Area


@dataclass(frozen=True, slots=True)
class Cut:
    """A picture of `size` in tiles of `tile`² pixels, row by row, with `padding` pixels around each."""

    size: Size
    tile: int
    padding: int

    @property
    def columns(self) -> int:
        return -(-self.size.width // self.tile)

    @property
    def rows(self) -> int:
        return -(-self.size.height // self.tile)

    def __len__(self) -> int:
        return self.columns * self.rows

    def __iter__(self) -> Iterator[Tile]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Tile:
        row, column = divmod(number, self.columns)
        (x0, x1), (wx0, wx1) = self._spans(column, self.size.width)
        (y0, y1), (wy0, wy1) = self._spans(row, self.size.height)
        return Tile(number, Area(x0, y0, x1, y1), Area(wx0, wy0, wx1, wy1))

    def right(self, number: int) -> int | None:
        """The tile to the right; None at the picture's edge."""
        return number + 1 if (number + 1) % self.columns else None

    def below(self, number: int) -> int | None:
        """The tile below; None at the picture's edge."""
        return number + self.columns if number + self.columns < len(self) else None

    def bands(self, number: int) -> dict[str, Area]:
        """The areas along a tile's seams by side, as both tiles of a seam know them."""
        x0, y0, x1, y1 = self[number].core
        reach = min(BAND, self.padding)
        found = {}
        if x0:
            found["left"] = Area(x0 - reach, y0, min(x0 + reach, self.size.width), y1)
        if x1 < self.size.width:
            found["right"] = Area(x1 - reach, y0, min(x1 + reach, self.size.width), y1)
        if y0:
            found["top"] = Area(x0, y0 - reach, x1, min(y0 + reach, self.size.height))
        if y1 < self.size.height:
            found["bottom"] = Area(x0, y1 - reach, x1, min(y1 + reach, self.size.height))
        return found

    def _spans(self, index: int, length: int) -> tuple[tuple[int, int], tuple[int, int]]:
        start, whole = index * self.tile, self.tile + 2 * self.padding
        begin = max(0, min(start - self.padding, length - whole))
        return (start, min(start + self.tile, length)), (begin, min(begin + whole, length))
