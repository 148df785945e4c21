"""Pascal VOC's XML, one file a picture: the `bndbox` of each object. LabelMe's XML has the same root and no boxes.

Corners are taken as edges, as CVAT, Roboflow and labelImg write them. The data sets of the VOC challenge count pixels
from 1, and name the last one inside: there a box is one pixel off, which is less than people draw exactly.

What can still go wrong here: `filename` is as the annotator's machine had it; where the picture has been renamed since,
the XML file's own name must tell.
"""

from __future__ import annotations

import posixpath
import xml.etree.ElementTree as ET
from collections import Counter

from sam_poll import xml_safely
from sam_poll.annotations import Annotated, Shape, box_shape, faulty
from sam_poll.annotations.reading import MAX_SHAPES, counted, number, size_of
from sam_poll.complaints import quoted
from sam_poll.errors import InputError, PromptError
from sam_poll.types import Size

_FORM = "a Pascal VOC file has `filename`, and an `object` with `name` and `bndbox` for each box"
_FILE = "the XML file"


def read(data: bytes, stem: str = "") -> tuple[Annotated, tuple[str, ...]]:
    """Read one Pascal VOC file called `stem` (its path without the ending).

    Returns the picture, and all the names that it may have, most trustworthy first. PromptError with the place
    (`object 3`) and the remedy.
    """
    try:
        root: ET.Element = xml_safely.parse(data)
    except InputError as error:
        raise PromptError(error.reason, place=_FILE, remedy="export it again") from None
    if root.tag != "annotation":
        reason = f"is no Pascal VOC file: its root is <{quoted(root.tag)[1:-1]}>, not <annotation>"
        raise PromptError(reason, place=_FILE, remedy=_FORM)
    entries = root.findall("object")
    if len(entries) > MAX_SHAPES:
        raise PromptError(f"has more than {MAX_SHAPES:,} objects", place=_FILE, remedy="split the file")
    names = _names(root, stem)
    if not names:
        raise PromptError("does not say which picture it is about", place="filename", remedy=_FORM)
    shapes: list[Shape] = []
    left_out: Counter[str] = Counter()
    for position, entry in enumerate(entries, start=1):
        box = entry.find("bndbox")
        if box is None:
            left_out[_unboxed(entry)] += 1
            continue
        shapes.append(_shape(entry, box, f"object {position}"))
    return Annotated(names[0], _size(root), tuple(shapes), counted(left_out)), names


def _names(root: ET.Element, stem: str) -> tuple[str, ...]:
    filename = _text(root, "filename").replace("\\", "/")
    made = []
    if filename:
        made.append(posixpath.join(posixpath.dirname(stem), filename.lstrip("/")))
    return tuple(dict.fromkeys(name for name in (*made, filename, stem) if name))


def _size(root: ET.Element) -> Size | None:
    size = root.find("size")
    width, height = ("", "") if size is None else (_text(size, "width"), _text(size, "height"))
    # Tools that have not opened the picture write 0.
    return None if width in ("", "0") and height in ("", "0") else size_of(width, height, "size/width", "size/height")


def _shape(entry: ET.Element, box: ET.Element, place: str) -> Shape:
    label = _text(entry, "name")
    if not label:
        raise PromptError("has no name", place=place, remedy=_FORM)
    try:
        x0, y0, x1, y1 = (number(_text(box, key), f"{place}, {key}") for key in ("xmin", "ymin", "xmax", "ymax"))
    except PromptError as error:
        return faulty("box", label, error)
    return box_shape((x0, y0, x1, y1), label)


def _unboxed(entry: ET.Element) -> str:
    if entry.find("robndbox") is not None:
        return "turned box"
    return "polygon" if entry.find("polygon") is not None else "boxless object"


def _text(parent: ET.Element, tag: str) -> str:
    return (parent.findtext(tag) or "").strip()
