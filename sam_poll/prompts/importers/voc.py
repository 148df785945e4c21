"""Pascal VOC's XML and LabelMe's, one file a picture, with the same root: the box of each object.

VOC has a `bndbox`; LabelMe, as CVAT exports it, a `polygon` of four corners and the type
`bounding_box`. CVAT writes the unrotated box and its `rotation` as an attribute; the prompt is then
the upright box around the rotated one. Objects that LabelMe marks as deleted are ignored.

Corners are taken as edges, as CVAT, Roboflow and labelImg write them. The data sets of the VOC
challenge count pixels from 1, and name the last one inside: there a box is one pixel off, which is
less than the accuracy of hand-drawn boxes.

Limitations: `filename` is a path on the annotator's machine; where the picture has been renamed
since, it must be found by the XML file's own name.
"""

from __future__ import annotations

import posixpath
import xml.etree.ElementTree as ET
from collections import Counter

from sam_poll.core import xml_reader
from sam_poll.core.errors import InputError, PromptError
from sam_poll.core.types import Size
from sam_poll.core.validation import quoted
from sam_poll.prompts.importers.common import MAX_SHAPES, counted, number, size_of
from sam_poll.prompts.importers.shapes import Annotated, Shape, box_shape, faulty

_FORM = "a Pascal VOC file has `filename`, and an `object` with `name` and `bndbox` for each box"
_EDGES = ("xmin", "ymin", "xmax", "ymax")
_FILE = "the XML file"


def read(data: bytes, stem: str = "") -> tuple[Annotated, tuple[str, ...]]:
    """Read one Pascal VOC file called `stem` (its path without the extension).

    Returns the picture, and all its possible names, most reliable first. Raises PromptError with
    the place (`object 3`) and the remedy.
    """
    try:
        root: ET.Element = xml_reader.parse(data)
    except InputError as error:
        raise PromptError(error.reason, place=_FILE, remedy="export it again") from None
    if root.tag != "annotation":
        tag = quoted(root.tag)[1:-1]
        reason = f"is not a Pascal VOC file: its root is <{tag}>, not <annotation>"
        raise PromptError(reason, place=_FILE, remedy=_FORM)
    entries = root.findall("object")
    if len(entries) > MAX_SHAPES:
        raise PromptError(
            f"has more than {MAX_SHAPES:,} objects", place=_FILE, remedy="split the file"
        )
    names = _names(root, stem)
    if not names:
        raise PromptError("does not name its picture", place="filename", remedy=_FORM)
    size = _size(root)
    shapes: list[Shape] = []
    left_out: Counter[str] = Counter()
    for position, entry in enumerate(entries, start=1):
        if _text(entry, "deleted") == "1":
            continue
        if entry.find("bndbox") is None and not _is_labelme_box(entry):
            left_out[_unboxed(entry)] += 1
            continue
        shapes.append(_shape(entry, size, f"object {position}"))
    return Annotated(names[0], size, tuple(shapes), counted(left_out)), names


def _names(root: ET.Element, stem: str) -> tuple[str, ...]:
    filename = _text(root, "filename").replace("\\", "/")
    names = [filename, stem]
    if filename:
        names.insert(0, posixpath.join(posixpath.dirname(stem), filename.lstrip("/")))
    folder = _text(root, "folder").replace("\\", "/")
    if filename and folder and root.find("imagesize") is not None:
        # LabelMe's `folder` is that of the picture; in VOC it is anything.
        names.insert(0, posixpath.join(folder, filename))
    return tuple(dict.fromkeys(name for name in names if name))


def _size(root: ET.Element) -> Size | None:
    """Return the picture's size: VOC's `size`, or LabelMe's `imagesize`."""
    paths = ("size/width", "size/height")
    if root.find("imagesize") is not None:
        paths = ("imagesize/ncols", "imagesize/nrows")
    width, height = (_text(root, path) for path in paths)
    # Tools that have not opened the picture write 0.
    if width in ("", "0") and height in ("", "0"):
        return None
    return size_of(width, height, *paths)


def _is_labelme_box(entry: ET.Element) -> bool:
    return _text(entry, "type") == "bounding_box" and entry.find("polygon/pt") is not None


def _shape(entry: ET.Element, size: Size | None, place: str) -> Shape:
    label = _text(entry, "name")
    if not label:
        raise PromptError("has no name", place=place, remedy=_FORM)
    try:
        rotation = number(_attribute(entry, "rotation") or "0", f"{place}, rotation")
        box = entry.find("bndbox")
        corners = _corners(entry, place) if box is None else _edges(box, place)
    except PromptError as error:
        return faulty("box", label, error)
    return box_shape(corners, label, rotation=rotation, size=size)


def _edges(box: ET.Element, place: str) -> tuple[float, float, float, float]:
    """Return the box of a `bndbox`."""
    x0, y0, x1, y1 = (number(_text(box, key), f"{place}, {key}") for key in _EDGES)
    return x0, y0, x1, y1


def _corners(entry: ET.Element, place: str) -> tuple[float, float, float, float]:
    """Return the box around the corners of LabelMe's `polygon`."""
    corners = entry.findall("polygon/pt")
    xs = [number(_text(corner, "x"), f"{place}, x") for corner in corners]
    ys = [number(_text(corner, "y"), f"{place}, y") for corner in corners]
    return min(xs), min(ys), max(xs), max(ys)


def _attribute(entry: ET.Element, name: str) -> str:
    """Return an attribute that CVAT has written; "" if there is none of this name.

    VOC has an element for each attribute, LabelMe a text: `rotation=45.0, color=red`.
    """
    for attribute in entry.findall("attributes/attribute"):
        if _text(attribute, "name") == name:
            return _text(attribute, "value")
    for pair in _text(entry, "attributes").split(","):
        key, _, value = pair.partition("=")
        if key.strip() == name:
            return value.strip()
    return ""


def _unboxed(entry: ET.Element) -> str:
    for tag, kind in (("robndbox", "turned box"), ("polygon", "polygon"), ("segm", "mask")):
        if entry.find(tag) is not None:
            return kind
    return "boxless object"


def _text(parent: ET.Element, tag: str) -> str:
    return (parent.findtext(tag) or "").strip()
