"""The division of a large picture into tiles, and the window around each tile. Pure.

Tiles share no pixel. The network sees the window of a tile, which is larger by the padding. All
windows have one size, so that an object has the same scale in each: at the picture's edge the
window moves inward instead of shrinking.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from sam_poll.core.types import Size

# Width in pixels, on each side of a seam, of the band whose labels both tiles keep. The padding
# limits it further. Part of a mosaic's job: another value invalidates unfinished mosaics.
BAND = 128


class Area(NamedTuple):
    """A rectangle of pixels: x0 ≤ x < x1, y0 ≤ y < y1."""

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
        """Return the intersection; its width or height is 0 or negative where it is empty."""
        return Area(
            max(self.x0, other.x0),
            max(self.y0, other.y0),
            min(self.x1, other.x1),
            min(self.y1, other.y1),
        )

    def within(self, outer: Area) -> tuple[slice, slice]:
        """Return the rows and columns of this area in an array that covers `outer`."""
        rows = slice(self.y0 - outer.y0, self.y1 - outer.y0)
        columns = slice(self.x0 - outer.x0, self.x1 - outer.x0)
        return rows, columns


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile: `core` is the area of its own pixels, `window` the area that the network sees."""

    number: int
    core: Area
    window: Area


@dataclass(frozen=True, slots=True)
class TileGrid:
    """The tiles of a picture, numbered row by row.

    `tile` is the side of a tile, `padding` the width of the margin around it, both in pixels.
    """

    size: Size
    tile: int
    padding: int

    @property
    def columns(self) -> int:
        """Return the number of tiles in a row."""
        return -(-self.size.width // self.tile)

    @property
    def rows(self) -> int:
        """Return the number of tiles in a column."""
        return -(-self.size.height // self.tile)

    def __len__(self) -> int:
        return self.columns * self.rows

    def __iter__(self) -> Iterator[Tile]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Tile:
        row, column = divmod(number, self.columns)
        x = self._spans(column, self.size.width)
        y = self._spans(row, self.size.height)
        core = Area(x.core_start, y.core_start, x.core_end, y.core_end)
        window = Area(x.window_start, y.window_start, x.window_end, y.window_end)
        return Tile(number, core, window)

    def right(self, number: int) -> int | None:
        """Return the number of the tile to the right; None at the picture's edge."""
        return number + 1 if (number + 1) % self.columns else None

    def below(self, number: int) -> int | None:
        """Return the number of the tile below; None at the picture's edge."""
        return number + self.columns if number + self.columns < len(self) else None

    def bands(self, number: int) -> dict[str, Area]:
        """Return the bands along the seams of a tile, by side; both tiles of a seam agree on it."""
        x0, y0, x1, y1 = self[number].core
        reach = min(BAND, self.padding)
        bands = {}
        if x0:
            bands["left"] = Area(x0 - reach, y0, min(x0 + reach, self.size.width), y1)
        if x1 < self.size.width:
            bands["right"] = Area(x1 - reach, y0, min(x1 + reach, self.size.width), y1)
        if y0:
            bands["top"] = Area(x0, y0 - reach, x1, min(y0 + reach, self.size.height))
        if y1 < self.size.height:
            bands["bottom"] = Area(x0, y1 - reach, x1, min(y1 + reach, self.size.height))
        return bands

    def _spans(self, index: int, length: int) -> _Spans:
        """Return core and window of the tile `index` along an axis of `length` pixels."""
        start = index * self.tile
        window_length = self.tile + 2 * self.padding
        window_start = max(0, min(start - self.padding, length - window_length))
        return _Spans(
            start,
            min(start + self.tile, length),
            window_start,
            min(window_start + window_length, length),
        )


class _Spans(NamedTuple):
    """Core and window of a tile along one axis."""

    core_start: int
    core_end: int
    window_start: int
    window_end: int
