"""Annotations made elsewhere, read as prompts: what a person drew or a detector found becomes what SAM is asked.

The words every reader uses (CVAT's XML, COCO, YOLO, OPEX, labelme, Pascal VOC; a CVAT server), and the one place that
says which shapes are one object. Pure: no I/O, pictures are known by name and size only. Each file's kind has a module
of its own.

What can still go wrong here: a box can lie on the wrong thing; nothing here can see that. Whether coordinates fit the
picture is for `files.split`, and for `prompts.fit` when the prompt is answered.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sam_poll.errors import PromptError
from sam_poll.types import Box, Point, Prompt, Size

NEGATIVE_LABELS = frozenset({"negative", "background"})
"""Points of these labels are not on the object. CVAT's points have no sign of their own."""

NEGATIVE_ATTRIBUTE = "negative"
"""… and points with a checkbox attribute of this name that is ticked."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A box (two corners, x0 < x1 and y0 < y1 where it is sound) or some points, in pixels of the upright picture.

    `group` above 0 ties the shapes of one object. `negative`: these points are not on it. `key` is its reader's own
    (a server's id); nobody else looks at it. `fault` says why the shape cannot be used (its numbers are no numbers;
    `points` are NaN then): the object that it belongs to is refused, and no other.
    """

    kind: Literal["box", "points"]
    label: str
    points: tuple[tuple[float, float], ...]
    group: int = 0
    negative: bool = False
    key: Any = None
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class Annotated:
    """One picture of an annotation file. `name` is as the file has it, often with folders (`done/cam1/dog.jpg`);
    `size` None: the file does not tell. `left_out` counts the shapes that cannot be prompts (`{"polygon": 3}`)."""

    name: str
    size: Size | None
    shapes: tuple[Shape, ...]
    left_out: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Asked:
    """One object to ask for, and the shapes that ask for it."""

    prompt: Prompt
    shapes: tuple[Shape, ...]


def box_shape(
    corners: tuple[float, float, float, float],
    label: str,
    *,
    rotation: float = 0.0,
    size: Size | None = None,
    **more: Any,
) -> Shape:
    """A box from x0, y0, x1, y1.

    One that is rotated (degrees, clockwise as CVAT turns it, about its centre) becomes the upright box around its
    corners, cut to the picture: a turned box reaches over its edges quite naturally. One that is inside out stays as it
    is, and one that lies beside the picture is not cut: whoever reads it must be able to see what is wrong with it.
    """
    x0, y0, x1, y1 = corners
    if rotation % 360 and x0 < x1 and y0 < y1:
        angle = math.radians(rotation)
        cx, cy, half_w, half_h = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2
        reach_x = half_w * abs(math.cos(angle)) + half_h * abs(math.sin(angle))
        reach_y = half_w * abs(math.sin(angle)) + half_h * abs(math.cos(angle))
        x0, y0, x1, y1 = cx - reach_x, cy - reach_y, cx + reach_x, cy + reach_y
        if size and x0 < size.width and y0 < size.height and x1 > 0 and y1 > 0:
            x0, y0, x1, y1 = max(x0, 0.0), max(y0, 0.0), min(x1, float(size.width)), min(y1, float(size.height))
    return Shape("box", label, ((x0, y0), (x1, y1)), **more)


def faulty(kind: Literal["box", "points"], label: str, error: PromptError, **more: Any) -> Shape:
    """A shape that cannot be used, with the reason: it takes its object along, not the others of its picture."""
    corner = (math.nan, math.nan)
    fault = f"{error.place}: {error.reason}" if error.place else error.reason
    return Shape(kind, label, (corner, corner) if kind == "box" else (corner,), fault=fault, **more)


def objects(shapes: Sequence[Shape]) -> list[Asked]:
    """Which shapes are one object, in the order in which the first of each stands in the file.

    Every box is an object; so are points that no box claims, all of one group together. Points belong to the box of
    their group; where it has several, to the one that they lie in. Negative points without a group belong to the only
    object, or to the only box that they lie in. PromptError where that does not tell, and for negative boxes: SAM knows
    none.
    """
    boxes = _Boxes([shape for shape in shapes if shape.kind == "box"])
    loose: dict[Any, list[Shape]] = {}
    parts: list[list[Shape]] = [[box] for box in boxes.shapes]
    orphans: list[Shape] = []
    for number, shape in enumerate(shapes):
        if shape.kind == "box":
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
    made = [*parts, *loose.values()]
    for shape in orphans:
        _adopt(shape, boxes, parts, made)
    place = {id(shape): number for number, shape in enumerate(shapes)}
    made.sort(key=lambda group: min(place[id(shape)] for shape in group))
    return [_asked(group) for group in made]


def prompts_of(shapes: Sequence[Shape]) -> tuple[Prompt, ...]:
    """`objects`, the prompts alone."""
    return tuple(asked.prompt for asked in objects(shapes))


def with_negatives(shapes: Iterable[Shape], labels: Iterable[str]) -> list[Shape]:
    """The shapes, with points of these labels marked as negative."""
    wanted = frozenset(labels)
    return [
        replace(shape, negative=True) if shape.kind == "points" and shape.label in wanted else shape for shape in shapes
    ]


class _Boxes:
    """The boxes of one picture, to be asked what belongs to them. Thousands of boxes and points take no minutes."""

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self.shapes = shapes
        self._edges = np.array([[*shape.points[0], *shape.points[1]] for shape in shapes]).reshape(-1, 4)
        groups: dict[int, list[int]] = {}
        for index, shape in enumerate(shapes):
            if shape.negative:
                raise PromptError(
                    "a box cannot be negative", place=f"box {shape.label!r}", remedy="draw points where the object ends"
                )
            groups.setdefault(shape.group, []).append(index)
        self._mates = {group: np.array(indices) for group, indices in groups.items() if group}

    def owner(self, shape: Shape) -> int | None:
        """The box that points belong to by their group; None: there is none in it."""
        mates = self._mates.get(shape.group)
        if mates is None or len(mates) < 2:
            return None if mates is None else int(mates[0])
        inside = mates[self._hold(shape, self._edges[mates])]
        if len(inside) != 1:
            raise PromptError(
                f"its {len(mates)} boxes do not tell whose the points are: they lie in {len(inside)} of them",
                place=f"group {shape.group}",
                remedy="group each box with its own points only",
            )
        return int(inside[0])

    def around(self, shape: Shape) -> list[int]:
        """The boxes that all of the points lie in, edges included."""
        return [int(index) for index in np.flatnonzero(self._hold(shape, self._edges))]

    @staticmethod
    def _hold(shape: Shape, edges: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        points = np.array(shape.points)
        holds = (edges[:, :2] <= points.min(axis=0)) & (points.max(axis=0) <= edges[:, 2:])
        return np.asarray(holds.all(axis=1))


def _adopt(shape: Shape, boxes: _Boxes, parts: list[list[Shape]], made: list[list[Shape]]) -> None:
    inside = boxes.around(shape)
    if not made:
        raise _nothing_on_it(shape)
    if len(made) == 1:
        made[0].append(shape)
    elif len(inside) == 1:
        parts[inside[0]].append(shape)
    else:
        raise PromptError(
            f"negative points without a group lie in {len(inside)} boxes of {len(made)} objects",
            place=f"points {shape.label!r}",
            remedy="group them with the box or the points of their object",
        )


def _asked(group: Sequence[Shape]) -> Asked:
    box = next((shape for shape in group if shape.kind == "box"), None)
    clicks = [shape for shape in group if shape.kind == "points"]
    points = tuple(Point(x, y, 0 if shape.negative else 1) for shape in clicks for x, y in shape.points)
    named = box or next((shape for shape in clicks if not shape.negative), None)
    if named is None:
        raise _nothing_on_it(group[0])
    corners = (value for corner in box.points for value in corner) if box else None
    return Asked(Prompt(named.label, points, Box(*corners) if corners else None), tuple(group))


def _nothing_on_it(shape: Shape) -> PromptError:
    remedy = "draw a box or a point on the object; group it with these where there are several objects"
    return PromptError("there are negative points only", place=f"points {shape.label!r}", remedy=remedy)
