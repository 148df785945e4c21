"""Rough shapes of prompts as the network's mask input: logits at the decoder's low resolution.

SAM's prompt encoder takes the logits of an earlier prediction, as they leave the decoder: SAM 1
pads them as it pads the picture, SAM 2 stretches them. A mask that a person has drawn becomes
logits as in SAM 2's own video predictor, which takes such masks: 20 × mask - 10, so that inside is
10 and outside -10 (`SAM2Base._use_mask_as_output`), averaged down from the network's input
(antialiased) to a quarter of it.

Limitations: what is smaller than a cell of the low resolution (about a 256th of the picture's
longer side) is a single cell there.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from sam_poll.core.types import FloatArray, InputTransform, Polygon, RunLengths
from sam_poll.imaging.masks import to_network
from sam_poll.prompts import run_lengths

# The logit inside a shape, and minus that outside (sam2.modeling.sam2_base)
INSIDE = 10.0
_FRACTION_BITS = 8  # of coordinates in `cv2.fillPoly`
_SET = 255


def mask_input(shape: Polygon | RunLengths, frame: InputTransform, side: int) -> FloatArray:
    """Return a shape as logits, float32, side × side, -10 to 10.

    `frame` says where the picture is in the network's input; `side` is that of the mask input, a
    quarter of the network's. The padding of SAM 1 is outside. Memory: about 10 bytes for each pixel
    of the network's input, whatever the picture's size.

    The cell that a shape covers most is inside, so that one that is thinner than any cell, which
    would only say that nothing is there, counts as well.
    """
    square = np.zeros((frame.side, frame.side), dtype=np.uint8)
    if isinstance(shape, Polygon):
        _fill(square, shape, frame)
    else:
        _sample(square, shape, frame)
    covered = cv2.resize(square, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32)
    most = float(covered.max())
    if most:
        covered /= most
    logits: FloatArray = covered * np.float32(2 * INSIDE) - np.float32(INSIDE)
    return logits


def _fill(square: npt.NDArray[np.uint8], polygon: Polygon, frame: InputTransform) -> None:
    """Set the pixels of the network's input that a polygon covers or touches."""
    # In OpenCV the centre of the first pixel is 0, in coordinates of edges 0.5.
    corners = (to_network(polygon.points, frame) - 0.5) * (1 << _FRACTION_BITS)
    region = square[: frame.region.height, : frame.region.width]
    filled = np.zeros_like(region)
    cv2.fillPoly(filled, [np.round(corners).astype(np.int32)], (_SET,), shift=_FRACTION_BITS)
    region[:] = filled


def _sample(square: npt.NDArray[np.uint8], mask: RunLengths, frame: InputTransform) -> None:
    """Set the pixels of the network's input whose centre is in a mask; if none is, the nearest."""
    (width, height), region = mask.size, frame.region
    box = run_lengths.bounds(mask)
    # The picture's pixel at the centre of each pixel of the region
    xs = (2 * np.arange(region.width) + 1) * width // (2 * region.width)
    ys = (2 * np.arange(region.height) + 1) * height // (2 * region.height)
    columns = np.flatnonzero((box.x0 <= xs) & (xs < box.x1))
    rows = np.flatnonzero((box.y0 <= ys) & (ys < box.y1))
    starts, ends = run_lengths.inside(mask)
    pixels = xs[columns][:, None] * height + ys[rows]
    run = np.searchsorted(starts, pixels, side="right") - 1
    inside = (run >= 0) & (pixels < ends[run])
    square[np.ix_(rows, columns)] = np.where(inside.T, np.uint8(_SET), np.uint8(0))
    if not inside.any():
        x, y = np.divmod(starts, height)
        square[y * region.height // height, x * region.width // width] = _SET
