"""Joins the `.cvat.xml` files of many pictures into the one file that a CVAT task imports.

An import replaces all annotations of a task, so pictures cannot be imported one by one. Images are sorted by name and
numbered from 0; several jobs on one picture become one `<image>`, their objects in the order of their files' names, and
groups are numbered anew, from 1 in each image, so that those of two files stay two. The same files give the same bytes,
in whatever order they come.

Each file is parsed and forgotten again: what is held is the finished text of its objects, so memory is about the size
of the result. A document type declaration is refused before anything in it can expand.

What can still go wrong here: labels are not checked against any task, and two runs over one picture under two names are
two images. Numbers inside the objects are taken as they are.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from functools import partial
from typing import TypeAlias

from sam_poll import xml_safely
from sam_poll.errors import InputError
from sam_poll.formats import Documents, Gathered, gathered
from sam_poll.types import Size

_Shapes: TypeAlias = tuple[bytes, int]  # the XML of some objects, and how many groups they make
SHAPES = frozenset({"box", "cuboid", "ellipse", "mask", "points", "polygon", "polyline", "skeleton", "tag"})
_HEAD = b"<?xml version='1.0' encoding='utf-8'?>\n<annotations>\n  <version>1.1</version>\n"
_TAIL = b"</annotations>\n"
_GROUP = re.compile(rb"\0(\d+)\0")  # stands for a group's number while it is not known; XML holds no such character


def merge_cvat(documents: Documents) -> bytes:
    """One CVAT 1.1 XML from (file name, content) pairs. Raises InputError with the file's name as its place when one is
    not XML, not CVAT 1.1 for images, or contradicts another about a picture's size."""
    return b"".join(merged_cvat(documents))


def merged_cvat(documents: Documents) -> Iterator[bytes]:
    """`merge_cvat` in pieces, to be written one after another. The first comes when all documents have been read."""
    images: dict[str, Gathered[_Shapes]] = {}
    for file, body in documents:
        _gather(images, file, body)
    yield _HEAD
    for number, name in enumerate(sorted(images)):
        yield _image_xml(number, name, images.pop(name))
    yield _TAIL


def _gather(images: dict[str, Gathered[_Shapes]], file: str, body: bytes) -> None:
    for element in _image_elements(file, body):
        name, size = _name_and_size(file, element)
        image = gathered(images, name, size, file)
        groups: dict[str, int] = {}
        try:
            xml = b"".join(_shape_xml(file, shape, groups) for shape in element)
        except RecursionError:
            raise InputError("is nested deeper than any CVAT file", place=file) from None
        image.pieces.append((file, (xml, len(groups))))


def _image_elements(file: str, body: bytes) -> list[ET.Element]:
    """The `<image>` elements of one file."""
    try:
        root = xml_safely.parse(body)
    except InputError as error:
        raise InputError(error.reason, place=file) from None
    if root.tag != "annotations":
        raise InputError(f"is not a CVAT file: its root is <{root.tag}>, not <annotations>", place=file)
    version = (root.findtext("version") or "").strip()
    if version != "1.1":
        raise InputError(f"is CVAT XML version {version or 'unknown'}, not 1.1", place=file)
    foreign = sorted({child.tag for child in root} - {"version", "meta", "image"})
    if foreign:
        raise InputError(f"<{foreign[0]}> does not belong into annotations of images", place=file)
    return root.findall("image")


def _name_and_size(file: str, element: ET.Element) -> tuple[str, Size]:
    name = element.get("name")
    if not name:
        raise InputError("an <image> has no name", place=file)
    try:
        size = Size(int(element.get("width", "")), int(element.get("height", "")))
    except ValueError:
        raise InputError(f"image {name!r} has no width and height in whole pixels", place=file) from None
    return name, size


def _shape_xml(file: str, shape: ET.Element, groups: dict[str, int]) -> bytes:
    """One object as it will stand in the result, its indent included, but for the number of its group."""
    if shape.tag not in SHAPES:
        raise InputError(f"<{shape.tag}> does not belong into an <image>", place=file)
    if not shape.get("label"):
        raise InputError(f"a <{shape.tag}> has no label", place=file)
    group = shape.get("group_id", "0")
    if group.strip("0"):  # CVAT writes 0 for none
        shape.set("group_id", f"\0{groups.setdefault(group, len(groups) + 1)}\0")
    ET.indent(shape, level=2)
    shape.tail = None
    return b"    " + ET.tostring(shape, encoding="utf-8") + b"\n"


def _image_xml(number: int, name: str, image: Gathered[_Shapes]) -> bytes:
    width, height = map(str, image.size)
    empty = ET.Element("image", id=str(number), name=name, width=width, height=height)
    head = ET.tostring(empty, encoding="utf-8", short_empty_elements=False).removesuffix(b"</image>")
    shapes, used = [], 0
    for xml, groups in image.in_order():
        shapes.append(_GROUP.sub(partial(_group_number, used), xml))
        used += groups
    return b"  " + head + b"\n" + b"".join(shapes) + b"  </image>\n"


def _group_number(used: int, found: re.Match[bytes]) -> bytes:
    return b"%d" % (used + int(found[1]))
