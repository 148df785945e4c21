"""Coordinates, masks and contours: from the decoder's small logits to full-resolution masks and their polygons.

Masks are made by the very interpolation the official libraries use (bilinear, half-pixel centres, edges clamped,
float32), but only where an object can be, and a few rows at a time: never a float frame of the picture's size.

What can still go wrong here: a logit within float32 rounding of zero may fall on the other side than in torch, whose
sums run in another order. A contour runs through the centres of its border pixels (OpenCV's convention), so a reader
that takes contours as areas sees every part half a pixel smaller all around: `outlines` are for those. A part that is
one pixel wide but bent becomes a contour that runs out and back: it rasterises rightly, but has no area of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from sam_poll.types import Bitmap, Box, Field, Frame, Logits, Mask, Size

Polygon: TypeAlias = npt.NDArray[np.float64]  # N×2, x and y, N ≥ 3
Chain: TypeAlias = npt.NDArray[np.int32]  # N×2, every pixel of a border in turn

KEPT = 0.98  # IoU that a part's polygons must keep when they are drawn again (asked for by the project)
EXACT = 0.25  # a tolerance below this moves nothing on the pixel grid: take the border as it is
STRAY = 1.71  # approxPolyDP drops some points of its result again, if they lie within the tolerance/√2 of their line
STRIP = 16  # rows worked on at a time (at least 2): 0.3 MB at 5,184 columns, so it stays in the processor's cache
QUARTERS = 4  # an outline's points lie on quarters of a pixel: as whole numbers, simplifying them is exact
AT_ONCE = 1 << 14  # border pixels whose outlines are made together: a few MB
COMPARED = 16  # polygons compared together
MANY_HOLES = 4096  # from here on OpenCV's tree costs more (400,000: ten times) than numbering the parts, 4 B a pixel
HALF_LINE = 0.4  # half-width given to a straight line of pixels; below 0.5, so that rounding gives the line back


# -- coordinates -------------------------------------------------------------------------------------------------------


def to_network(points: npt.ArrayLike, frame: Frame) -> npt.NDArray[np.float64]:
    """N×2 points (x, y) of the full picture → N×2 in the network's square, as both official predictors scale them."""
    scale = np.array([frame.region.width / frame.size.width, frame.region.height / frame.size.height])
    return np.asarray(points, dtype=np.float64).reshape(-1, 2) * scale


# -- masks -------------------------------------------------------------------------------------------------------------


def mask_of(logits: Logits, label: str) -> Mask:
    """The full-resolution mask of one object: its logits enlarged to the picture, then cut at > 0.

    Equals torch's `interpolate(…, mode="bilinear", align_corners=False)`, in the official order of steps
    (`Frame.two_step`).
    Memory: the bool crop, plus some rows of float32.
    """
    frame, values = logits.frame, np.asarray(logits.pixels, dtype=np.float32)
    if frame.two_step:
        values = _enlarged(values, frame.side)[: frame.region.height, : frame.region.width]
    found = _bounds(values > 0)
    if found is None:
        return _empty(label, logits.score)
    left, top, width, height = found
    columns = _Axis.of(values.shape[1], frame.size.width).touching(left, left + width)
    rows = _Axis.of(values.shape[0], frame.size.height).touching(top, top + height)
    return _cropped(_positive(values, rows, columns), columns.start, rows.start, label, logits.score)


def tight(bitmap: Bitmap, label: str, score: float) -> Mask:
    """A bool H×W frame of the whole picture → its mask, cut to the set pixels."""
    return _cropped(np.asarray(bitmap, dtype=bool), 0, 0, label, score)


def paste(mask: Mask, size: Size) -> Bitmap:
    """The mask on a full frame, bool H×W. For one mask at a time: a hundred of these cost gigabytes."""
    frame = np.zeros((size.height, size.width), dtype=bool)
    height, width = mask.pixels.shape
    frame[mask.top : mask.top + height, mask.left : mask.left + width] = mask.pixels
    return frame


def iou(a: Mask, b: Mask) -> float:
    """Intersection over union of two masks of one picture; 1.0 for two empty ones."""
    left, top = max(a.left, b.left), max(a.top, b.top)
    right = min(a.left + a.pixels.shape[1], b.left + b.pixels.shape[1])
    bottom = min(a.top + a.pixels.shape[0], b.top + b.pixels.shape[0])
    both = 0
    if right > left and bottom > top:
        seen_a = a.pixels[top - a.top : bottom - a.top, left - a.left : right - a.left]
        seen_b = b.pixels[top - b.top : bottom - b.top, left - b.left : right - b.left]
        both = int(np.count_nonzero(seen_a & seen_b))
    either = a.area + b.area - both
    return both / either if either else 1.0


def _empty(label: str, score: float) -> Mask:
    return Mask(label=label, score=score, left=0, top=0, pixels=np.zeros((0, 0), dtype=bool))


def _bounds(bitmap: Bitmap) -> tuple[int, int, int, int] | None:
    """Left, top, width, height of the set pixels; None where there is none."""
    if bitmap.size == 0:
        return None
    left, top, width, height = cv2.boundingRect(np.ascontiguousarray(bitmap).view(np.uint8))
    return (left, top, width, height) if width else None


def _cropped(bitmap: Bitmap, left: int, top: int, label: str, score: float) -> Mask:
    found = _bounds(bitmap)
    if found is None:
        return _empty(label, score)
    x, y, width, height = found
    pixels = bitmap[y : y + height, x : x + width]
    if pixels.shape != bitmap.shape:
        pixels = pixels.copy()  # a view would keep the larger array alive
    return Mask(label=label, score=score, left=left + x, top=top + y, pixels=np.ascontiguousarray(pixels))


@dataclass(frozen=True, slots=True, eq=False)
class _Axis:
    """Where the output pixels `start, start + 1, …` of one axis lie between the input pixels:
    output = in[low]·(1 − part) + in[high]·part.

    The float32 arithmetic is torch's own (aten/native/UpSample.h, area_pixel_compute_source_index)."""

    start: int
    low: npt.NDArray[np.int64]
    high: npt.NDArray[np.int64]
    part: npt.NDArray[np.float32]

    @classmethod
    def of(cls, length: int, enlarged: int) -> _Axis:
        half = np.float32(0.5)
        scale = np.float32(length) / np.float32(enlarged)
        place = np.maximum(scale * (np.arange(enlarged, dtype=np.float32) + half) - half, np.float32(0))
        low = np.minimum(place.astype(np.int64), length - 1)
        part = np.clip(place - low.astype(np.float32), np.float32(0), np.float32(1))
        return cls(0, low, np.minimum(low + 1, length - 1), part)

    def touching(self, first: int, end: int) -> _Axis:
        """Only the output pixels that take something from the input pixels `first ≤ i < end`: others cannot be set."""
        seen = np.flatnonzero((self.high >= first) & (self.low < end))
        cut = slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(0, 0)
        return _Axis(cut.start, self.low[cut], self.high[cut], self.part[cut])

    def runs(self) -> Iterator[tuple[int, int]]:
        """Start and end of stretches, at most `STRIP` long, of output pixels between the same two input pixels."""
        edges = [0, *(np.flatnonzero(np.diff(self.low)) + 1).tolist(), len(self.low)]
        for start, end in itertools.pairwise(edges):
            for begin in range(start, end, STRIP):
                yield begin, min(begin + STRIP, end)


def _across(values: Field, columns: _Axis) -> Field:
    """h×w → h×columns, interpolated along x."""
    near, far = values[:, columns.low], values[:, columns.high]
    far -= near
    far *= columns.part
    far += near
    return far


def _enlarged(values: Field, side: int) -> Field:
    """h×w → side×side float32: the first of SAM1's two steps (1024×1024: 4 MB)."""
    rows = _Axis.of(values.shape[0], side)
    wide = _across(values, _Axis.of(values.shape[1], side))
    return _across(np.ascontiguousarray(wide.T), rows).T


def _positive(values: Field, rows: _Axis, columns: _Axis) -> Bitmap:
    """Bool rows×columns: where the enlarged values are above 0."""
    if not len(rows.low) or not len(columns.low):
        return np.zeros((0, 0), dtype=bool)
    out = np.empty((len(rows.low), len(columns.low)), dtype=bool)
    first, wide = 0, values[:0]
    for start, end in rows.runs():
        low, high = int(rows.low[start]), int(rows.high[start])
        if high >= first + len(wide):
            first, wide = low, _across(values[low : low + STRIP], columns)
        near, far = wide[low - first], wide[high - first]
        strip = np.multiply.outer(rows.part[start:end], far - near)
        strip += near
        np.greater(strip, 0, out=out[start:end])
    return out


# -- contours ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Contour:
    """One connected part of a mask (8-connected), with its holes.

    `points` and each of `holes` are N×2 float64 polygons (x, y; N ≥ 3, not closed) in pixels of the full picture,
    through the centres of border pixels; a hole's polygon runs through the set pixels around it. `area` counts the
    part's set pixels in the mask. `box` has its edges as everywhere here (`x1` is one more than the last column).
    """

    points: Polygon
    holes: tuple[Polygon, ...]
    area: int
    box: Box


def contours(mask: Mask, *, tolerance_px: float = 1.0, min_area_px: float = 16) -> list[Contour]:
    """The connected parts of a mask, largest first.

    `tolerance_px` is how far a polygon may stray from its border (Douglas–Peucker as OpenCV runs it: `STRAY` times that
    at the very most, seldom more than once). A part gets less where that is needed for the promise: drawn again
    (`rasterize`), the contours give the mask back with IoU ≥ 0.98. Parts and holes smaller than `min_area_px` are left
    out, here only: the mask keeps them, and the promise is about the rest.
    A straight line of pixels, even a single pixel, has no polygon of three points through its centres: it becomes a
    narrow rectangle around them.
    """
    parts = [
        _contour(outer, inner, (mask.left, mask.top), tolerance_px, min_area_px)
        for outer, inner in _borders(mask.pixels)
        if _filled_area(outer) >= min_area_px
    ]
    parts.sort(key=lambda part: (-part.area, part.box.y0, part.box.x0))  # stable, and OpenCV finds in a fixed order
    return parts


def rasterize(parts: Sequence[Contour], size: Size, *, left: int = 0, top: int = 0) -> Bitmap:
    """The contours drawn again, holes left free: bool H×W of `size` with its upper left corner at (left, top)."""
    canvas = np.zeros((size.height, size.width), dtype=np.uint8)
    for part in parts:
        polygons = [np.rint(polygon - (left, top)).astype(np.int32) for polygon in (part.points, *part.holes)]
        cv2.fillPoly(canvas, polygons, 1)
    return canvas.view(bool)


def _borders(bitmap: Bitmap) -> Iterator[tuple[Chain, list[Chain]]]:
    """The outer border of each part with the borders of its holes, in pixels of the bitmap."""
    outer, inner = _chains(bitmap)
    if not inner:
        yield from ((chain, []) for chain in outer)
        return
    plane = np.ascontiguousarray(bitmap).view(np.uint8)
    belongs: dict[int, list[Chain]] = {}
    if len(inner) > MANY_HOLES:
        _, numbers = cv2.connectedComponents(plane, connectivity=8, ltype=cv2.CV_32S)
        for chain in inner:
            belongs.setdefault(int(numbers[chain[0, 1], chain[0, 0]]), []).append(chain)
        yield from ((chain, belongs.get(int(numbers[chain[0, 1], chain[0, 0]]), [])) for chain in outer)
        return
    found, tree = cv2.findContours(plane, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    parents = np.asarray(tree).reshape(-1, 4)[:, 3].tolist()
    chains = [np.asarray(chain, dtype=np.int32).reshape(-1, 2) for chain in found]
    for chain, parent in zip(chains, parents, strict=True):
        belongs.setdefault(parent, []).append(chain)
    yield from ((chains[number], belongs.get(number, [])) for number, parent in enumerate(parents) if parent < 0)


def _chains(bitmap: Bitmap) -> tuple[list[Chain], list[Chain]]:
    """The outer borders of all parts, and the borders of all holes. OpenCV walks the latter the other way round."""
    if bitmap.size == 0:
        return [], []
    found, _ = cv2.findContours(np.ascontiguousarray(bitmap).view(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    outer: list[Chain] = []
    inner: list[Chain] = []
    for chain in found:
        points = np.asarray(chain, dtype=np.int32).reshape(-1, 2)
        (inner if cv2.contourArea(points, True) > 0 else outer).append(points)
    return outer, inner


def _filled_area(outer: Chain) -> int:
    """Pixels on and inside an outer border, by Pick's theorem (a chain steps through every lattice point it meets)."""
    if len(outer) < 2:
        return 1
    return round(cv2.contourArea(outer) + len(outer) / 2) + 1


def _hole_area(inner: Chain) -> int:
    """Pixels strictly inside a hole's border, by Pick's theorem."""
    return round(cv2.contourArea(inner) - len(inner) / 2) + 1


def _contour(outer: Chain, inner: list[Chain], corner: tuple[int, int], tolerance: float, min_area: float) -> Contour:
    area = _filled_area(outer) - sum(_hole_area(chain) for chain in inner)
    kept = sorted(
        (chain for chain in inner if _hole_area(chain) >= min_area), key=lambda c: (-_hole_area(c), cv2.boundingRect(c))
    )
    polygons = _kept_true([outer, *kept], tolerance)
    x, y, width, height = cv2.boundingRect(outer)
    left, top = corner
    # a narrow rectangle may reach over the picture's left or upper edge, which readers refuse
    points, *holes = (np.maximum(polygon + np.array([left, top]), 0) for polygon in polygons)
    box = Box(x + left, y + top, x + left + width, y + top + height)
    return Contour(points=points, holes=tuple(holes), area=area, box=box)


def _kept_true(chains: list[Chain], tolerance: float) -> list[Polygon]:
    """Simplify a part's borders as far as the tolerance and the promise allow."""
    while tolerance >= EXACT:
        polygons = [_simplified(chain, tolerance) for chain in chains]
        if _surely_true(chains, tolerance) or _drawn_iou(chains, polygons) >= KEPT:
            return polygons
        tolerance /= 2
    return [_simplified(chain, 0.0) for chain in chains]


def _simplified(chain: Chain, tolerance: float) -> Polygon:
    """Douglas–Peucker; a tolerance that would leave fewer than three points is halved."""
    while True:
        points = np.asarray(cv2.approxPolyDP(chain, tolerance, True), dtype=np.int32).reshape(-1, 2)
        if len(points) >= 3:
            return points.astype(np.float64)
        if tolerance < EXACT:
            return _line(points)
        tolerance = tolerance / 2 if tolerance >= 2 * EXACT else 0.0


def _line(points: Chain) -> Polygon:
    """A narrow rectangle around one pixel, or a straight line of pixels."""
    start, end = points[0].astype(np.float64), points[-1].astype(np.float64)
    length = float(np.hypot(*(end - start)))
    along = (end - start) / length * HALF_LINE if length else np.array([HALF_LINE, 0.0])
    # on a diagonal, half of it: the corners must round to the pixels of the line
    across = np.array([-along[1], along[0]])
    if length and np.all(along):
        along = along / 2
        across = across / 2
    return np.array([start - along - across, end + along - across, end + along + across, start - along + across])


def _surely_true(chains: list[Chain], tolerance: float) -> bool:
    """Whether no drawing is needed to know that the promise holds: all that can change lies within the tolerance, and
    one pixel of rasterising, of the borders."""
    area = _filled_area(chains[0]) - sum(_hole_area(chain) for chain in chains[1:])
    reach = STRAY * tolerance + 1
    changed = sum(2 * reach * len(chain) * np.sqrt(2) + np.pi * reach**2 for chain in chains)
    return bool(changed <= (1 - KEPT) * area)


def _drawn_iou(chains: list[Chain], polygons: list[Polygon]) -> float:
    left, top, width, height = cv2.boundingRect(chains[0])
    exact, drawn = np.zeros((2, height, width), dtype=np.uint8)
    cv2.fillPoly(exact, [chain - (left, top) for chain in chains], 1)
    cv2.fillPoly(drawn, [np.rint(polygon - (left, top)).astype(np.int32) for polygon in polygons], 1)
    return float(np.count_nonzero(exact & drawn) / np.count_nonzero(exact | drawn))


# -- outlines ----------------------------------------------------------------------------------------------------------


def outlines(mask: Mask, *, tolerance_px: float = 1.0, min_area_px: float = 16) -> list[Polygon]:
    """The outer polygon of each connected part of a mask, largest (with its holes filled) first, for readers that fill
    areas: CVAT, COCO, YOLO. Parts smaller than `min_area_px`, holes filled, are left out.

    N×2 float64 (x, y; N ≥ 3, not closed) in *edge* coordinates of the full picture: pixel (x, y) covers [x, x+1) ×
    [y, y+1), so all lies in [0, W] × [0, H]. The points lie a quarter of a pixel inside the part's true edge: so drawn,
    without simplification, the polygons give the filled part back exactly by readers that ask for a pixel's centre
    (`pycocotools`) as well as by those that draw the border, too (Pillow, `cv2.fillPoly` after cutting the fractions
    off). On the edge itself the latter gain a row and a column, through the centres the former lose them.
    Promise: as `pycocotools` reads it, every part keeps an IoU ≥ 0.98; a part gets less than `tolerance_px` where that
    is needed.
    Memory: about a hundred bytes for each pixel of the border, and the bool crop.
    """
    found = [(_filled_area(outer), outer) for outer in _chains(mask.pixels)[0]]
    found = [(area, outer) for area, outer in found if area >= min_area_px]
    found.sort(key=lambda part: (-part[0], int(part[1][:, 1].min()), int(part[1][:, 0].min())))
    corner = np.array([mask.left, mask.top])
    return [
        points / QUARTERS + corner
        for some in _by_length(found)
        for points in _simple_outlines([area for area, _ in some], _quarter_inside([o for _, o in some]), tolerance_px)
    ]


def _by_length(parts: Sequence[tuple[int, Chain]]) -> Iterator[list[tuple[int, Chain]]]:
    """In turn, as many as have `AT_ONCE` border pixels together: noise has a hundred thousand parts, and each by itself
    would cost many calls of numpy; all together would cost memory."""
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


# The eight neighbours of a pixel, clockwise; the odd ones are its corners. OpenCV walks an outer border so that the
# ground lies counter-clockwise between the pixel before and the pixel after.
_AROUND = np.array([(-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1), (0, 1), (-1, 1)])
_NUMBER = np.zeros((3, 3), dtype=np.int64)
_NUMBER[_AROUND[:, 1] + 1, _AROUND[:, 0] + 1] = np.arange(8)


def _simple_outlines(areas: Sequence[int], exact: list[Chain], tolerance: float) -> list[Chain]:
    """Parts' polygons in quarters of a pixel, each simplified as far as the tolerance and the promise allow."""
    made, left, read = list(exact), list(range(len(exact))), _Read(exact)
    while tolerance >= EXACT and left:
        tried: list[tuple[int, Chain]] = []
        again = []
        for part in left:
            points = np.asarray(cv2.approxPolyDP(exact[part], tolerance * QUARTERS, True), np.int32).reshape(-1, 2)
            changed = 2 * (STRAY * tolerance + 1) * len(exact[part]) * np.sqrt(2)
            if len(points) < 3:
                again.append(part)
            elif len(points) == len(exact[part]) or changed <= (1 - KEPT) * areas[part]:
                made[part] = points
            else:
                tried.append((part, points))
        for (part, points), iou_ in zip(tried, read.ious(tried) if tried else (), strict=True):
            if iou_ >= KEPT:
                made[part] = points
            else:
                again.append(part)
        left, tolerance = sorted(again), tolerance / 2
    return made


def _quarter_inside(chains: Sequence[Chain]) -> list[Chain]:
    """Parts' true edges, moved inwards by a quarter of a pixel, in quarters of a pixel: of each border pixel, the
    corners on the side of the ground, no three of them in a row on one straight line."""
    lengths = np.array([len(chain) for chain in chains])
    pixels = np.concatenate(chains)
    last, following = _neighbours(lengths)
    before, after = pixels[last] - pixels, pixels[following] - pixels
    start, end = _NUMBER[before[:, 1] + 1, before[:, 0] + 1], _NUMBER[after[:, 1] + 1, after[:, 0] + 1]
    sweep = (start - end - 1) % 8 + 1  # back where it came from is a full turn, and so is a pixel by itself
    steps = np.arange(9)
    met = (start[:, None] - steps) % 8
    seen = (steps <= sweep[:, None]) & (met % 2 == 1)
    points = (np.repeat(pixels * QUARTERS + 2, seen.sum(axis=1), axis=0) + _AROUND[met[seen]]).astype(np.int32)
    part = np.repeat(np.repeat(np.arange(len(chains)), lengths), seen.sum(axis=1))
    for bent in (_moves, _turns):
        keep = bent(points, *_neighbours(np.bincount(part)))
        points, part = points[keep], part[keep]
    return np.split(points, np.cumsum(np.bincount(part))[:-1])


def _neighbours(lengths: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of each point of closed lines of these lengths, one after another: where the one before and the one after are."""
    ends = np.cumsum(lengths)
    at = np.arange(ends[-1])
    before, after = at - 1, at + 1
    before[ends - lengths], after[ends - 1] = ends - 1, ends - lengths
    return before, after


def _moves(points: Chain, before: npt.NDArray[np.int64], after: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which points are not the same as the one before."""
    return np.asarray(np.any(points != points[before], axis=1))


def _turns(points: Chain, before: npt.NDArray[np.int64], after: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """At which points closed lines change their direction."""
    into, out = (points - points[before]).astype(np.int64), (points[after] - points).astype(np.int64)
    return np.asarray((into[:, 0] * out[:, 1] != into[:, 1] * out[:, 0]) | (np.sum(into * out, axis=1) < 0))


class _Read:
    """Polygons in quarters of a pixel, as `pycocotools` fills them; by run lengths, no frame is drawn."""

    def __init__(self, exact: Sequence[Chain]) -> None:
        self._exact = exact
        self._starts = np.cumsum([0, *map(len, exact[:-1])])
        together = np.concatenate(exact)
        self._corners = np.minimum.reduceat(together, self._starts) // QUARTERS * QUARTERS
        reach = (np.maximum.reduceat(together, self._starts) - self._corners).max(axis=0)
        self._width, self._height = (reach // QUARTERS + 1).tolist()
        self._filled: dict[int, Any] = {}

    def ious(self, others: Sequence[tuple[int, Chain]]) -> list[float]:
        """IoU of each of these polygons with the exact one of its number. All of a few are compared with one another,
        which is cheaper than asking once for each two."""
        from pycocotools import mask as runs  # whoever asks for contours only need not have it loaded

        new = [part for part, _ in others if part not in self._filled]
        self._filled.update(zip(new, self._fill([(part, self._exact[part]) for part in new]), strict=True))
        filled = self._fill(others)
        found: list[float] = []
        for first in range(0, len(others), COMPARED):
            some = slice(first, first + COMPARED)
            ones = [self._filled[part] for part, _ in others[some]]
            found += runs.iou(ones, filled[some], [False] * len(ones)).diagonal().tolist()
        return found

    def _fill(self, polygons: Sequence[tuple[int, Chain]]) -> list[Any]:
        from pycocotools import mask as runs

        if not polygons:
            return []
        lengths = [len(points) for _, points in polygons]
        corners = np.repeat(self._corners[[part for part, _ in polygons]], lengths, axis=0)
        flat = ((np.concatenate([points for _, points in polygons]) - corners) / QUARTERS).ravel().tolist()
        ends = np.cumsum(lengths).tolist()
        lists = [flat[2 * (end - length) : 2 * end] for end, length in zip(ends, lengths, strict=True)]
        return list(runs.frPyObjects(lists, self._height, self._width))
