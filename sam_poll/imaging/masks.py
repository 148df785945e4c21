"""Convert the decoder's small logits to full-resolution masks.

Masks are made by the interpolation of the official libraries (bilinear, half-pixel centres, edges
clamped, float32), but only where an object can be, and a few rows at a time: there is never a float
array of the picture's size.

Limitations: a logit within float32 rounding of zero may get the other sign than in torch, whose
sums have another order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from sam_poll.core.types import BoolArray, FloatArray, InputTransform, Logits, Mask, Size

# Rows processed at a time (at least 2): 0.3 MB at 5,184 columns, which stays in the CPU's cache
STRIP = 16


# -- coordinates --------------------


def to_network(points: npt.ArrayLike, frame: InputTransform) -> npt.NDArray[np.float64]:
    """Scale N×2 points (x, y) of the full picture to the network's square.

    The scaling is that of the official predictors.
    """
    scale = np.array(
        [frame.region.width / frame.size.width, frame.region.height / frame.size.height]
    )
    scaled: npt.NDArray[np.float64] = np.asarray(points, dtype=np.float64).reshape(-1, 2) * scale
    return scaled


# -- masks --------------------


def mask_of(logits: Logits, label: str) -> Mask:
    """Return the full-resolution mask of one object: its logits, enlarged and cut at > 0.

    Equals torch's `interpolate(…, mode="bilinear", align_corners=False)`, in the official order of
    steps (`InputTransform.two_step`). Memory: the bool crop, and some rows of float32.
    """
    frame, values = logits.frame, np.asarray(logits.pixels, dtype=np.float32)
    if frame.two_step:
        values = _enlarged(values, frame.side)[: frame.region.height, : frame.region.width]
    bounds = _bounds(values > 0)
    if bounds is None:
        return _empty(label, logits.score)
    left, top, width, height = bounds
    columns = _Axis.of(values.shape[1], frame.size.width).touching(left, left + width)
    rows = _Axis.of(values.shape[0], frame.size.height).touching(top, top + height)
    return _cropped(
        _positive(values, rows, columns), columns.start, rows.start, label, logits.score
    )


def tight(bitmap: BoolArray, label: str, score: float) -> Mask:
    """Convert a bool H×W array of the whole picture to a mask, cropped to the set pixels."""
    return _cropped(np.asarray(bitmap, dtype=bool), 0, 0, label, score)


def paste(mask: Mask, size: Size) -> BoolArray:
    """Return the mask as a bool H×W array of the whole picture.

    For one mask at a time: a hundred of these take gigabytes.
    """
    frame = np.zeros((size.height, size.width), dtype=bool)
    height, width = mask.pixels.shape
    frame[mask.top : mask.top + height, mask.left : mask.left + width] = mask.pixels
    return frame


def column_runs(mask: Mask, size: Size) -> list[int]:
    """Return the alternating run lengths of the whole picture, column by column, zeros first.

    Their sum is H·W. They are made from the runs of the crop: memory is about that of the crop,
    never that of the picture.
    """
    height, width = mask.pixels.shape
    columns = np.zeros((width, height + 1), np.int8)  # a zero below each column ends its last run
    columns[:, :height] = mask.pixels.T
    steps = np.diff(columns.ravel(), prepend=0)
    at = np.flatnonzero(steps)  # alternately the beginning and the end of a run of ones
    column, row = np.divmod(at, height + 1)
    edges = (mask.left + column) * size.height + mask.top + row
    # A run up to the picture's last row and one from the next column's first row are one run.
    joined = np.flatnonzero(edges[1:-1:2] == edges[2::2]) * 2 + 1
    edges = np.delete(edges, np.concatenate([joined, joined + 1]))
    runs: list[int] = np.diff(edges, prepend=0, append=size.width * size.height).tolist()
    return runs if runs[-1] else runs[:-1]


def iou(a: Mask, b: Mask) -> float:
    """Return the intersection over union of two masks of one picture; 1.0 for two empty ones."""
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


class _Bounds(NamedTuple):
    """The bounding box of the set pixels of a bitmap."""

    left: int
    top: int
    width: int
    height: int


def _bounds(bitmap: BoolArray) -> _Bounds | None:
    """Return the bounding box of the set pixels; None without any."""
    if bitmap.size == 0:
        return None
    left, top, width, height = cv2.boundingRect(np.ascontiguousarray(bitmap).view(np.uint8))
    return _Bounds(left, top, width, height) if width else None


def _cropped(bitmap: BoolArray, left: int, top: int, label: str, score: float) -> Mask:
    bounds = _bounds(bitmap)
    if bounds is None:
        return _empty(label, score)
    x, y, width, height = bounds
    pixels = bitmap[y : y + height, x : x + width]
    if pixels.shape != bitmap.shape:
        pixels = pixels.copy()  # a view would keep the whole array alive
    return Mask(
        label=label, score=score, left=left + x, top=top + y, pixels=np.ascontiguousarray(pixels)
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Axis:
    """The interpolation of one axis, for the output pixels `start, start + 1, …`.

    output = in[low]·(1 − part) + in[high]·part. The float32 arithmetic is that of torch
    (aten/native/UpSample.h, area_pixel_compute_source_index).
    """

    start: int
    low: npt.NDArray[np.int64]
    high: npt.NDArray[np.int64]
    part: npt.NDArray[np.float32]

    @classmethod
    def of(cls, length: int, enlarged: int) -> _Axis:
        half = np.float32(0.5)
        scale = np.float32(length) / np.float32(enlarged)
        place = np.maximum(
            scale * (np.arange(enlarged, dtype=np.float32) + half) - half, np.float32(0)
        )
        low = np.minimum(place.astype(np.int64), length - 1)
        part = np.clip(place - low.astype(np.float32), np.float32(0), np.float32(1))
        return cls(0, low, np.minimum(low + 1, length - 1), part)

    def touching(self, first: int, end: int) -> _Axis:
        """Return the part of the axis whose output pixels use an input pixel `first ≤ i < end`.

        Others cannot be set.
        """
        seen = np.flatnonzero((self.high >= first) & (self.low < end))
        cut = slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(0, 0)
        return _Axis(cut.start, self.low[cut], self.high[cut], self.part[cut])

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield start and end of runs of output pixels between the same two input pixels.

        Runs are at most `STRIP` long.
        """
        edges = [0, *(np.flatnonzero(np.diff(self.low)) + 1).tolist(), len(self.low)]
        for start, end in itertools.pairwise(edges):
            for begin in range(start, end, STRIP):
                yield begin, min(begin + STRIP, end)


def _across(values: FloatArray, columns: _Axis) -> FloatArray:
    """Interpolate along x: h×w → h×columns."""
    near, far = values[:, columns.low], values[:, columns.high]
    far -= near
    far *= columns.part
    far += near
    return far


def _enlarged(values: FloatArray, side: int) -> FloatArray:
    """Enlarge h×w to side×side float32: the first of SAM1's two steps (1024×1024: 4 MB)."""
    rows = _Axis.of(values.shape[0], side)
    wide = _across(values, _Axis.of(values.shape[1], side))
    return _across(np.ascontiguousarray(wide.T), rows).T


def _positive(values: FloatArray, rows: _Axis, columns: _Axis) -> BoolArray:
    """Return bool rows×columns: where the enlarged values are above 0."""
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
