"""COCO: the boxes of an instances file, or of detections together with their pictures.

The box of an annotation becomes a prompt; its segmentation is ignored, and where CVAT has turned a
rotated box into a polygon, the box is the one around it. Crowds are left out: their box is around
many objects.

Limitations: JSON is read as a whole; polygons are dropped while it is parsed, so that memory is
about that of the boxes and the text.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from sam_poll.core.errors import PromptError
from sam_poll.core.types import Size
from sam_poll.core.validation import describe_value
from sam_poll.prompts.importers.common import (
    MAX_IMAGES,
    MAX_SHAPES,
    counted,
    each_once,
    image_place,
    load_json,
    number,
    whole,
)
from sam_poll.prompts.importers.shapes import Annotated, Shape, box_shape, faulty

_KEPT = ("image_id", "category_id", "bbox", "iscrowd")
_WHOLE = "a COCO file has `images`, `annotations` and `categories`; export it again"
_RESULTS = (
    "a list of results names no pictures: "
    "put it as `annotations` into a file with `images` and `categories`"
)


def lean(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object during parsing; an annotation keeps the needed keys only."""
    parsed = dict(pairs)
    if "bbox" in parsed and "image_id" in parsed:
        kept = {key: parsed[key] for key in _KEPT if key in parsed}
        return kept if "images" not in parsed else parsed
    return parsed


def read(data: bytes) -> list[Annotated]:
    """Return the pictures of a COCO file, in its order.

    Raises PromptError with the place (`annotations[3].bbox`) and the remedy.
    """
    return read_document(load_json(data, lean))


def read_document(document: Any) -> list[Annotated]:
    """Return the pictures of JSON that was loaded with `lean`, as `read`."""
    if isinstance(document, list):
        raise PromptError("is a list of results", place="the COCO file", remedy=_RESULTS)
    if not isinstance(document, dict):
        raise PromptError(
            f"is not a COCO file: it is {describe_value(document)}",
            place="the COCO file",
            remedy=_WHOLE,
        )
    names = _categories(_entries(document, "categories"))
    images = _images(_entries(document, "images"))
    shapes: dict[Any, list[Shape]] = {}
    left_out: dict[Any, Counter[str]] = {}
    for index, entry in enumerate(_entries(document, "annotations")):
        place = f"annotations[{index}]"
        image = _looked_up(images, entry, "image_id", place)
        reason = _left_out_reason(entry)
        if reason:
            left_out.setdefault(image, Counter())[reason] += 1
            continue
        label = names[_looked_up(names, entry, "category_id", place)]
        try:
            shape = box_shape(_corners(entry["bbox"], f"{place}.bbox"), label)
        except PromptError as error:
            shape = faulty("box", label, error)
        shapes.setdefault(image, []).append(shape)
    return each_once(
        Annotated(name, size, tuple(shapes.pop(key, ())), counted(left_out.pop(key, Counter())))
        for key, (name, size) in images.items()
    )


def _entries(document: dict[str, Any], key: str) -> list[dict[str, Any]]:
    entries = document.get(key)
    if not isinstance(entries, list):
        raise PromptError(
            "is missing" if entries is None else "is not a list", place=key, remedy=_WHOLE
        )
    most = MAX_SHAPES if key == "annotations" else MAX_IMAGES
    if len(entries) > most:
        raise PromptError(
            f"has more than {most:,} entries", place=key, remedy="export fewer pictures"
        )
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise PromptError(
                f"is {describe_value(entry)}, not an object", place=f"{key}[{index}]", remedy=_WHOLE
            )
    return entries


def _key(value: object, place: str) -> int | str:
    """Return an id: a whole number of any size, or a text as some tools write it."""
    if isinstance(value, str) or (type(value) is int and value >= 0):
        return value
    return whole(value, place)


def _looked_up(known: dict[Any, Any], entry: dict[str, Any], field: str, place: str) -> int | str:
    key = _key(entry.get(field), f"{place}.{field}")
    if key not in known:
        where = "images" if field == "image_id" else "categories"
        raise PromptError(
            f"{where} has no id {describe_value(key)}", place=f"{place}.{field}", remedy=_WHOLE
        )
    return key


def _categories(entries: list[dict[str, Any]]) -> dict[int | str, str]:
    names: dict[int | str, str] = {}
    for index, entry in enumerate(entries):
        place, name = f"categories[{index}]", entry.get("name")
        if not isinstance(name, str) or not name:
            raise PromptError("has no name", place=place, remedy=_WHOLE)
        key = _key(entry.get("id"), f"{place}.id")
        if names.setdefault(key, name) != name:
            raise PromptError(
                f"the id {describe_value(key)} is given twice", place=place, remedy=_WHOLE
            )
    return names


def _images(entries: list[dict[str, Any]]) -> dict[int | str, tuple[str, Size | None]]:
    images: dict[int | str, tuple[str, Size | None]] = {}
    for index, entry in enumerate(entries):
        place, name = f"images[{index}]", entry.get("file_name")
        if not isinstance(name, str) or not name:
            raise PromptError("has no file_name", place=place, remedy=_WHOLE)
        key = _key(entry.get("id"), f"{place}.id")
        if key in images:
            raise PromptError(
                f"the id {describe_value(key)} is given twice", place=place, remedy=_WHOLE
            )
        size = None
        if entry.get("width") is not None or entry.get("height") is not None:
            at = image_place(name)
            size = Size(
                *(whole(entry.get(side), f"{at}, {side}", least=1) for side in ("width", "height"))
            )
        images[key] = (name, size)
    return images


def _left_out_reason(entry: dict[str, Any]) -> str | None:
    """Return why an annotation is no prompt; None where it is one."""
    if entry.get("iscrowd"):
        return "crowd"
    return "boxless annotation" if entry.get("bbox") in (None, []) else None


def _corners(bbox: object, place: str) -> tuple[float, float, float, float]:
    if not isinstance(bbox, list) or len(bbox) != 4:
        raise PromptError("is not [x, y, width, height]", place=place, remedy=_WHOLE)
    x, y, width, height = (number(value, f"{place}[{index}]") for index, value in enumerate(bbox))
    return x, y, x + width, y + height
