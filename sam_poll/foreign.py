"""Files that people take for prompts: annotation files of other tools, named, with the command that reads them.

One place for the parser of prompt files, the reader of a dropped `annotations.xml` and `sam-poll cvat prompts`. Pure:
no I/O. A valid prompt file is never named here: each rule below needs a key that prompt files do not have.

What can still go wrong here: a file is known by its keys or by its root element; one that lacks them stays unnamed.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sam_poll.complaints import quoted
from sam_poll.errors import PromptError
from sam_poll.xml_safely import root_tag

READ_BY = "`sam-poll cvat prompts FILE --images DIR -o IN` makes prompts of it"
_HEAD = 1 << 18  # bytes looked at of a file that is too large to be a prompt
_TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)"(\s*:)?|[][{}]')


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of foreign file: its name with an article, and how to get prompts out of it."""

    name: str
    remedy: str = READ_BY

    def refusal(self, place: str, expected: str = "a prompt file") -> PromptError:
        """The error for a file of this kind where another one was expected."""
        return PromptError(f"this is {self.name}, not {expected}", place=place, remedy=self.remedy)


LABELME = Kind("a labelme file")
COCO = Kind("a COCO file")
OPEX = Kind("an OPEX file")
VOC = Kind("a Pascal VOC file")
CVAT = Kind("a `CVAT for images` file", f"drop it into `in` as `annotations.xml`, or {READ_BY}")
COCO_RESULTS = Kind(
    "a list of COCO results", f"put it as `annotations` into a file with `images` and `categories`; {READ_BY}"
)
LABEL_STUDIO = Kind("a Label Studio export", f"export it there as COCO or Pascal VOC XML, unpack it; {READ_BY}")
DATUMARO = Kind("a Datumaro file", f"export the task as `CVAT for images 1.1` or COCO instead; {READ_BY}")

_LABEL_STUDIO_TASK = ("annotations", "predictions", "completions")


def of_json(document: Any) -> Kind | None:
    """Which foreign kind a JSON document is; None: none that is known here, or a prompt file."""
    if isinstance(document, list):
        first = document[0] if document and isinstance(document[0], dict) else {}
        if "image_id" in first and {"bbox", "segmentation", "category_id"} & first.keys():
            return COCO_RESULTS
        return LABEL_STUDIO if _is_label_studio(first.keys()) else None
    if not isinstance(document, dict):
        return None
    objects = document.get("objects")
    if isinstance(objects, list) and any(_is_found(entry) for entry in objects):
        return OPEX
    return _of_keys(document.keys())


def of_text(text: str) -> Kind | None:
    """Which foreign kind a JSON text is by its first keys, its end maybe missing."""
    head, depth, keys = text[:_HEAD], 0, set[str]()
    listed = head.lstrip("\ufeff \t\r\n").startswith("[")
    for found in _TOKEN.finditer(head):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth == 1 + listed and found[2]:
            keys.add(found[1])
    return of_json([dict.fromkeys(keys)]) if listed else _of_keys(keys)


def of_xml(data: bytes) -> Kind | None:
    """Which foreign kind an XML document is by its root element; None: no XML, or none that is known here."""
    return of_root(root_tag(data))


def of_root(tag: str | None) -> Kind | None:
    """Which foreign kind a document with this root element is."""
    if tag is None:
        return None
    return {"annotations": CVAT, "annotation": VOC}.get(tag) or Kind(f"XML with the root <{quoted(tag)[1:-1]}>", _XML)


_XML = f"of XML, `CVAT for images 1.1` and Pascal VOC can be read: {READ_BY}"


def _of_keys(keys: Collection[str]) -> Kind | None:
    if "shapes" in keys and {"imagePath", "imageData", "imageWidth", "imageHeight"} & set(keys):
        return LABELME
    if "categories" in keys and "items" in keys:
        return DATUMARO
    if "images" in keys and {"annotations", "categories"} & set(keys):
        return COCO
    if "objects" in keys and "timestamp" in keys:
        return OPEX
    return LABEL_STUDIO if _is_label_studio(keys) else None


def _is_label_studio(keys: Collection[str]) -> bool:
    """A task of its JSON, or an entry of its JSON-MIN."""
    return ("data" in keys and any(key in keys for key in _LABEL_STUDIO_TASK)) or (
        "annotation_id" in keys and "annotator" in keys
    )


def _is_found(entry: Any) -> bool:
    """Whether an entry of `objects` has OPEX's box."""
    box = entry.get("bbox") if isinstance(entry, dict) else None
    return isinstance(box, dict) and {"top", "left"} <= box.keys()
