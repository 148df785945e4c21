"""Contours of masks: the border of every part and hole, simplified within a guaranteed IoU.

A contour runs through the centres of its border pixels (OpenCV's convention), so a reader that
takes contours as areas gets every part half a pixel smaller on all sides: `outlines` are for such
readers. A part that is one pixel wide but bent becomes a contour that runs out and back: it is
rasterised correctly, but has no area of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from sam_poll.core.types import BoolArray, Box, Mask, Size

Polygon: TypeAlias = npt.NDArray[np.float64]  # N×2, x and y, N ≥ 3


Chain: TypeAlias = npt.NDArray[np.int32]  # N×2, every pixel of a border in order


# IoU that a part's polygons must keep when they are drawn again (a requirement of the project)
KEPT = 0.98


EXACT = 0.25  # a smaller tolerance moves nothing on the pixel grid: the border is used unchanged


# Maximum deviation in tolerances: approxPolyDP drops further points of its result within
# tolerance/√2 of their line
STRAY = 1.71


# Above this number of holes OpenCV's tree costs more (400,000: ten times) than numbering the parts,
# which takes 4 bytes a pixel
MANY_HOLES = 4096


# Half-width given to a straight line of pixels; below 0.5, so that rounding restores the line
HALF_LINE = 0.4


@dataclass(frozen=True, slots=True, eq=False)
class Contour:
    """One connected part of a mask (8-connected), with its holes.

    `points` and each of `holes` are N×2 float64 polygons (x, y; N ≥ 3, not closed) in pixels of the
    full picture, through the centres of border pixels; a hole's polygon runs through the set pixels
    around it. `area` counts the part's set pixels in the mask. `box` has edge coordinates (`x1` is
    one more than the last column).
    """

    points: Polygon
    holes: tuple[Polygon, ...]
    area: int
    box: Box


def contours(mask: Mask, *, tolerance_px: float = 1.0, min_area_px: float = 16) -> list[Contour]:
    """Return the connected parts of a mask, largest first.

    `tolerance_px` is the maximum distance of a polygon from its border (Douglas–Peucker in OpenCV's
    version: `STRAY` times that in the worst case, rarely more than once). It is reduced for a part
    where needed for this guarantee: drawn again (`rasterize`), the contours give the mask with IoU
    ≥ 0.98. Parts and holes smaller than `min_area_px` are left out; the mask keeps them, and the
    guarantee is about the rest. A straight line of pixels, even a single pixel, has no polygon of
    three points through its centres: it becomes a narrow rectangle around them.
    """
    parts = [
        _contour(outer, inner, (mask.left, mask.top), tolerance_px, min_area_px)
        for outer, inner in _borders(mask.pixels)
        if filled_area(outer) >= min_area_px
    ]
    # Deterministic: the sort is stable, and OpenCV's order is fixed.
    parts.sort(key=lambda part: (-part.area, part.box.y0, part.box.x0))
    return parts


def rasterize(parts: Sequence[Contour], size: Size, *, left: int = 0, top: int = 0) -> BoolArray:
    """Draw contours, holes left free: bool H×W of `size`.

    (left, top) is the position of the array's upper left corner.
    """
    canvas = np.zeros((size.height, size.width), dtype=np.uint8)
    for part in parts:
        polygons = [
            np.rint(polygon - (left, top)).astype(np.int32)
            for polygon in (part.points, *part.holes)
        ]
        cv2.fillPoly(canvas, polygons, 1)
    return canvas.view(bool)


def _borders(bitmap: BoolArray) -> Iterator[tuple[Chain, list[Chain]]]:
    """Yield the outer border of each part and the borders of its holes, in pixels of the bitmap."""
    outer, inner = border_chains(bitmap)
    if not inner:
        yield from ((chain, []) for chain in outer)
        return
    plane = np.ascontiguousarray(bitmap).view(np.uint8)
    belongs: dict[int, list[Chain]] = {}
    if len(inner) > MANY_HOLES:
        _, numbers = cv2.connectedComponents(plane, connectivity=8, ltype=cv2.CV_32S)
        for chain in inner:
            belongs.setdefault(int(numbers[chain[0, 1], chain[0, 0]]), []).append(chain)
        yield from (
            (chain, belongs.get(int(numbers[chain[0, 1], chain[0, 0]]), [])) for chain in outer
        )
        return
    border_list, tree = cv2.findContours(plane, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    parents = np.asarray(tree).reshape(-1, 4)[:, 3].tolist()
    chains = [np.asarray(chain, dtype=np.int32).reshape(-1, 2) for chain in border_list]
    for chain, parent in zip(chains, parents, strict=True):
        belongs.setdefault(parent, []).append(chain)
    yield from (
        (chains[number], belongs.get(number, []))
        for number, parent in enumerate(parents)
        if parent < 0
    )


def border_chains(bitmap: BoolArray) -> tuple[list[Chain], list[Chain]]:
    """Return the outer borders of all parts, and the borders of all holes."""
    if bitmap.size == 0:
        return [], []
    chains, _ = cv2.findContours(
        np.ascontiguousarray(bitmap).view(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE
    )
    outer: list[Chain] = []
    inner: list[Chain] = []
    for chain in chains:
        points = np.asarray(chain, dtype=np.int32).reshape(-1, 2)
        # OpenCV orients the borders of holes the other way round.
        if cv2.contourArea(points, True) > 0:
            inner.append(points)
        else:
            outer.append(points)
    return outer, inner


def filled_area(outer: Chain) -> int:
    """Return the number of pixels on and inside an outer border, by Pick's theorem.

    A chain contains every lattice point on its way.
    """
    if len(outer) < 2:
        return 1
    return round(cv2.contourArea(outer) + len(outer) / 2) + 1


def _hole_area(inner: Chain) -> int:
    """Return the number of pixels strictly inside a hole's border, by Pick's theorem."""
    return round(cv2.contourArea(inner) - len(inner) / 2) + 1


def _contour(
    outer: Chain, inner: list[Chain], corner: tuple[int, int], tolerance: float, min_area: float
) -> Contour:
    area = filled_area(outer) - sum(_hole_area(chain) for chain in inner)
    kept = sorted(
        (chain for chain in inner if _hole_area(chain) >= min_area),
        key=lambda c: (-_hole_area(c), cv2.boundingRect(c)),
    )
    polygons = _simplified_part([outer, *kept], tolerance)
    x, y, width, height = cv2.boundingRect(outer)
    left, top = corner
    # A narrow rectangle may reach over the picture's left or upper edge, which readers refuse.
    points, *holes = (np.maximum(polygon + np.array([left, top]), 0) for polygon in polygons)
    box = Box(x + left, y + top, x + left + width, y + top + height)
    return Contour(points=points, holes=tuple(holes), area=area, box=box)


def _simplified_part(chains: list[Chain], tolerance: float) -> list[Polygon]:
    """Simplify a part's borders as far as the tolerance and the guarantee allow."""
    while tolerance >= EXACT:
        polygons = [_simplified(chain, tolerance) for chain in chains]
        if _is_surely_exact(chains, tolerance) or _drawn_iou(chains, polygons) >= KEPT:
            return polygons
        tolerance /= 2
    return [_simplified(chain, 0.0) for chain in chains]


def _simplified(chain: Chain, tolerance: float) -> Polygon:
    """Simplify by Douglas–Peucker; a tolerance that leaves fewer than three points is halved."""
    while True:
        points = np.asarray(cv2.approxPolyDP(chain, tolerance, True), dtype=np.int32).reshape(-1, 2)
        if len(points) >= 3:
            return points.astype(np.float64)
        if tolerance < EXACT:
            return _line(points)
        tolerance = tolerance / 2 if tolerance >= 2 * EXACT else 0.0


def _line(points: Chain) -> Polygon:
    """Return a narrow rectangle around one pixel, or around a straight line of pixels."""
    start, end = points[0].astype(np.float64), points[-1].astype(np.float64)
    length = float(np.hypot(*(end - start)))
    along = (end - start) / length * HALF_LINE if length else np.array([HALF_LINE, 0.0])
    # Half of it on a diagonal: the corners must round to the pixels of the line.
    across = np.array([-along[1], along[0]])
    if length and np.all(along):
        along = along / 2
        across = across / 2
    return np.array(
        [start - along - across, end + along - across, end + along + across, start - along + across]
    )


def _is_surely_exact(chains: list[Chain], tolerance: float) -> bool:
    """Return whether the guarantee holds without drawing.

    All changes are within the tolerance, and one pixel of rasterising, of the borders.
    """
    area = filled_area(chains[0]) - sum(_hole_area(chain) for chain in chains[1:])
    reach = STRAY * tolerance + 1
    changed = sum(2 * reach * len(chain) * np.sqrt(2) + np.pi * reach**2 for chain in chains)
    return bool(changed <= (1 - KEPT) * area)


def _drawn_iou(chains: list[Chain], polygons: list[Polygon]) -> float:
    left, top, width, height = cv2.boundingRect(chains[0])
    exact, drawn = np.zeros((2, height, width), dtype=np.uint8)
    cv2.fillPoly(exact, [chain - (left, top) for chain in chains], 1)
    cv2.fillPoly(
        drawn, [np.rint(polygon - (left, top)).astype(np.int32) for polygon in polygons], 1
    )
    return float(np.count_nonzero(exact & drawn) / np.count_nonzero(exact | drawn))
