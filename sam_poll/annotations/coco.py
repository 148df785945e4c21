"""COCO: the boxes of an instances file, or of detections that have their pictures beside them.

The box of an annotation is its prompt; a segmentation is not looked at, and where CVAT has turned a rotated box into a
polygon, the box around it is what stands here. Crowds are left out: their box is around many objects.

What can still go wrong here: JSON is read whole; polygons are let go of while it is read, so that memory is about that
of the boxes and the text.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from sam_poll.annotations import Annotated, Shape, box_shape, faulty
from sam_poll.annotations.reading import (
    MAX_IMAGES,
    MAX_SHAPES,
    counted,
    each_once,
    image_place,
    load_json,
    number,
    whole,
)
from sam_poll.complaints import show
from sam_poll.errors import PromptError
from sam_poll.types import Size

_KEPT = ("image_id", "category_id", "bbox", "iscrowd")
_WHOLE = "a COCO file has `images`, `annotations` and `categories`; export it again"
_RESULTS = "a list of results names no pictures: put it as `annotations` into a file with `images` and `categories`"


def lean(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object while it is read: of an annotation, what is looked at here and nothing else."""
    made = dict(pairs)
    if "bbox" in made and "image_id" in made:
        kept = {key: made[key] for key in _KEPT if key in made}
        return kept if "images" not in made else made
    return made


def read(data: bytes) -> list[Annotated]:
    """The pictures of a COCO file, in its order. PromptError with the place (`annotations[3].bbox`) and the remedy."""
    return read_document(load_json(data, lean))


def read_document(document: Any) -> list[Annotated]:
    """As `read`, of JSON that was loaded with `lean`."""
    if isinstance(document, list):
        raise PromptError("is a list of results", place="the COCO file", remedy=_RESULTS)
    if not isinstance(document, dict):
        raise PromptError(f"is no COCO file: it is {show(document)}", place="the COCO file", remedy=_WHOLE)
    names = _categories(_entries(document, "categories"))
    images = _images(_entries(document, "images"))
    shapes: dict[Any, list[Shape]] = {}
    left_out: dict[Any, Counter[str]] = {}
    for index, entry in enumerate(_entries(document, "annotations")):
        place = f"annotations[{index}]"
        image = _looked_up(images, entry, "image_id", place)
        reason = _not_asked(entry)
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
        raise PromptError("is missing" if entries is None else "is not a list", place=key, remedy=_WHOLE)
    most = MAX_SHAPES if key == "annotations" else MAX_IMAGES
    if len(entries) > most:
        raise PromptError(f"has more than {most:,} entries", place=key, remedy="export fewer pictures")
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise PromptError(f"is {show(entry)}, not an object", place=f"{key}[{index}]", remedy=_WHOLE)
    return entries


def _key(value: object, place: str) -> int | str:
    """An id as COCO's tools write it: a number, with some of them a text."""
    return value if isinstance(value, str) else whole(value, place)


def _looked_up(known: dict[Any, Any], entry: dict[str, Any], field: str, place: str) -> int | str:
    key = _key(entry.get(field), f"{place}.{field}")
    if key not in known:
        where = "images" if field == "image_id" else "categories"
        raise PromptError(f"{where} has no id {show(key)}", place=f"{place}.{field}", remedy=_WHOLE)
    return key


def _categories(entries: list[dict[str, Any]]) -> dict[int | str, str]:
    names: dict[int | str, str] = {}
    for index, entry in enumerate(entries):
        place, name = f"categories[{index}]", entry.get("name")
        if not isinstance(name, str) or not name:
            raise PromptError("has no name", place=place, remedy=_WHOLE)
        key = _key(entry.get("id"), f"{place}.id")
        if names.setdefault(key, name) != name:
            raise PromptError(f"the id {show(key)} is given twice", place=place, remedy=_WHOLE)
    return names


def _images(entries: list[dict[str, Any]]) -> dict[int | str, tuple[str, Size | None]]:
    images: dict[int | str, tuple[str, Size | None]] = {}
    for index, entry in enumerate(entries):
        place, name = f"images[{index}]", entry.get("file_name")
        if not isinstance(name, str) or not name:
            raise PromptError("has no file_name", place=place, remedy=_WHOLE)
        key = _key(entry.get("id"), f"{place}.id")
        if key in images:
            raise PromptError(f"the id {show(key)} is given twice", place=place, remedy=_WHOLE)
        size = None
        if entry.get("width") is not None or entry.get("height") is not None:
            at = image_place(name)
            size = Size(*(whole(entry.get(side), f"{at}, {side}", least=1) for side in ("width", "height")))
        images[key] = (name, size)
    return images


def _not_asked(entry: dict[str, Any]) -> str | None:
    """Why an annotation is no prompt; None: it is one."""
    if entry.get("iscrowd"):
        return "crowd"
    return "boxless annotation" if entry.get("bbox") in (None, []) else None


def _corners(bbox: object, place: str) -> tuple[float, float, float, float]:
    if not isinstance(bbox, list) or len(bbox) != 4:
        raise PromptError("is not [x, y, width, height]", place=place, remedy=_WHOLE)
    x, y, width, height = (number(value, f"{place}[{index}]") for index, value in enumerate(bbox))
    return x, y, x + width, y + height
