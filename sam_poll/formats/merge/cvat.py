"""Merge the `.cvat.xml` files of many pictures into one file that a CVAT task imports.

An import replaces all annotations of a task, so pictures cannot be imported one by one. Images are
sorted by name and numbered beyond the frames of any task; several jobs on one picture become one
`<image>`, their objects in the order of their files' names, and groups are renumbered from 1 in
each image, so that those of two files stay apart. The same files give the same bytes, in any order.

CVAT's import compares names without their extensions: it puts the objects of `dog.jpg` and of
`dog.png` on one of them. A file with both is refused.

Only the encoded text of the objects is kept of each file, so memory is about the size of the
result. A document type declaration is refused.

Limitations: labels are not checked against any task, and two jobs on one picture under two names
are two images. Numbers inside the objects are copied unchanged.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from functools import partial
from typing import TypeAlias

from sam_poll.core import xml_reader
from sam_poll.core.errors import InputError
from sam_poll.core.types import Size
from sam_poll.formats.common import CVAT_FIRST_IMAGE_ID
from sam_poll.formats.merge.common import PictureParts, parts_of, refuse_shared_stems
from sam_poll.formats.registry import Documents

_Shapes: TypeAlias = tuple[bytes, int]  # the XML of some objects, and their number of groups
SHAPES = frozenset(
    {"box", "cuboid", "ellipse", "mask", "points", "polygon", "polyline", "skeleton", "tag"}
)
_HEAD = b"<?xml version='1.0' encoding='utf-8'?>\n<annotations>\n  <version>1.1</version>\n"
_TAIL = b"</annotations>\n"
# Placeholder of a group's final number; XML cannot contain the character 0.
_GROUP = re.compile(rb"\0(\d+)\0")


def merged_cvat(documents: Documents, prefix: str = "") -> Iterator[bytes]:
    """Merge (file name, content) pairs into one CVAT 1.1 XML; yield it in pieces.

    `prefix` is put before the pictures' names. Raises InputError with the file's name as its place
    where a file is not XML, not CVAT 1.1 for images, contradicts another about a picture's size, or
    has a picture whose name differs from another one's in its extension only.
    """
    images = _gathered(documents, prefix)
    refuse_shared_stems(images, "CVAT's import")
    return _pieces(images)


def pictures_xml(documents: Documents, prefix: str = "") -> Iterator[bytes]:
    """Yield what `merged_cvat` does, but accept pictures whose extensions only differ.

    For readers other than CVAT's import.
    """
    return _pieces(_gathered(documents, prefix))


def _pieces(images: dict[str, PictureParts[_Shapes]]) -> Iterator[bytes]:
    yield _HEAD
    for number, name in enumerate(sorted(images), start=CVAT_FIRST_IMAGE_ID):
        yield _image_xml(number, name, images.pop(name))
    yield _TAIL


def _gathered(documents: Documents, prefix: str) -> dict[str, PictureParts[_Shapes]]:
    """Return the objects of all files, by picture."""
    images: dict[str, PictureParts[_Shapes]] = {}
    for file, body in documents:
        _gather(images, file, body, prefix)
    return images


def _gather(images: dict[str, PictureParts[_Shapes]], file: str, body: bytes, prefix: str) -> None:
    for element in _image_elements(file, body):
        name, size = _name_and_size(file, element)
        image = parts_of(images, prefix + name, size, file)
        groups: dict[str, int] = {}
        try:
            xml = b"".join(_shape_xml(file, shape, groups) for shape in element)
        except RecursionError:
            raise InputError("is nested deeper than any CVAT file", place=file) from None
        image.pieces.append((file, (xml, len(groups))))


def _image_elements(file: str, body: bytes) -> list[ET.Element]:
    """Return the `<image>` elements of one file."""
    try:
        root: ET.Element = xml_reader.parse(body)
    except InputError as error:
        raise InputError(error.reason, place=file) from None
    if root.tag != "annotations":
        raise InputError(
            f"is not a CVAT file: its root is <{root.tag}>, not <annotations>", place=file
        )
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
        raise InputError(
            f"image {name!r} has no width and height in whole pixels", place=file
        ) from None
    return name, size


def _shape_xml(file: str, shape: ET.Element, groups: dict[str, int]) -> bytes:
    """Return an object's XML, indented, with a placeholder for its group's number."""
    if shape.tag not in SHAPES:
        raise InputError(f"<{shape.tag}> does not belong into an <image>", place=file)
    if not shape.get("label"):
        raise InputError(f"a <{shape.tag}> has no label", place=file)
    group = shape.get("group_id", "0")
    if group.strip("0"):  # CVAT writes 0 for none
        shape.set("group_id", f"\0{groups.setdefault(group, len(groups) + 1)}\0")
    ET.indent(shape, level=2)
    shape.tail = None
    xml: bytes = ET.tostring(shape, encoding="utf-8")
    return b"    " + xml + b"\n"


def _image_xml(number: int, name: str, image: PictureParts[_Shapes]) -> bytes:
    width, height = map(str, image.size)
    empty = ET.Element("image", id=str(number), name=name, width=width, height=height)
    tag: bytes = ET.tostring(empty, encoding="utf-8", short_empty_elements=False)
    head = tag.removesuffix(b"</image>")
    shapes, used = [], 0
    for xml, groups in image.in_order():
        shapes.append(_GROUP.sub(partial(_group_number, used), xml))
        used += groups
    return b"  " + head + b"\n" + b"".join(shapes) + b"  </image>\n"


def _group_number(used: int, match: re.Match[bytes]) -> bytes:
    return b"%d" % (used + int(match[1]))
