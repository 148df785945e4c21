"""One tile: everything mode in one or several passes, each on what the ones before have left empty.

The masks come best first, and each takes what is still free of it. The best is the one with the highest predicted IoU,
times the part of it that hangs together: a network that has taken several things for one is as sure of itself as ever.
The first pass clicks on a grid over the whole window; further ones on denser grids, only where nothing is yet, and with
lower thresholds once that finds no more.

What can still go wrong here: a mask with a higher predicted IoU takes pixels from one that fits better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import cv2
import numpy as np
import numpy.typing as npt

from sam_poll import everything
from sam_poll.types import Bitmap, Engine, Everything, Mask, Picture, Pixels, Size

Numbers = npt.NDArray[np.uint16]

MOST = np.iinfo(np.uint16).max  # labels in one tile; of 100 pixels each they need more than six million
FREE = 0.5  # of a mask that must still be free when its turn comes: less is a rim around better ones
STALL = 0.01  # of the tile that a pass must add, or the next one asks for less
PIECE = 0.25  # of a mask's largest piece, below which another one is no thing of its own
RELAX, LOWEST = 0.1, 0.5  # by how much thresholds go down when nothing more is found, and not further than that
DENSER, DENSEST = 2, 4  # a further pass has a grid twice as dense as the one before, up to four times the first


@dataclass(frozen=True, slots=True)
class Passes:
    """What is asked for in the first pass, how many there may be, and the part of a tile at which it is enough."""

    first: Everything
    passes: int = 1
    target_coverage: float = 0.95


@dataclass(frozen=True, slots=True, eq=False)
class Labelled:
    """`numbers`: uint16 H×W, 0 is nothing, n the n-th object, whose predicted IoU is `scores[n-1]`."""

    numbers: Numbers
    scores: npt.NDArray[np.float32]


def labelled(
    engine: Engine,
    pixels: Pixels,
    valid: Bitmap,
    wish: Passes,
    core: tuple[slice, slice],
    *,
    between: Callable[[], None] = lambda: None,
) -> Labelled:
    """The objects of one window (uint8 H×W×3), numbered. Only `valid` pixels (bool H×W) are labelled; the coverage that
    ends the passes is that of the `core`. On the device thread. `between` is called before each call of the network."""
    height, width = valid.shape
    [embedding] = engine.encode([engine.prepare(Picture(pixels, Size(width, height), "tile"))])
    numbers = np.zeros((height, width), np.uint16)
    scores: list[float] = []
    asked, dense, before = wish.first, 1, 0.0
    for _ in range(wish.passes):
        free = valid & (numbers == 0)
        pass_ = replace(asked, points_per_side=asked.points_per_side * dense)
        candidates = everything.segment(engine, embedding, pass_, wanted=partial(_set_at, free), between=between)
        found = everything.masks(candidates, pass_)
        _paint(numbers, valid, scores, found, pass_.min_area)
        now = coverage(numbers[core], valid[core])
        if now >= wish.target_coverage:
            break
        if now - before < STALL:
            lower = replace(asked, iou=_relaxed(asked.iou), stability=_relaxed(asked.stability))
            if dense == DENSEST and lower == asked:
                break  # nothing is left that could be asked for
            asked = lower
        before, dense = now, min(dense * DENSER, DENSEST)
    return Labelled(numbers, np.array(scores, np.float32))


def coverage(numbers: npt.NDArray[np.unsignedinteger], valid: Bitmap) -> float:
    """The part of the valid pixels that have a label; 1 where none is valid."""
    there = int(np.count_nonzero(valid))
    return int(np.count_nonzero(numbers)) / there if there else 1.0


def _set_at(bitmap: Bitmap, x: float, y: float) -> bool:
    return bool(bitmap[int(y), int(x)])


def _relaxed(threshold: float) -> float:
    return min(threshold, max(LOWEST, round(threshold - RELAX, 6)))


def _paint(numbers: Numbers, valid: Bitmap, scores: list[float], masks: Sequence[Mask], min_area: int) -> None:
    """Give each mask, the best first, what is free of it, if that is more than half. `masks` come by predicted IoU.

    Of several pieces the largest counts: the network takes two things for one now and then, and another mask has the
    other one. But pieces at the window's edge may be the ends of one thing behind it. They become labels of their own,
    which the seams join if they are.
    """
    for mask in sorted(masks, key=lambda mask: -mask.score * _whole(mask)):
        height, width = mask.pixels.shape
        where = slice(mask.top, mask.top + height), slice(mask.left, mask.left + width)
        there = mask.pixels & valid[where]
        free = there & (numbers[where] == 0)
        if not np.count_nonzero(free) > FREE * np.count_nonzero(there):
            continue
        _, parts, stats, _ = cv2.connectedComponentsWithStats(free.view(np.uint8), connectivity=4)
        sizes = stats[:, cv2.CC_STAT_AREA]
        sizes[0] = 0
        least = max(1, min_area, PIECE * sizes.max())
        for part in np.flatnonzero(sizes >= least).tolist():
            whole = stats[part] + (mask.left, mask.top, 0, 0, 0)
            if (part == sizes.argmax() or _at_edge(whole, numbers.shape)) and len(scores) < MOST:
                scores.append(mask.score)
                numbers[where][parts == part] = len(scores)


def _whole(mask: Mask) -> float:
    """The part of a mask that its largest piece is."""
    pixels = np.ascontiguousarray(mask.pixels).view(np.uint8)
    sizes = cv2.connectedComponentsWithStats(pixels, connectivity=4)[2][1:, cv2.CC_STAT_AREA]
    return float(sizes.max() / sizes.sum()) if len(sizes) else 0.0


def _at_edge(box: npt.NDArray[np.int32], shape: tuple[int, ...]) -> bool:
    left, top, width, height = box[:4].tolist()
    return left == 0 or top == 0 or left + width == shape[1] or top + height == shape[0]
