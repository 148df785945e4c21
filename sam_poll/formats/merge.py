"""Joins the `.cvat.xml` files of many pictures into the one file that a CVAT task imports.

An import replaces all annotations of a task, so pictures cannot be imported one by one. Images are sorted by name and
numbered from 0; several jobs on one picture become one `<image>`, their objects in the order of their files' names. The
same files give the same bytes, in whatever order they come.

Each file is parsed and forgotten again: what is held is the finished text of its objects, so memory is about the size
of the result. A document type declaration is refused before anything in it can expand.

What can still go wrong here: labels are not checked against any task, and two runs over one picture under two names are
two images. Numbers inside the objects are taken as they are.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from sam_poll import xml_safely
from sam_poll.errors import InputError
from sam_poll.types import Size

SHAPES = frozenset({"box", "cuboid", "ellipse", "mask", "points", "polygon", "polyline", "skeleton", "tag"})
_HEAD = b"<?xml version='1.0' encoding='utf-8'?>\n<annotations>\n  <version>1.1</version>\n"
_TAIL = b"</annotations>\n"


@dataclass(slots=True)
class _Image:
    """What has been gathered on one picture: the XML of its objects by the file they came from."""

    size: Size
    source: str
    shapes: list[tuple[str, bytes]] = field(default_factory=list)


def merge_cvat(documents: Iterable[tuple[str, bytes]]) -> bytes:
    """One CVAT 1.1 XML from (file name, content) pairs. Raises InputError with the file's name as its place when one is
    not XML, not CVAT 1.1 for images, or contradicts another about a picture's size."""
    return b"".join(merged_cvat(documents))


def merged_cvat(documents: Iterable[tuple[str, bytes]]) -> Iterator[bytes]:
    """`merge_cvat` in pieces, to be written one after another. The first comes when all documents have been read."""
    images: dict[str, _Image] = {}
    for file, body in documents:
        _gather(images, file, body)
    yield _HEAD
    for number, name in enumerate(sorted(images)):
        yield _image_xml(number, name, images.pop(name))
    yield _TAIL


def _gather(images: dict[str, _Image], file: str, body: bytes) -> None:
    for element in _image_elements(file, body):
        name, size = _name_and_size(file, element)
        image = images.setdefault(name, _Image(size, file))
        if image.size != size:
            was = f"{image.size.width}×{image.size.height} in {image.source}"
            raise InputError(f"image {name!r} is {size.width}×{size.height} here but {was}", place=file)
        try:
            image.shapes.append((file, b"".join(_shape_xml(file, shape) for shape in element)))
        except RecursionError:
            raise InputError("is nested deeper than any CVAT file", place=file) from None


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


def _shape_xml(file: str, shape: ET.Element) -> bytes:
    """One object as it will stand in the result, its indent included."""
    if shape.tag not in SHAPES:
        raise InputError(f"<{shape.tag}> does not belong into an <image>", place=file)
    if not shape.get("label"):
        raise InputError(f"a <{shape.tag}> has no label", place=file)
    ET.indent(shape, level=2)
    shape.tail = None
    return b"    " + ET.tostring(shape, encoding="utf-8") + b"\n"


def _image_xml(number: int, name: str, image: _Image) -> bytes:
    width, height = map(str, image.size)
    empty = ET.Element("image", id=str(number), name=name, width=width, height=height)
    head = ET.tostring(empty, encoding="utf-8", short_empty_elements=False).removesuffix(b"</image>")
    return b"  " + head + b"\n" + b"".join(body for _, body in sorted(image.shapes)) + b"  </image>\n"
