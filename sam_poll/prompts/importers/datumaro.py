"""Datumaro's JSON, as CVAT's export `Datumaro 1.0` has it: `annotations/SUBSET.json`.

Boxes, also rotated ones, and points are read; other annotations are counted. A point that is not on
its object has one of `NEGATIVE_LABELS`, or a true attribute `negative`.

Limitations: JSON is read as a whole; outlines and masks are dropped while it is parsed.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sam_poll.core.errors import PromptError
from sam_poll.core.types import Size
from sam_poll.core.validation import describe_value
from sam_poll.prompts.importers.common import (
    MAX_IMAGES,
    MAX_SHAPES,
    counted,
    number,
    size_of,
    whole,
)
from sam_poll.prompts.importers.shapes import (
    NEGATIVE_ATTRIBUTE,
    Annotated,
    Shape,
    box_shape,
    faulty,
    is_negative_label,
)

_FORM = "a Datumaro file has `categories` with labels, and `items`; export it again"
_ABSENT = 0  # the visibility of a point that is not in the picture
_KEPT = ("type", "label_id", "group", "attributes", "bbox", "points", "visibility")


def lean(parsed: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object as it is kept in memory: an annotation with the needed keys only."""
    if "type" not in parsed or "label_id" not in parsed:
        return parsed
    kept = {key: parsed[key] for key in _KEPT if key in parsed}
    if kept["type"] != "points":
        kept.pop("points", None)
    return kept


def read_document(document: dict[str, Any]) -> list[tuple[Annotated, tuple[str, ...]]]:
    """Return the pictures of a Datumaro file, each with all its possible names, in its order.

    Raises PromptError with the place (`items[3].annotations[0]`) and the remedy.
    """
    labels = _labels(document.get("categories"))
    items = _list(document.get("items"), "items", MAX_IMAGES)
    pictures = []
    total = 0
    for index, item in enumerate(items):
        place = f"items[{index}]"
        annotations = _list(item.get("annotations", []), f"{place}.annotations", MAX_SHAPES)
        total += len(annotations)
        if total > MAX_SHAPES:
            raise PromptError(
                f"has more than {MAX_SHAPES:,} annotations",
                place="items",
                remedy="export fewer pictures",
            )
        pictures.append(_picture(item, annotations, labels, place))
    return pictures


def _list(value: object, place: str, most: int) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise PromptError(
            f"is {describe_value(value)}, not a list of objects", place=place, remedy=_FORM
        )
    for index, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise PromptError(
                f"is {describe_value(entry)}, not an object",
                place=f"{place}[{index}]",
                remedy=_FORM,
            )
    if len(value) > most:
        raise PromptError(
            f"has more than {most:,} entries", place=place, remedy="export fewer pictures"
        )
    return value


def _labels(categories: object) -> list[str]:
    """Return the labels' names; an annotation has the index of its label."""
    place = "categories.label.labels"
    found: Any = categories
    for key in ("label", "labels"):
        found = found.get(key) if isinstance(found, dict) else None
    names = []
    for index, entry in enumerate(_list(found, place, MAX_SHAPES)):
        name = entry.get("name")
        if not isinstance(name, str) or not name:
            raise PromptError("has no name", place=f"{place}[{index}]", remedy=_FORM)
        names.append(name)
    return names


def _picture(
    item: dict[str, Any], annotations: Sequence[dict[str, Any]], labels: Sequence[str], place: str
) -> tuple[Annotated, tuple[str, ...]]:
    image = item.get("image")
    image = image if isinstance(image, dict) else {}
    names = _names(item.get("id"), image.get("path"))
    if not names:
        raise PromptError("does not name its picture", place=f"{place}.id", remedy=_FORM)
    size = _size(image.get("size"), f"{place}.image.size")
    shapes: list[Shape] = []
    left_out: Counter[str] = Counter()
    for index, entry in enumerate(annotations):
        kind = entry.get("type")
        if kind in ("bbox", "points"):
            shapes.append(_shape(entry, labels, size, f"{place}.annotations[{index}]"))
        else:
            left_out[str(kind)[:40]] += 1
    return Annotated(names[0], size, tuple(shapes), counted(left_out)), names


def _names(key: object, path: object) -> tuple[str, ...]:
    """Return the picture's possible names.

    `id` is the name without its extension; `path` has the extension, but, by Datumaro's version,
    underscores in place of the folders.
    """
    key = key if isinstance(key, str) else ""
    path = path if isinstance(path, str) else ""
    extension = posixpath.splitext(path)[1]
    whole_name = key + extension if key and extension else ""
    return tuple(dict.fromkeys(name for name in (whole_name, path, key) if name))


def _size(given: object, place: str) -> Size | None:
    """Return the picture's size of `[height, width]`; None where the file does not state it."""
    if given is None:
        return None
    if not isinstance(given, list) or len(given) != 2:
        raise PromptError("is not [height, width]", place=place, remedy=_FORM)
    height, width = given
    return size_of(width, height, f"{place}[1]", f"{place}[0]")


def _shape(entry: dict[str, Any], labels: Sequence[str], size: Size | None, place: str) -> Shape:
    index = whole(entry.get("label_id"), f"{place}.label_id")
    if index >= len(labels):
        raise PromptError(f"there is no label {index}", place=f"{place}.label_id", remedy=_FORM)
    label = labels[index]
    attributes = entry.get("attributes")
    attributes = attributes if isinstance(attributes, dict) else {}
    negative = attributes.get(NEGATIVE_ATTRIBUTE) in (True, "true", "True")
    more: dict[str, Any] = {"group": whole(entry.get("group") or 0, f"{place}.group")}
    if entry["type"] == "points":
        more["negative"] = negative or is_negative_label(label)
        try:
            return Shape("points", label, _points(entry, place), **more)
        except PromptError as error:
            return faulty("points", label, error, **more)
    try:
        corners = _corners(entry.get("bbox"), f"{place}.bbox")
        rotation = number(attributes.get("rotation") or 0, f"{place}.attributes.rotation")
    except PromptError as error:
        return faulty("box", label, error, negative=negative, **more)
    return box_shape(corners, label, rotation=rotation, size=size, negative=negative, **more)


def _corners(bbox: object, place: str) -> tuple[float, float, float, float]:
    if not isinstance(bbox, list) or len(bbox) != 4:
        raise PromptError("is not [x, y, width, height]", place=place)
    x, y, width, height = (number(value, f"{place}[{index}]") for index, value in enumerate(bbox))
    return x, y, x + width, y + height


def _points(entry: dict[str, Any], place: str) -> tuple[tuple[float, float], ...]:
    given = entry.get("points")
    if not isinstance(given, list) or not given or len(given) % 2:
        raise PromptError("is not [x, y, x, y, …]", place=f"{place}.points")
    values = [number(value, f"{place}.points[{index}]") for index, value in enumerate(given)]
    pairs = list(zip(values[::2], values[1::2], strict=True))
    visibility = entry.get("visibility")
    if isinstance(visibility, list) and len(visibility) == len(pairs):
        pairs = [pair for pair, seen in zip(pairs, visibility, strict=True) if seen != _ABSENT]
    if not pairs:
        raise PromptError("has no point in the picture", place=f"{place}.points")
    return tuple(pairs)
