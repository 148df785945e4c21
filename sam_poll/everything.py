"""Everything mode: a grid of clicks becomes the masks of all there is to see, without a prompt.

The steps are those of the libraries' automatic mask generators: a grid of points, three masks each, filters by
predicted IoU and stability, no two masks with nearly the same box, small holes and islands removed. What is different:
all of that is decided at the decoder's low resolution, where boxes and areas are computed as the enlarged mask will
have them, and candidates wait packed, so memory does not grow with the picture.

What can still go wrong here: masks may overlap, a part and its whole are both found, and what no point of the grid
hits is not. Where candidates take more than `ROOM_BYTES`, one may go because of another that goes later itself.
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

from sam_poll import geometry
from sam_poll.errors import InputError
from sam_poll.types import (
    Bitmap,
    Box,
    Candidate,
    Embedding,
    Engine,
    Everything,
    Field,
    Frame,
    Logits,
    Mask,
    Picture,
    Size,
)

SAME_BOX = 0.7  # IoU of two boxes above which the lesser mask goes: box_nms_thresh and crop_nms_thresh of the libraries
OVERLAP = 512 / 1500  # of crops, in parts of the picture's short side: crop_overlap_ratio of the libraries
NEAR_PX = 20  # a mask that ends this close to a crop's edge is cut off by it: is_box_near_crop_edge of the libraries
# Points handed to the engine at once; between two calls there is time to breathe and to stop. A CPU may need some
# tenths of a second for each.
POINTS_A_CALL, CPU_POINTS_A_CALL = 64, 16
ROOM_BYTES = 256 << 20  # packed candidates, before those with the same box are sorted out early
FAR = np.float32(32)  # a logit that is surely in, or out: what the networks clamp theirs to
_REACH = 2  # pixels of the low resolution around an edge whose values matter when it is enlarged, twice if need be
_AROUND = np.ones((2 * _REACH + 1, 2 * _REACH + 1), np.uint8)

Boxes = npt.NDArray[np.float64]  # N×4: x0, y0, x1, y1
Points = list[tuple[float, float]]


# ── on the device thread ──


def segment(
    engine: Engine,
    embedding: Embedding,
    asked: Everything,
    *,
    picture: Picture | None = None,
    wanted: Callable[[float, float], bool] | None = None,
    between: Callable[[], None] = lambda: None,
) -> list[Candidate]:
    """The masks of all there is in an encoded picture, packed, the best predicted IoU first; `masks` unpacks them.

    On the device thread. `picture` is needed for `asked.crops`, whose crops are encoded here, one after another.
    `wanted` says of a point of the grid, x and y in the picture's pixels, whether to click there; without it, on all.
    `between` is called before each call of the network; what it raises ends the work.
    """
    size = embedding.frame.size
    clicks = _wanted(grid(asked.points_per_side, size), (0, 0), wanted)
    found = _of_one(engine, embedding, clicks, asked, between)
    if not asked.crops:
        return found
    if picture is None:
        raise InputError("crops need the picture itself", place="everything.crops", remedy="set it to 0")
    for crop in crop_boxes(size, asked.crops, _shrunk(picture)):
        between()
        x0, y0, x1, y1 = crop
        clicks = _wanted(grid(asked.points_per_side, Size(x1 - x0, y1 - y0)), (x0, y0), wanted)
        if clicks:
            [embedding] = engine.encode([engine.prepare(_cut(picture, crop))])
            found += _of_one(engine, embedding, clicks, asked, between, partial(_placed, crop=crop, size=size))
    # The smaller the crop, the more of the object has been seen: it wins, as in the libraries.
    order = sorted(range(len(found)), key=lambda index: _frame_area(found[index]))
    kept = [found[index] for index in distinct(_boxes(found), order)]
    return sorted(kept, key=lambda candidate: -candidate.score)


def grid(points_per_side: int, size: Size) -> Points:
    """The centres of points_per_side² cells, row by row: x, y in pixels of a picture of `size`."""
    part = (np.arange(points_per_side) + 0.5) / points_per_side
    return [(x, y) for y in (part * size.height).tolist() for x in (part * size.width).tolist()]


def _wanted(points: Points, corner: tuple[int, int], wanted: Callable[[float, float], bool] | None) -> Points:
    """Of a grid whose picture begins at `corner` of the whole one, the points to click on."""
    left, top = corner
    return points if wanted is None else [(x, y) for x, y in points if wanted(x + left, y + top)]


def _of_one(
    engine: Engine,
    embedding: Embedding,
    points: Points,
    asked: Everything,
    between: Callable[[], None],
    placed: Callable[[Candidate], Candidate | None] = lambda candidate: candidate,
) -> list[Candidate]:
    """What clicks on `points` find in one encoded picture, the best first, no two of them with the same box.

    `placed` puts a candidate where it is in the whole picture, or leaves it out: before the boxes are compared, or one
    that is left out would take others with it.
    """
    found: list[Candidate] = []
    taken = 0
    room = ROOM_BYTES
    while points:
        between()
        at_once = CPU_POINTS_A_CALL if engine.info.device == "cpu" else POINTS_A_CALL
        some, points = points[:at_once], points[at_once:]
        new = engine.candidates(embedding, some, iou=asked.iou, stability=asked.stability)
        new = [whole for candidate in new if (whole := placed(candidate))]
        found += new
        taken += sum(candidate.nbytes for candidate in new)
        if taken > room:
            found = _best(found)
            taken = sum(candidate.nbytes for candidate in found)
            room = max(ROOM_BYTES, 2 * taken)  # or what cannot be made less would be looked at again after each call
    return _best(found)


def _best(found: Sequence[Candidate]) -> list[Candidate]:
    order = sorted(range(len(found)), key=lambda index: -found[index].score)
    return [found[index] for index in distinct(_boxes(found), order)]


def _boxes(found: Sequence[Candidate]) -> Boxes:
    return _compared([(c.box.x0, c.box.y0, c.box.x1, c.box.y1) for c in found])


def _compared(edges: Sequence[tuple[float, float, float, float]]) -> Boxes:
    """Boxes as the libraries compare them: to the centres of the last row and column. None is empty, as theirs may be:
    the masks of one line of pixels would all stay."""
    boxes = np.array(edges, dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] = np.maximum(boxes[:, 2:] - 1, boxes[:, :2] + 1)
    return boxes


def distinct(boxes: Boxes, order: Sequence[int]) -> list[int]:
    """Non-maximum suppression: which of the boxes stay, in `order`, of which the first are preferred. A box goes where
    its IoU with one that stays is above `SAME_BOX`."""
    ranked = np.argsort(boxes[:, 0], kind="stable")
    x0, y0, x1, y1 = boxes[ranked].T
    areas = (x1 - x0) * (y1 - y0)
    # The same box begins at nearly the same column: only those are compared, of ten thousands that lie side by side.
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
    """Layer n cuts the picture into 2ⁿ × 2ⁿ crops that overlap: x0, y0, x1, y1 in pixels, as the libraries cut.

    `unit`: the edges are moved outward to multiples of so many pixels, or the picture's edge.
    """
    made: dict[tuple[int, int, int, int], None] = {}
    for layer in range(1, layers + 1):
        a_side = 2**layer
        overlap = int(OVERLAP * min(size) * 2 / a_side)
        spans = [list(_spans(length, a_side, overlap, unit)) for length in size]
        made.update(dict.fromkeys((x0, y0, x1, y1) for (x0, x1), (y0, y1) in product(*spans)))
    return list(made)


def _spans(length: int, count: int, overlap: int, unit: int) -> Iterator[tuple[int, int]]:
    span = math.ceil((overlap * (count - 1) + length) / count)
    for start in range(0, (span - overlap) * count, max(1, span - overlap)):
        if start < length:  # of a picture of a few pixels there are not that many crops
            yield start // unit * unit, min(-(-min(start + span, length) // unit) * unit, length)


def _shrunk(picture: Picture) -> int:
    """By how much the picture was reduced when it was decoded."""
    height, width = picture.pixels.shape[:2]
    whole = picture.size
    return next(by for by in (1, 2, 4, 8) if (-(-whole.width // by), -(-whole.height // by)) == (width, height))


def _cut(picture: Picture, box: tuple[int, int, int, int]) -> Picture:
    x0, y0, x1, y1 = box
    by = _shrunk(picture)
    pixels = picture.pixels[y0 // by : -(-y1 // by), x0 // by : -(-x1 // by)]
    return Picture(pixels, Size(x1 - x0, y1 - y0), picture.digest)


def _placed(candidate: Candidate, crop: tuple[int, int, int, int], size: Size) -> Candidate | None:
    """A crop's candidate in the whole picture; None for one that the crop's edge cuts off."""
    box, (left, top) = candidate.box, crop[:2]
    edges = (box.x0 + left, box.y0 + top, box.x1 + left, box.y1 + top)
    pixels = (*edges[:2], edges[2] - 1, edges[3] - 1)  # the first and the last, which the libraries measure from
    for pixel, of_crop, of_picture in zip(pixels, crop, (0, 0, *size), strict=True):
        if abs(pixel - of_crop) <= NEAR_PX < abs(pixel - of_picture):
            return None
    return replace(candidate, box=Box(*edges), size=size, corner=(left, top))


def _frame_area(candidate: Candidate) -> int:
    return candidate.frame.size.width * candidate.frame.size.height


# ── packing ──


def pack(plane: Field, score: float, stability: float, frame: Frame) -> Candidate | None:
    """Logits at the decoder's low resolution (float32, h×w) packed; None where they set no pixel of the picture.

    Only signs, and the values near the edge, have a say in the enlarged mask: about a tenth of the plane's bytes for
    one large object, less for small ones. `unpacked` gives a plane of the same mask, pixel for pixel.
    """
    height, width = plane.shape
    cells = frame.region.width * width / frame.side, frame.region.height * height / frame.side
    seen = plane[: math.floor(cells[1] + 0.5) + 1, : math.floor(cells[0] + 0.5) + 1] > 0
    left, top, across, down = cv2.boundingRect(seen.view(np.uint8))
    box = _enlarged_box(plane, (left, top, left + across - 1, top + down - 1), cells, frame.size) if across else None
    if box is None:
        return None
    x0, y0 = max(0, left - _REACH), max(0, top - _REACH)
    crop = plane[y0 : top + down + _REACH, x0 : left + across + _REACH]
    inside = crop > 0
    return Candidate(
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


def unpacked(candidate: Candidate) -> Logits:
    """Logits that give the same mask as those that were packed."""
    left, top, width, height = candidate.crop
    inside = np.unpackbits(candidate.inside, count=width * height).reshape(height, width).view(bool)
    crop = np.where(inside, FAR, -FAR)
    crop[_edge(inside)] = candidate.edge
    plane = np.full((candidate.plane.height, candidate.plane.width), -FAR, dtype=np.float32)
    plane[top : top + height, left : left + width] = crop
    return Logits(plane, candidate.score, candidate.frame)


def _edge(inside: Bitmap) -> Bitmap:
    """The pixels that have both signs around them, no more than `_REACH` away."""
    bits = np.ascontiguousarray(inside).view(np.uint8)
    return np.asarray(cv2.dilate(bits, _AROUND) != cv2.erode(bits, _AROUND))


def _enlarged_box(plane: Field, ends: tuple[int, int, int, int], cells: tuple[float, float], size: Size) -> Box | None:
    """The box of the pixels that the plane sets in the picture, to the pixel (but for rounding in SAM1's two steps).

    `ends` are the first and last column and row of the plane with a value above 0: x, y, x, y. `cells` is how many
    columns and rows of the plane the picture fills.
    """
    across = _Side(plane.T, ends[0], ends[2], cells[0], size.width)
    down = _Side(plane, ends[1], ends[3], cells[1], size.height)
    # A value just above 0 among low ones sets no pixel: not all of what is inside these ends is set.
    rows = down.tightened(across.places(across.ends()))
    columns = rows and across.tightened(down.places(rows))
    return Box(columns[0], rows[0], columns[1], rows[1]) if rows and columns else None


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    """One direction of a plane on the picture. `lines` are the plane's rows or columns, of which `first` to `last` hold
    values above 0; `filled` of them lie on the picture's `length` pixels."""

    lines: Field
    first: int
    last: int
    filled: float
    length: int

    def ends(self) -> tuple[int, int]:
        """Pixels outside of which nothing can be set: from, to."""
        lines, first, last = self.lines, self.first, self.last
        start = 0.0 if first == 0 else first + 0.5 - _crossing(lines[first], lines[first - 1])
        end = float(len(lines)) if last == len(lines) - 1 else last + 0.5 + _crossing(lines[last], lines[last + 1])
        scale = self.length / self.filled
        return max(0, math.floor(start * scale + 0.5)), min(self.length, math.ceil(end * scale - 0.5))

    def places(self, ends: tuple[int, int]) -> npt.NDArray[np.float64]:
        """Where the pixels' centres lie between the centres of the plane's."""
        return (np.arange(*ends, dtype=np.float64) + 0.5) * (self.filled / self.length) - 0.5

    def tightened(self, along: npt.NDArray[np.float64]) -> tuple[int, int] | None:
        """The first pixel that is set at one of the places `along` the lines, and the one after the last."""
        begin, stop = self.ends()
        start = next((pixel for pixel in range(begin, stop) if self._sets(pixel, along)), None)
        if start is None:
            return None
        return start, 1 + next(pixel for pixel in range(stop - 1, start - 1, -1) if self._sets(pixel, along))

    def _sets(self, pixel: int, along: npt.NDArray[np.float64]) -> bool:
        place = min(max((pixel + 0.5) * (self.filled / self.length) - 0.5, 0.0), len(self.lines) - 1)
        low = int(place)
        near, far = self.lines[low], self.lines[min(low + 1, len(self.lines) - 1)]
        line = near + (far - near) * (place - low)
        return bool((line > 0).any() and (np.interp(along, np.arange(len(line)), line) > 0).any())


def _crossing(line: Field, beyond: Field) -> float:
    """How far from one line of the plane towards the next, where nothing is above 0 any more, the values cross 0."""
    above = line > 0
    return float((line[above] / (line[above] - beyond[above])).max())


# ── on the finish pool ──


def masks(
    candidates: Sequence[Candidate],
    asked: Everything,
    label: str = "object",
    *,
    between: Callable[[], None] = lambda: None,
) -> list[Mask]:
    """The candidates' masks at the picture's full resolution, the best predicted IoU first. `between` as in `segment`.

    Holes and islands of less than `asked.min_area` pixels are removed, then masks that are smaller as a whole or have
    got the box of another one, as the libraries do.
    """
    made: list[Mask] = []
    mended: list[bool] = []
    for candidate in sorted(candidates, key=lambda candidate: -candidate.score):
        between()
        mask = geometry.mask_of(unpacked(candidate), label)
        mask = replace(mask, left=mask.left + candidate.corner[0], top=mask.top + candidate.corner[1])
        mask, changed = _clean(mask, candidate.size, asked.min_area)
        if mask.pixels.size and mask.area >= asked.min_area:
            made.append(mask)
            mended.append(changed)
    if not asked.min_area:
        return made
    boxes = _compared([(m.left, m.top, m.left + m.pixels.shape[1], m.top + m.pixels.shape[0]) for m in made])
    order = sorted(range(len(made)), key=lambda index: mended[index])  # what needed no mending comes first
    return [made[index] for index in sorted(distinct(boxes, order))]


def _clean(mask: Mask, size: Size, min_area: int) -> tuple[Mask, bool]:
    """Without its holes and islands of less than `min_area` pixels, and whether it had any. Neighbours touch by edges
    and corners. What lies between the mask and the picture's edge is a hole too, where it is that small."""
    if not min_area or not mask.pixels.size:
        return mask, False
    height, width = mask.pixels.shape
    right, bottom = size.width - mask.left - width, size.height - mask.top - height
    outside = (mask.top, size.width), (bottom, size.width), (mask.left, size.height), (right, size.height)
    # On each side either all there is up to the picture's edge, or one line that belongs to something large.
    wide = [margin * length >= min_area for margin, length in outside]
    above, below, before, behind = (1 if far else margin for far, (margin, _) in zip(wide, outside, strict=True))
    framed = np.pad(mask.pixels, ((above, below), (before, behind)))
    parts, small = _parts(~framed, min_area)
    for far, line in zip(wide, (parts[0], parts[-1], parts[:, 0], parts[:, -1]), strict=True):
        if far:
            small[line] = False
    holes = bool(small.any())
    if holes:
        framed |= small[parts]
    del parts, line  # four bytes a pixel, which need not be there twice
    parts, small = _parts(framed, min_area)
    if small.any():
        framed &= ~small[parts]
    elif not holes:
        return mask, False
    cleaned = geometry.tight(framed, mask.label, mask.score)
    left, top = mask.left - before, mask.top - above
    return replace(cleaned, left=cleaned.left + left, top=cleaned.top + top), True


def _parts(bitmap: Bitmap, min_area: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """The connected parts of a bitmap by number, 0 where it is not set; and which of them are below `min_area`."""
    _, parts, stats, _ = cv2.connectedComponentsWithStats(np.ascontiguousarray(bitmap).view(np.uint8), connectivity=8)
    small = stats[:, cv2.CC_STAT_AREA] < min_area
    small[0] = False
    return np.asarray(parts), np.asarray(small)
