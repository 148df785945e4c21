"""Recognise annotation files of other tools that are mistaken for prompt files.

They are named, with the command that converts them. Used by the parser of prompt files, the reader
of a dropped `annotations.xml`, and `sam-poll cvat prompts`. Does no I/O. A valid prompt file is
never recognised as foreign: each rule below requires a key that prompt files do not have.

Limitations: a file is recognised by its keys or its root element; one without them is not.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sam_poll.core.errors import PromptError
from sam_poll.core.validation import quoted
from sam_poll.core.xml_reader import root_tag

READ_BY = "`sam-poll cvat prompts FILE --images DIR -o IN` makes prompts of it"
_HEAD = 1 << 18  # characters examined of a file that is too large to be a prompt file
_TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)"(\s*:)?|[][{}]')


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of foreign file: its name with an article, and the remedy."""

    name: str
    remedy: str = READ_BY

    def refusal(self, place: str, expected: str = "a prompt file") -> PromptError:
        """Return the error for a file of this kind where another one was expected."""
        return PromptError(f"this is {self.name}, not {expected}", place=place, remedy=self.remedy)


LABELME = Kind("a labelme file")
COCO = Kind("a COCO file")
OPEX = Kind("an OPEX file")
VOC = Kind("a Pascal VOC file")  # or LabelMe's XML, which has the same root
CVAT = Kind("a `CVAT for images` file", f"drop it into `in` as `annotations.xml`, or {READ_BY}")
COCO_RESULTS = Kind(
    "a list of COCO results",
    f"put it as `annotations` into a file with `images` and `categories`; {READ_BY}",
)
LABEL_STUDIO = Kind(
    "a Label Studio export", f"export it there as COCO or Pascal VOC XML, unpack it; {READ_BY}"
)
DATUMARO = Kind("a Datumaro file")

_LABEL_STUDIO_TASK = ("annotations", "predictions", "completions")


def of_json(document: Any) -> Kind | None:
    """Return the foreign kind of a JSON document; None for a prompt file or an unknown kind."""
    if isinstance(document, list):
        first = document[0] if document and isinstance(document[0], dict) else {}
        if "image_id" in first and {"bbox", "segmentation", "category_id"} & first.keys():
            return COCO_RESULTS
        return LABEL_STUDIO if _is_label_studio(first.keys()) else None
    if not isinstance(document, dict):
        return None
    objects = document.get("objects")
    if isinstance(objects, list) and any(_has_opex_box(entry) for entry in objects):
        return OPEX
    return _of_keys(document.keys())


def of_text(text: str) -> Kind | None:
    """Return the foreign kind of a JSON text by its first keys; the end may be missing."""
    head = text[:_HEAD]
    depth = 0
    keys: set[str] = set()
    is_list = head.lstrip("\ufeff \t\r\n").startswith("[")
    for token in _TOKEN.finditer(head):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if depth == 1 + is_list and token[2]:
            keys.add(token[1])
    return of_json([dict.fromkeys(keys)]) if is_list else _of_keys(keys)


def of_xml(data: bytes) -> Kind | None:
    """Return the foreign kind of an XML document by its root element; None for no XML."""
    return of_root(root_tag(data))


def of_root(tag: str | None) -> Kind | None:
    """Return the foreign kind of a document with this root element."""
    if tag is None:
        return None
    return {"annotations": CVAT, "annotation": VOC}.get(tag) or Kind(
        f"XML with the root <{quoted(tag)[1:-1]}>", _XML
    )


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
    """Return whether these are the keys of a Label Studio task (JSON) or entry (JSON-MIN)."""
    return ("data" in keys and any(key in keys for key in _LABEL_STUDIO_TASK)) or (
        "annotation_id" in keys and "annotator" in keys
    )


def _has_opex_box(entry: Any) -> bool:
    """Return whether an entry of `objects` has OPEX's box."""
    box = entry.get("bbox") if isinstance(entry, dict) else None
    return isinstance(box, dict) and {"top", "left"} <= box.keys()
