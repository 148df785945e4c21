"""labelme's JSON, one file a picture: rectangles and points; X-AnyLabeling writes the same.

A rectangle is two opposite corners in any order, or all four. `group_id` ties the shapes of one object. A point that is
not on its object has one of `NEGATIVE_LABELS`, or a flag `negative` that is set. Other shapes are counted.

What can still go wrong here: `imagePath` is as the annotator's machine had it; where the picture has been renamed
since, the JSON file's own name must tell.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from typing import Any

from sam_poll.annotations import NEGATIVE_ATTRIBUTE, NEGATIVE_LABELS, Annotated, Shape, box_shape, faulty
from sam_poll.annotations.reading import MAX_SHAPES, counted, number, size_of, whole
from sam_poll.complaints import show
from sam_poll.errors import PromptError

_FORM = "a labelme file has `shapes`, each with `label`, `points` and `shape_type`, and `imagePath`"


def read_document(document: dict[str, Any], stem: str = "") -> tuple[Annotated, tuple[str, ...]]:
    """Read one labelme file called `stem` (its path without the ending).

    Returns the picture, and all the names that it may have, most trustworthy first. PromptError with the place
    (`shapes[3]`) and the remedy.
    """
    entries = document.get("shapes")
    if not isinstance(entries, list):
        raise PromptError(f"is {show(entries)}, not a list", place="shapes", remedy=_FORM)
    if len(entries) > MAX_SHAPES:
        raise PromptError(f"has more than {MAX_SHAPES:,} entries", place="shapes", remedy="split the file")
    names = _names(document.get("imagePath"), stem)
    if not names:
        raise PromptError("does not say which picture it is about", place="imagePath", remedy=_FORM)
    shapes: list[Shape] = []
    left_out: Counter[str] = Counter()
    for index, entry in enumerate(entries):
        place = f"shapes[{index}]"
        if not isinstance(entry, dict):
            raise PromptError(f"is {show(entry)}, not an object", place=place, remedy=_FORM)
        kind = entry.get("shape_type") or "polygon"  # files of before 2019 have none
        if kind in ("rectangle", "point", "points"):
            shapes.append(_shape(entry, str(kind), place))
        else:
            left_out[str(kind)[:40]] += 1
    size = size_of(document.get("imageWidth"), document.get("imageHeight"), "imageWidth", "imageHeight")
    return Annotated(names[0], size, tuple(shapes), counted(left_out)), names


def _names(path: object, stem: str) -> tuple[str, ...]:
    """What the picture may be called. `imagePath` is relative to the JSON file, on Windows with backslashes."""
    made = [stem] if stem else []
    if isinstance(path, str) and path:
        parts = posixpath.normpath(posixpath.join(posixpath.dirname(stem), path.replace("\\", "/"))).split("/")
        made.insert(0, "/".join(part for part in parts if part != ".."))
    return tuple(name for name in made if name)


def _shape(entry: dict[str, Any], kind: str, place: str) -> Shape:
    label = entry.get("label")
    group, flags = entry.get("group_id"), entry.get("flags")
    if not isinstance(label, str) or not label:
        raise PromptError("has no label", place=place, remedy=_FORM)
    ticked = isinstance(flags, dict) and flags.get(NEGATIVE_ATTRIBUTE) is True
    more: dict[str, Any] = {
        "group": 0 if group is None else whole(group, f"{place}.group_id") + 1,  # 0 is a group there
        "negative": ticked or (kind != "rectangle" and label in NEGATIVE_LABELS),
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
    made = []
    for index, pair in enumerate(given):
        if not isinstance(pair, list) or len(pair) != 2:
            raise PromptError("is not [x, y]", place=f"{place}[{index}]")
        made.append((number(pair[0], f"{place}[{index}]"), number(pair[1], f"{place}[{index}]")))
    return tuple(made)
