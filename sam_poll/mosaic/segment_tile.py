"""Segmentation of one tile: automatic masks in one or several passes, or finds of texts, as labels.

Masks are painted in the order of their quality, and each gets those of its pixels that are still
free. The quality is the predicted IoU times the fraction of the mask that its largest connected
piece is: where a network takes several objects for one, its predicted IoU is no lower. The first
pass clicks on a grid over the whole window. Further passes click on denser grids, only where there
is no label yet, and with lower thresholds once a pass adds little.

The objects of each text have labels of their own, so that objects of two texts may overlap. Among
those of one text the one with the higher score gets the pixels first.

Limitations: a mask with a higher predicted IoU takes pixels from one that fits better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import cv2
import numpy as np
import numpy.typing as npt

from sam_poll.core.protocols import Engine
from sam_poll.core.types import (
    AutomaticMaskRequest,
    BoolArray,
    ConceptRequest,
    Mask,
    Picture,
    RgbArray,
    Size,
)
from sam_poll.imaging import automatic_masks, found_objects

Numbers = npt.NDArray[np.uint16]

# Largest number of labels in one tile. With 100 pixels each they need more than six million pixels.
MAX_LABELS = np.iinfo(np.uint16).max
# Fraction of a mask that must be free when it is painted. Less is a rim around better masks.
FREE = 0.5
# Fraction of the tile that a pass must add. After a smaller gain the thresholds are lowered.
STALL = 0.01
# Smallest size of a further piece of a mask that becomes an object of its own, as a fraction of the
# largest piece.
PIECE = 0.25
RELAX = 0.1  # by which both thresholds are lowered
LOWEST = 0.5  # the lowest threshold
DENSER = 2  # density of a pass's grid relative to the pass before
DENSEST = 4  # the highest density relative to the first pass


@dataclass(frozen=True, slots=True)
class Passes:
    """The passes over a tile.

    `first` is the request of the first pass, `passes` the largest number of passes,
    `target_coverage` the fraction of the tile's valid pixels at which no further pass follows. The
    names of the fields are part of job.json and stats.json.
    """

    first: AutomaticMaskRequest
    passes: int = 1
    target_coverage: float = 0.95


@dataclass(frozen=True, slots=True, eq=False)
class Labelled:
    """The labels of a window.

    `numbers` is uint16, H×W: 0 is no object, n the n-th object, whose predicted IoU is
    `scores[n-1]`.
    """

    numbers: Numbers
    scores: npt.NDArray[np.float32]


def label_window(
    engine: Engine,
    pixels: RgbArray,
    valid: BoolArray,
    passes: Passes,
    core: tuple[slice, slice],
    *,
    on_step: Callable[[], None] = lambda: None,
) -> Labelled:
    """Return the labels of the objects in one window. Call it on the device thread.

    `pixels` is RGB, uint8, H×W×3. Only pixels that are `valid` (bool, H×W) get labels. The coverage
    that ends the passes is that of the `core`, given as rows and columns. `on_step` is called
    before each call of the network.
    """
    height, width = valid.shape
    [embedding] = engine.encode([engine.prepare(Picture(pixels, Size(width, height), "tile"))])
    numbers = np.zeros((height, width), np.uint16)
    scores: list[float] = []
    request = passes.first
    density = 1
    coverage_before = 0.0
    for _ in range(passes.passes):
        free = valid & (numbers == 0)
        dense_request = replace(request, points_per_side=request.points_per_side * density)
        candidates = automatic_masks.segment(
            engine, embedding, dense_request, wanted=partial(_set_at, free), on_step=on_step
        )
        masks = automatic_masks.masks(candidates, dense_request)
        _paint(numbers, valid, scores, masks, dense_request.min_area)
        coverage_now = coverage(numbers[core], valid[core])
        if coverage_now >= passes.target_coverage:
            break
        if coverage_now - coverage_before < STALL:
            lowered = replace(
                request, iou=_lowered(request.iou), stability=_lowered(request.stability)
            )
            if density == DENSEST and lowered == request:
                break  # neither a denser grid nor lower thresholds are left to try
            request = lowered
        coverage_before = coverage_now
        density = min(density * DENSER, DENSEST)
    return Labelled(numbers, np.array(scores, np.float32))


def label_texts(
    engine: Engine,
    pixels: RgbArray,
    valid: BoolArray,
    concept: ConceptRequest,
    *,
    on_step: Callable[[], None] = lambda: None,
) -> list[Labelled]:
    """Return the labels of the objects of each text in one window. Call it on the device thread.

    `pixels`, `valid` and `on_step` are as for `label_window`. All objects above the threshold are
    kept, whatever `concept.max_objects` is: it is a limit for a picture, not for a tile. Raises
    PromptError where the engine cannot take the texts.
    """
    height, width = valid.shape
    request = replace(concept, max_objects=MAX_LABELS)
    [embedding] = engine.encode([engine.prepare(Picture(pixels, Size(width, height), "tile"))])
    found = found_objects.search(engine, embedding, request, on_step=on_step)
    labelled = []
    for text in concept.texts:
        numbers = np.zeros((height, width), np.uint16)
        scores: list[float] = []
        for one in found.objects:  # best first
            if one.label == text:
                [mask] = found_objects.masks([one], on_step=on_step)
                _paint_whole(numbers, valid, scores, mask)
        labelled.append(Labelled(numbers, np.array(scores, np.float32)))
    return labelled


def coverage(numbers: npt.NDArray[np.unsignedinteger], valid: BoolArray) -> float:
    """Return the fraction of the valid pixels that have a label; 1 where no pixel is valid."""
    valid_px = int(np.count_nonzero(valid))
    return int(np.count_nonzero(numbers)) / valid_px if valid_px else 1.0


def _set_at(bitmap: BoolArray, x: float, y: float) -> bool:
    return bool(bitmap[int(y), int(x)])


def _lowered(threshold: float) -> float:
    return min(threshold, max(LOWEST, round(threshold - RELAX, 6)))


def _paint_whole(numbers: Numbers, valid: BoolArray, scores: list[float], mask: Mask) -> None:
    """Paint the free pixels of a found object, all its pieces as one label.

    It is left out where no more than half of it is free. The pieces stay together: the network
    has found them as one object, such as a tree behind a pole.
    """
    height, width = mask.pixels.shape
    area = slice(mask.top, mask.top + height), slice(mask.left, mask.left + width)
    valid_part = mask.pixels & valid[area]
    free = valid_part & (numbers[area] == 0)
    if np.count_nonzero(free) > FREE * np.count_nonzero(valid_part) and len(scores) < MAX_LABELS:
        scores.append(mask.score)
        numbers[area][free] = len(scores)


def _paint(
    numbers: Numbers, valid: BoolArray, scores: list[float], masks: Sequence[Mask], min_area: int
) -> None:
    """Paint the free pixels of each mask, the best mask first, if more than half of it is free.

    `masks` are sorted by predicted IoU. Of a mask's connected pieces only the largest is painted:
    the network sometimes takes two objects for one, and another mask shows the other object. But
    pieces at the window's edge may be the ends of one object that continues outside. They get
    labels of their own, which the seams join if they are one object.
    """
    for mask in sorted(masks, key=lambda mask: -mask.score * _largest_fraction(mask)):
        height, width = mask.pixels.shape
        area = slice(mask.top, mask.top + height), slice(mask.left, mask.left + width)
        valid_part = mask.pixels & valid[area]
        free = valid_part & (numbers[area] == 0)
        if not np.count_nonzero(free) > FREE * np.count_nonzero(valid_part):
            continue
        _, pieces, stats, _ = cv2.connectedComponentsWithStats(free.view(np.uint8), connectivity=4)
        sizes = stats[:, cv2.CC_STAT_AREA]
        sizes[0] = 0  # the background
        min_size = max(1, min_area, PIECE * sizes.max())
        for piece in np.flatnonzero(sizes >= min_size).tolist():
            box = stats[piece] + (mask.left, mask.top, 0, 0, 0)
            if (piece == sizes.argmax() or _at_edge(box, numbers.shape)) and len(
                scores
            ) < MAX_LABELS:
                scores.append(mask.score)
                numbers[area][pieces == piece] = len(scores)


def _largest_fraction(mask: Mask) -> float:
    """Return the fraction of a mask's pixels that are in its largest connected piece."""
    pixels = np.ascontiguousarray(mask.pixels).view(np.uint8)
    sizes = cv2.connectedComponentsWithStats(pixels, connectivity=4)[2][1:, cv2.CC_STAT_AREA]
    return float(sizes.max() / sizes.sum()) if len(sizes) else 0.0


def _at_edge(box: npt.NDArray[np.int32], shape: tuple[int, ...]) -> bool:
    """Return whether a box (left, top, width, height, …) touches the edge of the window."""
    left, top, width, height = box[:4].tolist()
    return left == 0 or top == 0 or left + width == shape[1] or top + height == shape[0]
