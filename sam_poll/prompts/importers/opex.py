"""OPEX, the predictions of Waikato's tools and of our own `.opex.json`: the boxes of one picture.

`bbox` names the first and last row and column, both inclusive; as edges, right and bottom are one
more. The picture's name is in `meta.image` of our own files; `id` is, by tool, a file name, a time
or a camera; otherwise the file's own name is used.

Limitations: one object in several parts is several objects in OPEX, and so becomes several prompts.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from sam_poll.core.errors import PromptError
from sam_poll.core.types import Size
from sam_poll.core.validation import describe_value
from sam_poll.prompts.importers.common import MAX_SHAPES, counted, load_json, number, whole
from sam_poll.prompts.importers.shapes import Annotated, Shape, box_shape, faulty

_FORM = "OPEX has `objects`, each with `label` and a `bbox` of top, left, bottom and right"


def is_opex(document: Any) -> bool:
    """Return whether JSON is OPEX, and not a prompt file, which has `objects` too."""
    if not isinstance(document, dict) or not isinstance(document.get("objects"), list):
        return False
    objects = document["objects"]
    return (
        "id" in document
        or "timestamp" in document
        or any(isinstance(o, dict) and "bbox" in o for o in objects)
    )


def read(data: bytes, stem: str = "") -> tuple[Annotated, tuple[str, ...]]:
    """Read one OPEX file called `stem` (without its extension).

    Returns the picture, and all its possible names, most reliable first; the first is the picture's
    own. Raises PromptError with the place and the remedy.
    """
    return read_document(load_json(data), stem)


def read_document(document: Any, stem: str = "") -> tuple[Annotated, tuple[str, ...]]:
    """Read one OPEX file from parsed JSON, as `read`."""
    if not is_opex(document):
        raise PromptError(
            f"is not OPEX: it is {describe_value(document)}", place="the OPEX file", remedy=_FORM
        )
    given = document.get("meta")
    meta: dict[str, Any] = given if isinstance(given, dict) else {}
    candidates = (meta.get("image"), document.get("id"), stem)
    names = tuple(dict.fromkeys(name for name in candidates if isinstance(name, str) and name))
    if not names:
        raise PromptError(
            "does not name its picture", place="id", remedy="name the file as its picture"
        )
    if len(document["objects"]) > MAX_SHAPES:
        raise PromptError(
            f"has more than {MAX_SHAPES:,} objects", place="objects", remedy="split the file"
        )
    shapes: list[Shape] = []
    left_out: Counter[str] = Counter()
    for index, entry in enumerate(document["objects"]):
        place = f"objects[{index}]"
        if not isinstance(entry, dict):
            raise PromptError(
                f"is {describe_value(entry)}, not an object", place=place, remedy=_FORM
            )
        if entry.get("bbox") is None:
            left_out["boxless object"] += 1
        else:
            label = _label(entry, place)
            try:
                shapes.append(box_shape(_corners(entry["bbox"], f"{place}.bbox"), label))
            except PromptError as error:
                shapes.append(faulty("box", label, error))
    return Annotated(names[0], _size(meta), tuple(shapes), counted(left_out)), names


def _label(entry: dict[str, Any], place: str) -> str:
    label = entry.get("label")
    if not isinstance(label, str) or not label:
        raise PromptError("has no label", place=place, remedy=_FORM)
    return label


def _corners(bbox: object, place: str) -> tuple[float, float, float, float]:
    if not isinstance(bbox, dict):
        raise PromptError(f"is {describe_value(bbox)}, not an object", place=place, remedy=_FORM)
    left, top, right, bottom = (
        number(bbox.get(k), f"{place}.{k}") for k in ("left", "top", "right", "bottom")
    )
    return left, top, right + 1, bottom + 1


def _size(meta: dict[str, Any]) -> Size | None:
    """Return the picture's size from our own files; the keys of others may have another meaning."""
    if "image" not in meta or "width" not in meta or "height" not in meta:
        return None
    return Size(*(whole(meta[side], f"meta.{side}", least=1) for side in ("width", "height")))
