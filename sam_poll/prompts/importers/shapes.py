"""Shapes of annotation files, and which of them are one object to be segmented.

The types are those of every reader (of annotation files, and of a CVAT server); each kind of file
has a module of its own. Does no I/O; pictures are known by name and size only.

Limitations: a box on the wrong object cannot be detected. Whether coordinates fit the picture is
checked by `prompt_files.split`, and by `parser.fit` when the prompt is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sam_poll.core.errors import PromptError
from sam_poll.core.types import Box, Point, Polygon, Prompt, Size

NEGATIVE_LABELS = frozenset({"negative", "background"})
"""Labels, in any case, of points that are not on the object: CVAT's points have no sign."""

NEGATIVE_ATTRIBUTE = "negative"
"""Name of a checkbox attribute; points with it ticked are not on the object either."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A box, a rough outline, or some points, in pixels of the upright picture.

    `points` of a box are two corners, x0 < x1 and y0 < y1 if it is valid; of a polygon its corners,
    three at least. No importer of files makes polygons: outlines in files are results. A `group`
    above 0 joins the shapes of one object. `negative`: the points are not on the object. `key` is
    private to the reader (a server's id). `fault` says why the shape cannot be used (its numbers
    are invalid; `points` are NaN then): only the object that it belongs to is refused.
    """

    kind: Literal["box", "points", "polygon"]
    label: str
    points: tuple[tuple[float, float], ...]
    group: int = 0
    negative: bool = False
    key: Any = None
    fault: str | None = None

    @property
    def is_area(self) -> bool:
        """Whether the shape is an object by itself, which points may refine."""
        return self.kind != "points"


@dataclass(frozen=True, slots=True)
class Annotated:
    """One picture of an annotation file.

    `name` is as in the file, often with folders (`done/cam1/dog.jpg`); `size` None: not stated.
    `left_out` counts the shapes that cannot be prompts (`{"polygon": 3}`).
    """

    name: str
    size: Size | None
    shapes: tuple[Shape, ...]
    left_out: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class PromptObject:
    """One object to be segmented, and the shapes that it was made from."""

    prompt: Prompt
    shapes: tuple[Shape, ...]


def is_negative_label(label: str) -> bool:
    """Return whether points with this label are not on the object."""
    return label.lower() in NEGATIVE_LABELS


def box_shape(
    corners: tuple[float, float, float, float],
    label: str,
    *,
    rotation: float = 0.0,
    size: Size | None = None,
    **more: Any,
) -> Shape:
    """Return a box from x0, y0, x1, y1.

    A rotated one (degrees, clockwise as in CVAT, about its centre) becomes the upright box around
    its corners, clipped to the picture, since a rotated box often reaches over its edges. An
    inside-out box is kept as it is, and one beside the picture is not clipped, so that later checks
    report it.
    """
    x0, y0, x1, y1 = corners
    if rotation % 360 and x0 < x1 and y0 < y1:
        angle = math.radians(rotation)
        cx, half_w = (x0 + x1) / 2, (x1 - x0) / 2
        cy, half_h = (y0 + y1) / 2, (y1 - y0) / 2
        reach_x = half_w * abs(math.cos(angle)) + half_h * abs(math.sin(angle))
        reach_y = half_w * abs(math.sin(angle)) + half_h * abs(math.cos(angle))
        x0, x1 = cx - reach_x, cx + reach_x
        y0, y1 = cy - reach_y, cy + reach_y
        if size and x0 < size.width and y0 < size.height and x1 > 0 and y1 > 0:
            x0, y0 = max(x0, 0.0), max(y0, 0.0)
            x1, y1 = min(x1, float(size.width)), min(y1, float(size.height))
    return Shape("box", label, ((x0, y0), (x1, y1)), **more)


def faulty(kind: Literal["box", "points"], label: str, error: PromptError, **more: Any) -> Shape:
    """Return an unusable shape with its reason; only the object that it belongs to is refused."""
    corner = (math.nan, math.nan)
    fault = f"{error.place}: {error.reason}" if error.place else error.reason
    return Shape(kind, label, (corner, corner) if kind == "box" else (corner,), fault=fault, **more)


def objects(shapes: Sequence[Shape]) -> list[PromptObject]:
    """Return the objects that the shapes form, in the order of each one's first shape in the file.

    Every box is an object; so are points without a box, all of one group together. Points belong to
    the box of their group; where the group has several, to the one that contains them. Negative
    points without a group belong to the only object, or to the only box that contains them. A
    polygon counts as a box. Raises PromptError where that is ambiguous, and for negative boxes,
    which SAM does not support.
    """
    boxes = _Boxes([shape for shape in shapes if shape.is_area])
    loose: dict[Any, list[Shape]] = {}
    parts: list[list[Shape]] = [[box] for box in boxes.shapes]
    orphans: list[Shape] = []
    for number, shape in enumerate(shapes):
        if shape.is_area:
            continue
        owner = boxes.owner(shape)
        if owner is not None:
            parts[owner].append(shape)
        elif shape.group:
            loose.setdefault(shape.group, []).append(shape)
        elif shape.negative:
            orphans.append(shape)
        else:
            loose[-number - 1] = [shape]
    groups = [*parts, *loose.values()]
    for shape in orphans:
        _adopt(shape, boxes, parts, groups)
    position = {id(shape): number for number, shape in enumerate(shapes)}
    groups.sort(key=lambda group: min(position[id(shape)] for shape in group))
    return [_object_of(group) for group in groups]


def unambiguous_objects(shapes: Sequence[Shape]) -> list[PromptObject]:
    """Return the objects that are certain, for shapes with which `objects` raises PromptError.

    A group with points is judged by itself: no other group concerns it, nor do stray points, that
    is, negative points without a group that lie in several boxes or in none. Stray points concern
    the other boxes that contain one of them, and all positive points without a group. Raises
    PromptError for negative boxes.
    """
    boxes = _Boxes([shape for shape in shapes if shape.is_area])
    parts: dict[int, list[Shape]] = {0: []}  # by group; 0: what is in no group with points
    parts |= {shape.group: [] for shape in shapes if shape.kind == "points"}
    adopted: list[tuple[Shape, Shape]] = []  # negative points, and the box that contains them
    strays: list[Shape] = []
    for shape in shapes:
        around = boxes.around(shape) if _needs_owner(shape) else None
        if around is None:
            parts[shape.group if shape.group in parts else 0].append(shape)
        elif len(around) == 1:
            adopted.append((shape, boxes.shapes[around[0]]))
        else:
            strays.append(shape)
    if strays:
        concerned = {id(box) for stray in strays for box in boxes.touched_by(stray)}
        parts[0] = [s for s in parts[0] if s.is_area and id(s) not in concerned]
    part_of = {id(shape): part for part in parts.values() for shape in part}
    for points, box in adopted:
        if id(box) in part_of:
            part_of[id(box)].append(points)
    certain: list[PromptObject] = []
    for part in parts.values():
        with suppress(PromptError):
            certain += objects(part)
    position = {id(shape): number for number, shape in enumerate(shapes)}
    return sorted(certain, key=lambda one: min(position[id(shape)] for shape in one.shapes))


def _needs_owner(shape: Shape) -> bool:
    return shape.kind == "points" and shape.negative and not shape.group


def prompts_of(shapes: Sequence[Shape]) -> tuple[Prompt, ...]:
    """Return the prompts of `objects`."""
    return tuple(one.prompt for one in objects(shapes))


def with_negatives(shapes: Iterable[Shape], labels: Iterable[str]) -> list[Shape]:
    """Return the shapes, with points of these labels marked as negative."""
    negative = frozenset(labels)

    def marked(shape: Shape) -> Shape:
        if shape.kind == "points" and shape.label in negative:
            return replace(shape, negative=True)
        return shape

    return [marked(shape) for shape in shapes]


class _Boxes:
    """The boxes of one picture, indexed so that thousands of points find theirs quickly.

    A polygon counts as the box around it.
    """

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self.shapes = shapes
        self._edges = np.array([_edges(shape) for shape in shapes]).reshape(-1, 4)
        groups: dict[int, list[int]] = {}
        for index, shape in enumerate(shapes):
            if shape.negative:
                raise PromptError(
                    "a box cannot be negative",
                    place=f"box {shape.label!r}",
                    remedy="draw points where the object ends",
                )
            groups.setdefault(shape.group, []).append(index)
        self._mates = {group: np.array(indices) for group, indices in groups.items() if group}

    def owner(self, shape: Shape) -> int | None:
        """Return the box that points belong to by their group; None where the group has no box."""
        mates = self._mates.get(shape.group)
        if mates is None or len(mates) < 2:
            return None if mates is None else int(mates[0])
        inside = mates[self._hold(shape, self._edges[mates])]
        if len(inside) != 1:
            raise PromptError(
                f"has {len(mates)} boxes, and its points are in {len(inside)} of them, "
                "so that their object is ambiguous",
                place=f"group {shape.group}",
                remedy="group each box with its own points only",
            )
        return int(inside[0])

    def around(self, shape: Shape) -> list[int]:
        """Return the boxes that contain all of the points, edges included."""
        return [int(index) for index in np.flatnonzero(self._hold(shape, self._edges))]

    def touched_by(self, shape: Shape) -> Iterator[Shape]:
        """Yield the boxes that contain any of the points; a box may come several times."""
        for point in shape.points:
            single = replace(shape, points=(point,))
            yield from (self.shapes[index] for index in self.around(single))

    @staticmethod
    def _hold(shape: Shape, edges: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        points = np.array(shape.points)
        holds = (edges[:, :2] <= points.min(axis=0)) & (points.max(axis=0) <= edges[:, 2:])
        return np.asarray(holds.all(axis=1))


def _edges(shape: Shape) -> tuple[float, float, float, float]:
    if shape.kind == "box":
        return (*shape.points[0], *shape.points[1])
    xs, ys = zip(*shape.points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def _adopt(
    shape: Shape, boxes: _Boxes, parts: list[list[Shape]], groups: list[list[Shape]]
) -> None:
    """Add negative points without a group to their object."""
    inside = boxes.around(shape)
    if not groups:
        raise _nothing_on_it(shape)
    if len(groups) == 1:
        groups[0].append(shape)
    elif len(inside) == 1:
        parts[inside[0]].append(shape)
    else:
        raise PromptError(
            f"negative points without a group lie in {len(inside)} boxes of {len(groups)} objects",
            place=f"points {shape.label!r}",
            remedy="group them with the box or the points of their object",
        )


def _object_of(group: Sequence[Shape]) -> PromptObject:
    area = next((shape for shape in group if shape.is_area), None)
    clicks = [shape for shape in group if shape.kind == "points"]
    points = tuple(
        Point(x, y, 0 if shape.negative else 1) for shape in clicks for x, y in shape.points
    )
    named = area or next((shape for shape in clicks if not shape.negative), None)
    if named is None:
        raise _nothing_on_it(group[0])
    prompt = Prompt(named.label, points)
    if area and area.kind == "polygon":
        prompt = replace(prompt, shape=Polygon(area.points))
    elif area:
        prompt = replace(prompt, box=Box(*_edges(area)))
    return PromptObject(prompt, tuple(group))


def _nothing_on_it(shape: Shape) -> PromptError:
    remedy = (
        "draw a box or a point on the object; group it with these where there are several objects"
    )
    return PromptError(
        "there are negative points only", place=f"points {shape.label!r}", remedy=remedy
    )
