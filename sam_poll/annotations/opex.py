"""OPEX, the predictions of Waikato's tools and our own `.opex.json`: the boxes of what was found in one picture.

`bbox` names the first and last row and column, both inclusive; as edges, right and bottom are one more. A file hardly
says which picture it is about: ours has its name in `meta.image`; `id` is, by tool, a file name, a time or a camera;
else the file's own name must tell.

What can still go wrong here: one object in several pieces is several objects in OPEX, and so becomes several prompts.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from sam_poll.annotations import Annotated, Shape, box_shape, faulty
from sam_poll.annotations.reading import MAX_SHAPES, counted, load_json, number, whole
from sam_poll.complaints import show
from sam_poll.errors import PromptError
from sam_poll.types import Size

_FORM = "OPEX has `objects`, each with `label` and a `bbox` of top, left, bottom and right"


def is_opex(document: Any) -> bool:
    """Whether JSON looks like OPEX, and not like one of our prompt files, which have `objects` too."""
    if not isinstance(document, dict) or not isinstance(document.get("objects"), list):
        return False
    objects = document["objects"]
    return "id" in document or "timestamp" in document or any(isinstance(o, dict) and "bbox" in o for o in objects)


def read(data: bytes, stem: str = "") -> tuple[Annotated, tuple[str, ...]]:
    """The picture of one OPEX file called `stem` (without its ending), and all the names that it may have, most
    trustworthy first; the picture's own name is the first of these. PromptError with the place and the remedy."""
    return read_document(load_json(data), stem)


def read_document(document: Any, stem: str = "") -> tuple[Annotated, tuple[str, ...]]:
    """As `read`, of JSON that was loaded."""
    if not is_opex(document):
        raise PromptError(f"is no OPEX: it is {show(document)}", place="the OPEX file", remedy=_FORM)
    given = document.get("meta")
    meta: dict[str, Any] = given if isinstance(given, dict) else {}
    told = (meta.get("image"), document.get("id"), stem)
    names = tuple(dict.fromkeys(name for name in told if isinstance(name, str) and name))
    if not names:
        raise PromptError("does not say which picture it is about", place="id", remedy="call it as its picture")
    if len(document["objects"]) > MAX_SHAPES:
        raise PromptError(f"has more than {MAX_SHAPES:,} objects", place="objects", remedy="split the file")
    shapes: list[Shape] = []
    left_out: Counter[str] = Counter()
    for index, entry in enumerate(document["objects"]):
        place = f"objects[{index}]"
        if not isinstance(entry, dict):
            raise PromptError(f"is {show(entry)}, not an object", place=place, remedy=_FORM)
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
        raise PromptError(f"is {show(bbox)}, not an object", place=place, remedy=_FORM)
    left, top, right, bottom = (number(bbox.get(k), f"{place}.{k}") for k in ("left", "top", "right", "bottom"))
    return left, top, right + 1, bottom + 1


def _size(meta: dict[str, Any]) -> Size | None:
    """What our own files say of their picture; those of others have no such words, or mean something else by them."""
    if "image" not in meta or "width" not in meta or "height" not in meta:
        return None
    return Size(*(whole(meta[side], f"meta.{side}", least=1) for side in ("width", "height")))
