"""Outlines of masks: polygons along the outer edges of border pixels.

They are for readers that fill areas; `contours` are for those that connect pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from sam_poll.core.types import Mask
from sam_poll.imaging.contours import (
    EXACT,
    KEPT,
    STRAY,
    Chain,
    Polygon,
    border_chains,
    filled_area,
)

# Points of an outline are multiples of a quarter pixel: simplified as whole numbers, exactly.
QUARTERS = 4


AT_ONCE = 1 << 14  # number of border pixels processed together: a few MB


COMPARED = 16  # number of polygons compared together


def outlines(mask: Mask, *, tolerance_px: float = 1.0, min_area_px: float = 16) -> list[Polygon]:
    """Return the outer polygon of each connected part of a mask, largest (holes filled) first.

    They are for readers that fill areas: CVAT, COCO, YOLO. Parts smaller than `min_area_px`, holes
    filled, are left out.

    N×2 float64 (x, y; N ≥ 3, not closed) in *edge* coordinates of the full picture: pixel (x, y)
    covers [x, x+1) × [y, y+1), so all points are in [0, W] × [0, H]. The points are a quarter of a
    pixel inside the part's true edge: drawn without simplification, the polygons restore the filled
    part exactly both by readers that test a pixel's centre (`pycocotools`) and by those that draw
    the border, too (Pillow, `cv2.fillPoly` after truncating fractions). On the edge itself the
    latter would gain a row and a column, through the centres the former would lose them.

    Guarantee: as `pycocotools` reads it, every part keeps an IoU ≥ 0.98; the tolerance of a part is
    reduced below `tolerance_px` where needed. Memory: about a hundred bytes for each border pixel,
    and the bool crop.
    """
    parts = [(filled_area(outer), outer) for outer in border_chains(mask.pixels)[0]]
    parts = [(area, outer) for area, outer in parts if area >= min_area_px]
    parts.sort(key=lambda part: (-part[0], int(part[1][:, 1].min()), int(part[1][:, 0].min())))
    corner = np.array([mask.left, mask.top])
    return [
        points / QUARTERS + corner
        for some in _by_length(parts)
        for points in _simple_outlines(
            [area for area, _ in some], _quarter_inside([o for _, o in some]), tolerance_px
        )
    ]


def _by_length(parts: Sequence[tuple[int, Chain]]) -> Iterator[list[tuple[int, Chain]]]:
    """Yield groups of parts with about `AT_ONCE` border pixels.

    Noise has a hundred thousand parts: one by one each would cost many calls of numpy, all together
    would cost memory.
    """
    some: list[tuple[int, Chain]] = []
    length = 0
    for part in parts:
        some.append(part)
        length += len(part[1])
        if length >= AT_ONCE:
            yield some
            some, length = [], 0
    if some:
        yield some


# The eight neighbours of a pixel, clockwise; the odd ones are its corners. OpenCV follows an outer
# border so that the background is counter-clockwise between the previous and the next pixel.
_AROUND = np.array([(-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1), (0, 1), (-1, 1)])


_NUMBER = np.zeros((3, 3), dtype=np.int64)


_NUMBER[_AROUND[:, 1] + 1, _AROUND[:, 0] + 1] = np.arange(8)


def _simple_outlines(areas: Sequence[int], exact: list[Chain], tolerance: float) -> list[Chain]:
    """Return the parts' polygons in quarters of a pixel, simplified within the guarantee."""
    simplified = list(exact)
    left = list(range(len(exact)))
    comparison = _Comparison(exact)
    while tolerance >= EXACT and left:
        tried: list[tuple[int, Chain]] = []
        again = []
        for part in left:
            points = np.asarray(
                cv2.approxPolyDP(exact[part], tolerance * QUARTERS, True), np.int32
            ).reshape(-1, 2)
            changed = 2 * (STRAY * tolerance + 1) * len(exact[part]) * np.sqrt(2)
            if len(points) < 3:
                again.append(part)
            elif len(points) == len(exact[part]) or changed <= (1 - KEPT) * areas[part]:
                simplified[part] = points
            else:
                tried.append((part, points))
        ious = comparison.ious(tried) if tried else []
        for (part, points), iou in zip(tried, ious, strict=True):
            if iou >= KEPT:
                simplified[part] = points
            else:
                again.append(part)
        left, tolerance = sorted(again), tolerance / 2
    return simplified


def _quarter_inside(chains: Sequence[Chain]) -> list[Chain]:
    """Return the parts' true edges, moved inwards by a quarter of a pixel, in quarters of a pixel.

    They consist of the corners of border pixels on the side of the background, without points on
    straight lines.
    """
    lengths = np.array([len(chain) for chain in chains])
    pixels = np.concatenate(chains)
    last, following = _neighbours(lengths)
    before, after = pixels[last] - pixels, pixels[following] - pixels
    start = _NUMBER[before[:, 1] + 1, before[:, 0] + 1]
    end = _NUMBER[after[:, 1] + 1, after[:, 0] + 1]
    # Going back is a full turn, and so is a single pixel.
    sweep = (start - end - 1) % 8 + 1
    steps = np.arange(9)
    met = (start[:, None] - steps) % 8
    seen = (steps <= sweep[:, None]) & (met % 2 == 1)
    points = (
        np.repeat(pixels * QUARTERS + 2, seen.sum(axis=1), axis=0) + _AROUND[met[seen]]
    ).astype(np.int32)
    part = np.repeat(np.repeat(np.arange(len(chains)), lengths), seen.sum(axis=1))
    for bent in (_moves, _turns):
        keep = bent(points, *_neighbours(np.bincount(part)))
        points, part = points[keep], part[keep]
    return np.split(points, np.cumsum(np.bincount(part))[:-1])


def _neighbours(
    lengths: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the indices of the previous and the next point of each point of closed lines.

    `lengths` are those of the lines, which follow one another.
    """
    ends = np.cumsum(lengths)
    at = np.arange(ends[-1])
    before, after = at - 1, at + 1
    before[ends - lengths], after[ends - 1] = ends - 1, ends - lengths
    return before, after


def _moves(
    points: Chain, before: npt.NDArray[np.int64], after: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Return which points differ from the previous one."""
    return np.asarray(np.any(points != points[before], axis=1))


def _turns(
    points: Chain, before: npt.NDArray[np.int64], after: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Return at which points closed lines change direction."""
    into = (points - points[before]).astype(np.int64)
    out = (points[after] - points).astype(np.int64)
    return np.asarray(
        (into[:, 0] * out[:, 1] != into[:, 1] * out[:, 0]) | (np.sum(into * out, axis=1) < 0)
    )


class _Comparison:
    """Compares polygons in quarters of a pixel as `pycocotools` fills them, by run lengths."""

    def __init__(self, exact: Sequence[Chain]) -> None:
        self._exact = exact
        self._starts = np.cumsum([0, *map(len, exact[:-1])])
        together = np.concatenate(exact)
        self._corners = np.minimum.reduceat(together, self._starts) // QUARTERS * QUARTERS
        reach = (np.maximum.reduceat(together, self._starts) - self._corners).max(axis=0)
        self._width, self._height = (reach // QUARTERS + 1).tolist()
        self._filled: dict[int, Any] = {}

    def ious(self, others: Sequence[tuple[int, Chain]]) -> list[float]:
        """Return the IoU of each of these polygons with the exact one of its number.

        Groups of `COMPARED` are compared each with each, which is cheaper than a call for each
        pair.
        """
        from pycocotools import mask as runs  # not needed for contours

        new = [part for part, _ in others if part not in self._filled]
        self._filled.update(
            zip(new, self._fill([(part, self._exact[part]) for part in new]), strict=True)
        )
        filled = self._fill(others)
        ious: list[float] = []
        for first in range(0, len(others), COMPARED):
            some = slice(first, first + COMPARED)
            ones = [self._filled[part] for part, _ in others[some]]
            ious += runs.iou(ones, filled[some], [False] * len(ones)).diagonal().tolist()
        return ious

    def _fill(self, polygons: Sequence[tuple[int, Chain]]) -> list[Any]:
        from pycocotools import mask as runs

        if not polygons:
            return []
        lengths = [len(points) for _, points in polygons]
        corners = np.repeat(self._corners[[part for part, _ in polygons]], lengths, axis=0)
        flat = (
            ((np.concatenate([points for _, points in polygons]) - corners) / QUARTERS)
            .ravel()
            .tolist()
        )
        ends = np.cumsum(lengths).tolist()
        lists = [
            flat[2 * (end - length) : 2 * end] for end, length in zip(ends, lengths, strict=True)
        ]
        return list(runs.frPyObjects(lists, self._height, self._width))
