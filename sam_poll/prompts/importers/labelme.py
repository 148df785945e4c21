"""labelme's JSON, one file a picture: rectangles and points; X-AnyLabeling writes the same.

A rectangle is two opposite corners in any order, or all four. `group_id` joins the shapes of one
object. A point that is not on its object has one of `NEGATIVE_LABELS`, or a set flag `negative`.
Other shapes are counted.

Limitations: `imagePath` is a path on the annotator's machine; where the picture has been renamed
since, it must be found by the JSON file's own name.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from typing import Any

from sam_poll.core.errors import PromptError
from sam_poll.core.validation import describe_value
from sam_poll.prompts.importers.common import MAX_SHAPES, counted, number, size_of, whole
from sam_poll.prompts.importers.shapes import (
    NEGATIVE_ATTRIBUTE,
    Annotated,
    Shape,
    box_shape,
    faulty,
    is_negative_label,
)

_FORM = "a labelme file has `shapes`, each with `label`, `points` and `shape_type`, and `imagePath`"


def read_document(document: dict[str, Any], stem: str = "") -> tuple[Annotated, tuple[str, ...]]:
    """Read one labelme file called `stem` (its path without the extension).

    Returns the picture, and all its possible names, most reliable first. Raises PromptError with
    the place (`shapes[3]`) and the remedy.
    """
    entries = document.get("shapes")
    if not isinstance(entries, list):
        raise PromptError(f"is {describe_value(entries)}, not a list", place="shapes", remedy=_FORM)
    if len(entries) > MAX_SHAPES:
        raise PromptError(
            f"has more than {MAX_SHAPES:,} entries", place="shapes", remedy="split the file"
        )
    names = _names(document.get("imagePath"), stem)
    if not names:
        raise PromptError("does not name its picture", place="imagePath", remedy=_FORM)
    shapes: list[Shape] = []
    left_out: Counter[str] = Counter()
    for index, entry in enumerate(entries):
        place = f"shapes[{index}]"
        if not isinstance(entry, dict):
            raise PromptError(
                f"is {describe_value(entry)}, not an object", place=place, remedy=_FORM
            )
        kind = entry.get("shape_type") or "polygon"  # files of before 2019 have none
        if kind in ("rectangle", "point", "points"):
            shapes.append(_shape(entry, str(kind), place))
        else:
            left_out[str(kind)[:40]] += 1
    size = size_of(
        document.get("imageWidth"), document.get("imageHeight"), "imageWidth", "imageHeight"
    )
    return Annotated(names[0], size, tuple(shapes), counted(left_out)), names


def _names(path: object, stem: str) -> tuple[str, ...]:
    """Return the picture's possible names.

    `imagePath` is relative to the JSON file, on Windows with backslashes.
    """
    names = [stem] if stem else []
    if isinstance(path, str) and path:
        parts = posixpath.normpath(
            posixpath.join(posixpath.dirname(stem), path.replace("\\", "/"))
        ).split("/")
        names.insert(0, "/".join(part for part in parts if part != ".."))
    return tuple(name for name in names if name)


def _shape(entry: dict[str, Any], kind: str, place: str) -> Shape:
    label = entry.get("label")
    group, flags = entry.get("group_id"), entry.get("flags")
    if not isinstance(label, str) or not label:
        raise PromptError("has no label", place=place, remedy=_FORM)
    ticked = isinstance(flags, dict) and flags.get(NEGATIVE_ATTRIBUTE) is True
    more: dict[str, Any] = {
        # In labelme 0 is a group, too.
        "group": 0 if group is None else whole(group, f"{place}.group_id") + 1,
        "negative": ticked or (kind != "rectangle" and is_negative_label(label)),
    }
    try:
        points = _points(entry.get("points"), f"{place}.points")
        if kind != "rectangle":
            return Shape("points", label, points, **more)
        if len(points) not in (2, 4):
            reason = f"has {len(points)} points: a rectangle is two opposite corners, or all four"
            raise PromptError(reason, place=f"{place}.points")
        xs, ys = [x for x, _ in points], [y for _, y in points]
        return box_shape((min(xs), min(ys), max(xs), max(ys)), label, **more)
    except PromptError as error:
        return faulty("box" if kind == "rectangle" else "points", label, error, **more)


def _points(given: object, place: str) -> tuple[tuple[float, float], ...]:
    if not isinstance(given, list) or not given:
        raise PromptError("is not a list of [x, y]", place=place)
    points = []
    for index, pair in enumerate(given):
        if not isinstance(pair, list) or len(pair) != 2:
            raise PromptError("is not [x, y]", place=f"{place}[{index}]")
        points.append((number(pair[0], f"{place}[{index}]"), number(pair[1], f"{place}[{index}]")))
    return tuple(points)
