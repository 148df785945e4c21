"""Automatic mask generation: a grid of clicks becomes the masks of everything in a picture.

The steps are those of the libraries' automatic mask generators: a grid of points, three masks each,
filters by predicted IoU and stability, removal of masks with nearly the same box, removal of small
holes and islands. The difference: all of that is decided at the decoder's low resolution, where
boxes and areas are computed as the enlarged mask will have them, and candidates are stored packed,
so memory does not grow with the picture.

Limitations: masks may overlap, a part and its whole are both found, and an object without a grid
point is missed. Where candidates take more than `ROOM_BYTES`, one may be removed because of another
that is removed later itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import cv2
import numpy as np
import numpy.typing as npt

from sam_poll.core.errors import InputError
from sam_poll.core.protocols import Embedding, Engine
from sam_poll.core.types import (
    AutomaticMaskRequest,
    BoolArray,
    Box,
    FloatArray,
    InputTransform,
    Logits,
    Mask,
    PackedMask,
    Picture,
    Size,
)
from sam_poll.imaging import masks as geometry

# IoU of two boxes above which the lesser mask is removed: box_nms_thresh and crop_nms_thresh of the
# libraries
SAME_BOX = 0.7
# Overlap of crops as a fraction of the picture's short side: crop_overlap_ratio of the libraries
OVERLAP = 512 / 1500
# A mask that ends this close to a crop's edge is cut off by it: is_box_near_crop_edge of the
# libraries
NEAR_PX = 20
# Points passed to the engine in one call; between two calls heartbeats and stop signals are
# handled. A CPU may need some tenths of a second for each point.
POINTS_A_CALL, CPU_POINTS_A_CALL = 64, 16
# Size of the packed candidates above which those with the same box are removed early
ROOM_BYTES = 256 << 20
FAR = np.float32(32)  # a logit that is certainly in, or out: the networks clamp theirs to it
# Pixels of the low resolution around an edge whose values matter when it is enlarged, even twice
_REACH = 2
_AROUND = np.ones((2 * _REACH + 1, 2 * _REACH + 1), np.uint8)

Boxes = npt.NDArray[np.float64]  # N×4: x0, y0, x1, y1
Points = list[tuple[float, float]]


# ── on the device thread ──


def segment(
    engine: Engine,
    embedding: Embedding,
    request: AutomaticMaskRequest,
    *,
    picture: Picture | None = None,
    wanted: Callable[[float, float], bool] | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> list[PackedMask]:
    """Return the masks of everything in an encoded picture, packed, highest predicted IoU first.

    `masks` unpacks them. Called on the device thread. `picture` is needed for `request.crops`; the
    crops are encoded here, one after another. `wanted` returns whether to click at a grid point, x
    and y in the picture's pixels; None: at all. `on_step` is called before each call of the
    network; an error it raises ends the work.
    """
    size = embedding.frame.size
    clicks = _wanted(grid(request.points_per_side, size), (0, 0), wanted)
    candidates = _of_one(engine, embedding, clicks, request, on_step)
    if not request.crops:
        return candidates
    if picture is None:
        raise InputError(
            "crops need the picture itself", place="everything.crops", remedy="set it to 0"
        )
    for crop in crop_boxes(size, request.crops, _shrunk(picture)):
        on_step()
        x0, y0, x1, y1 = crop
        clicks = _wanted(grid(request.points_per_side, Size(x1 - x0, y1 - y0)), (x0, y0), wanted)
        if clicks:
            [embedding] = engine.encode([engine.prepare(_cut(picture, crop))])
            placed = partial(_placed, crop=crop, size=size)
            candidates += _of_one(engine, embedding, clicks, request, on_step, placed)
    # Masks of smaller crops are more detailed and are preferred, as in the libraries.
    order = sorted(range(len(candidates)), key=lambda index: _frame_area(candidates[index]))
    kept = [candidates[index] for index in distinct(_boxes(candidates), order)]
    return sorted(kept, key=lambda candidate: -candidate.score)


def grid(points_per_side: int, size: Size) -> Points:
    """Return the centres of points_per_side² cells, row by row: x, y in pixels."""
    part = (np.arange(points_per_side) + 0.5) / points_per_side
    return [(x, y) for y in (part * size.height).tolist() for x in (part * size.width).tolist()]


def _wanted(
    points: Points, corner: tuple[int, int], wanted: Callable[[float, float], bool] | None
) -> Points:
    """Return the grid points to click at; `corner` is the position of the grid's picture."""
    left, top = corner
    return points if wanted is None else [(x, y) for x, y in points if wanted(x + left, y + top)]


def _of_one(
    engine: Engine,
    embedding: Embedding,
    points: Points,
    request: AutomaticMaskRequest,
    on_step: Callable[[], None],
    placed: Callable[[PackedMask], PackedMask | None] = lambda candidate: candidate,
) -> list[PackedMask]:
    """Return the candidates at `points` of one encoded picture, best first, with distinct boxes.

    `placed` converts a candidate to the whole picture, or drops it. It does so before boxes are
    compared, since a dropped candidate must not remove others.
    """
    candidates: list[PackedMask] = []
    taken = 0
    room = ROOM_BYTES
    while points:
        on_step()
        at_once = CPU_POINTS_A_CALL if engine.info.device == "cpu" else POINTS_A_CALL
        some, points = points[:at_once], points[at_once:]
        new = engine.candidates(embedding, some, iou=request.iou, stability=request.stability)
        new = [whole for candidate in new if (whole := placed(candidate))]
        candidates += new
        taken += sum(candidate.nbytes for candidate in new)
        if taken > room:
            candidates = _best(candidates)
            taken = sum(candidate.nbytes for candidate in candidates)
            # Candidates that cannot be reduced would otherwise be compared after each call.
            room = max(ROOM_BYTES, 2 * taken)
    return _best(candidates)


def _best(candidates: Sequence[PackedMask]) -> list[PackedMask]:
    order = sorted(range(len(candidates)), key=lambda index: -candidates[index].score)
    return [candidates[index] for index in distinct(_boxes(candidates), order)]


def _boxes(candidates: Sequence[PackedMask]) -> Boxes:
    return _compared([(c.box.x0, c.box.y0, c.box.x1, c.box.y1) for c in candidates])


def _compared(edges: Sequence[tuple[float, float, float, float]]) -> Boxes:
    """Return boxes as the libraries compare them: to the centres of the last row and column.

    None is empty, as theirs may be: masks of a single line of pixels would all be kept.
    """
    boxes = np.array(edges, dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] = np.maximum(boxes[:, 2:] - 1, boxes[:, :2] + 1)
    return boxes


def distinct(boxes: Boxes, order: Sequence[int]) -> list[int]:
    """Return the indices of the boxes kept by non-maximum suppression.

    Earlier ones in `order` are preferred. A box is removed where its IoU with a kept one is above
    `SAME_BOX`.
    """
    ranked = np.argsort(boxes[:, 0], kind="stable")
    x0, y0, x1, y1 = boxes[ranked].T
    areas = (x1 - x0) * (y1 - y0)
    # Similar boxes begin at nearly the same column: only those are compared, of tens of thousands
    # side by side.
    begin = np.searchsorted(x0, x0 - (1 / SAME_BOX - 1) * (x1 - x0) - 1).tolist()
    end = np.searchsorted(x0, x0 + (1 - SAME_BOX) * (x1 - x0) + 1, side="right").tolist()
    ranks = np.argsort(ranked)
    left = np.ones(len(boxes), bool)
    kept: list[int] = []
    for index in order:
        rank = int(ranks[index])
        if not left[rank]:
            continue
        kept.append(index)
        near = slice(begin[rank], end[rank])
        wide = np.minimum(x1[near], x1[rank]) - np.maximum(x0[near], x0[rank])
        high = np.minimum(y1[near], y1[rank]) - np.maximum(y0[near], y0[rank])
        both = np.clip(wide, 0, None) * np.clip(high, 0, None)
        left[near] &= both <= SAME_BOX * (areas[near] + areas[rank] - both)
    return kept


# ── crops ──


def crop_boxes(size: Size, layers: int, unit: int = 1) -> list[tuple[int, int, int, int]]:
    """Return the overlapping crops of all layers: x0, y0, x1, y1 in pixels, as the libraries cut.

    Layer n has 2ⁿ × 2ⁿ crops. `unit`: edges are moved outward to multiples of this number of
    pixels, or to the picture's edge.
    """
    boxes: dict[tuple[int, int, int, int], None] = {}
    for layer in range(1, layers + 1):
        a_side = 2**layer
        overlap = int(OVERLAP * min(size) * 2 / a_side)
        spans = [list(_spans(length, a_side, overlap, unit)) for length in size]
        boxes.update(dict.fromkeys((x0, y0, x1, y1) for (x0, x1), (y0, y1) in product(*spans)))
    return list(boxes)


def _spans(length: int, count: int, overlap: int, unit: int) -> Iterator[tuple[int, int]]:
    span = math.ceil((overlap * (count - 1) + length) / count)
    for start in range(0, (span - overlap) * count, max(1, span - overlap)):
        if start < length:  # a picture of a few pixels has fewer crops
            yield start // unit * unit, min(-(-min(start + span, length) // unit) * unit, length)


def _shrunk(picture: Picture) -> int:
    """Return the factor by which the picture was reduced when it was decoded."""
    height, width = picture.pixels.shape[:2]
    whole = picture.size
    return next(
        by
        for by in (1, 2, 4, 8)
        if (-(-whole.width // by), -(-whole.height // by)) == (width, height)
    )


def _cut(picture: Picture, box: tuple[int, int, int, int]) -> Picture:
    x0, y0, x1, y1 = box
    by = _shrunk(picture)
    pixels = picture.pixels[y0 // by : -(-y1 // by), x0 // by : -(-x1 // by)]
    return Picture(pixels, Size(x1 - x0, y1 - y0), picture.digest)


def _placed(
    candidate: PackedMask, crop: tuple[int, int, int, int], size: Size
) -> PackedMask | None:
    """Convert a crop's candidate to the whole picture; None for one cut off by the crop's edge."""
    box, (left, top) = candidate.box, crop[:2]
    edges = (box.x0 + left, box.y0 + top, box.x1 + left, box.y1 + top)
    # The libraries measure from the first and the last pixel.
    pixels = (*edges[:2], edges[2] - 1, edges[3] - 1)
    for pixel, of_crop, of_picture in zip(pixels, crop, (0, 0, *size), strict=True):
        if abs(pixel - of_crop) <= NEAR_PX < abs(pixel - of_picture):
            return None
    return replace(candidate, box=Box(*edges), size=size, corner=(left, top))


def _frame_area(candidate: PackedMask) -> int:
    return candidate.frame.size.width * candidate.frame.size.height


# ── packing ──


def pack(
    plane: FloatArray, score: float, stability: float, frame: InputTransform
) -> PackedMask | None:
    """Pack logits at the decoder's low resolution (float32, h×w); None where they set no pixel.

    Only signs, and the values near the edge, influence the enlarged mask: about a tenth of the
    plane's bytes for one large object, less for small ones. `unpacked` restores a plane of the same
    mask, pixel for pixel.
    """
    height, width = plane.shape
    cells = frame.region.width * width / frame.side, frame.region.height * height / frame.side
    seen = plane[: math.floor(cells[1] + 0.5) + 1, : math.floor(cells[0] + 0.5) + 1] > 0
    left, top, across, down = cv2.boundingRect(seen.view(np.uint8))
    if not across:
        return None
    ends = (left, top, left + across - 1, top + down - 1)
    box = _enlarged_box(plane, ends, cells, frame.size)
    if box is None:
        return None
    x0, y0 = max(0, left - _REACH), max(0, top - _REACH)
    crop = plane[y0 : top + down + _REACH, x0 : left + across + _REACH]
    inside = crop > 0
    return PackedMask(
        box=box,
        score=score,
        stability=stability,
        frame=frame,
        plane=Size(width, height),
        crop=(x0, y0, crop.shape[1], crop.shape[0]),
        inside=np.packbits(inside),
        edge=crop[_edge(inside)].astype(np.float32),
        size=frame.size,
    )


def unpacked(candidate: PackedMask) -> Logits:
    """Return logits that give the same mask as the packed ones."""
    left, top, width, height = candidate.crop
    inside = np.unpackbits(candidate.inside, count=width * height).reshape(height, width).view(bool)
    crop = np.where(inside, FAR, -FAR)
    crop[_edge(inside)] = candidate.edge
    plane = np.full((candidate.plane.height, candidate.plane.width), -FAR, dtype=np.float32)
    plane[top : top + height, left : left + width] = crop
    return Logits(plane, candidate.score, candidate.frame)


def _edge(inside: BoolArray) -> BoolArray:
    """Return the pixels with both signs within a distance of `_REACH`."""
    bits = np.ascontiguousarray(inside).view(np.uint8)
    return np.asarray(cv2.dilate(bits, _AROUND) != cv2.erode(bits, _AROUND))


def _enlarged_box(
    plane: FloatArray, ends: tuple[int, int, int, int], cells: tuple[float, float], size: Size
) -> Box | None:
    """Return the box of the pixels that the plane sets in the picture.

    It is exact but for rounding in SAM1's two steps. `ends` are the first and last column and row
    of the plane with a value above 0: x, y, x, y. `cells` is the number of columns and rows of the
    plane that the picture fills.
    """
    across = _Side(plane.T, ends[0], ends[2], cells[0], size.width)
    down = _Side(plane, ends[1], ends[3], cells[1], size.height)
    # A value just above 0 among low ones sets no pixel, so the true ends may be further inside.
    rows = down.tightened(across.places(across.ends()))
    columns = rows and across.tightened(down.places(rows))
    return Box(columns[0], rows[0], columns[1], rows[1]) if rows and columns else None


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    """One direction of a plane in relation to the picture.

    `lines` are the plane's rows or columns, of which `first` to `last` have values above 0;
    `filled` of them correspond to the picture's `length` pixels.
    """

    lines: FloatArray
    first: int
    last: int
    filled: float
    length: int

    def ends(self) -> tuple[int, int]:
        """Return the range of pixels outside of which none can be set: from, to."""
        lines = self.lines
        first, last = self.first, self.last
        start = 0.0 if first == 0 else first + 0.5 - _crossing(lines[first], lines[first - 1])
        end = float(len(lines))
        if last < len(lines) - 1:
            end = last + 0.5 + _crossing(lines[last], lines[last + 1])
        scale = self.length / self.filled
        begin = max(0, math.floor(start * scale + 0.5))
        return begin, min(self.length, math.ceil(end * scale - 0.5))

    def places(self, ends: tuple[int, int]) -> npt.NDArray[np.float64]:
        """Return the positions of the pixels' centres between the centres of the plane's pixels."""
        return (np.arange(*ends, dtype=np.float64) + 0.5) * (self.filled / self.length) - 0.5

    def tightened(self, along: npt.NDArray[np.float64]) -> tuple[int, int] | None:
        """Return the range of pixels set at one of the places `along` the lines, or None."""
        begin, stop = self.ends()
        start = next((pixel for pixel in range(begin, stop) if self._sets(pixel, along)), None)
        if start is None:
            return None
        return start, 1 + next(
            pixel for pixel in range(stop - 1, start - 1, -1) if self._sets(pixel, along)
        )

    def _sets(self, pixel: int, along: npt.NDArray[np.float64]) -> bool:
        place = min(
            max((pixel + 0.5) * (self.filled / self.length) - 0.5, 0.0), len(self.lines) - 1
        )
        low = int(place)
        near, far = self.lines[low], self.lines[min(low + 1, len(self.lines) - 1)]
        line = near + (far - near) * (place - low)
        return bool((line > 0).any() and (np.interp(along, np.arange(len(line)), line) > 0).any())


def _crossing(line: FloatArray, beyond: FloatArray) -> float:
    """Return the largest distance from one line of the plane to where its values cross 0.

    `beyond` is the next line, in which nothing is above 0.
    """
    above = line > 0
    return float((line[above] / (line[above] - beyond[above])).max())


# ── on the finish pool ──


def masks(
    candidates: Sequence[PackedMask],
    request: AutomaticMaskRequest,
    label: str = "object",
    *,
    on_step: Callable[[], None] = lambda: None,
) -> list[Mask]:
    """Return the candidates' masks at full resolution, highest predicted IoU first.

    Holes and islands of less than `request.min_area` pixels are removed, then masks that are
    smaller as a whole or now have the box of another one, as the libraries do. `on_step` as in
    `segment`.
    """
    cleaned: list[Mask] = []
    changes: list[bool] = []
    for candidate in sorted(candidates, key=lambda candidate: -candidate.score):
        on_step()
        mask = geometry.mask_of(unpacked(candidate), label)
        mask = replace(
            mask, left=mask.left + candidate.corner[0], top=mask.top + candidate.corner[1]
        )
        mask, changed = _clean(mask, candidate.size, request.min_area)
        if mask.pixels.size and mask.area >= request.min_area:
            cleaned.append(mask)
            changes.append(changed)
    if not request.min_area:
        return cleaned
    boxes = _compared(
        [(m.left, m.top, m.left + m.pixels.shape[1], m.top + m.pixels.shape[0]) for m in cleaned]
    )
    # Unchanged masks are preferred.
    order = sorted(range(len(cleaned)), key=lambda index: changes[index])
    return [cleaned[index] for index in sorted(distinct(boxes, order))]


def _clean(mask: Mask, size: Size, min_area: int) -> tuple[Mask, bool]:
    """Remove holes and islands of less than `min_area` pixels; return whether there were any.

    Pixels are neighbours by edges and corners. An area between the mask and the picture's edge is a
    hole too, if it is that small.
    """
    if not min_area or not mask.pixels.size:
        return mask, False
    height, width = mask.pixels.shape
    right, bottom = size.width - mask.left - width, size.height - mask.top - height
    outside = (
        (mask.top, size.width),
        (bottom, size.width),
        (mask.left, size.height),
        (right, size.height),
    )
    # On each side either everything up to the picture's edge, or one line that belongs to a large
    # area.
    wide = [margin * length >= min_area for margin, length in outside]
    above, below, before, behind = (
        1 if far else margin for far, (margin, _) in zip(wide, outside, strict=True)
    )
    framed = np.pad(mask.pixels, ((above, below), (before, behind)))
    parts, small = _parts(~framed, min_area)
    for far, line in zip(wide, (parts[0], parts[-1], parts[:, 0], parts[:, -1]), strict=True):
        if far:
            small[line] = False
    holes = bool(small.any())
    if holes:
        framed |= small[parts]
    del parts, line  # four bytes a pixel, not to be held twice
    parts, small = _parts(framed, min_area)
    if small.any():
        framed &= ~small[parts]
    elif not holes:
        return mask, False
    cleaned = geometry.tight(framed, mask.label, mask.score)
    left, top = mask.left - before, mask.top - above
    return replace(cleaned, left=cleaned.left + left, top=cleaned.top + top), True


def _parts(bitmap: BoolArray, min_area: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Return a bitmap's connected parts by number, 0 where unset, and which of them are small.

    Small ones have less than `min_area` pixels.
    """
    _, parts, stats, _ = cv2.connectedComponentsWithStats(
        np.ascontiguousarray(bitmap).view(np.uint8), connectivity=8
    )
    small = stats[:, cv2.CC_STAT_AREA] < min_area
    small[0] = False
    return np.asarray(parts), np.asarray(small)
