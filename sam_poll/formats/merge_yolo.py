"""Joins the `.yolo.txt` and `.yolo.yaml` files of many pictures into one ZIP in Ultralytics' layout, which CVAT imports
as `Ultralytics YOLO Segmentation 1.0`: `data.yaml`, `train.txt`, and a `labels/train/….txt` for each picture.

Classes are all labels that there are, sorted by name, and the lines are given their numbers; several jobs on one
picture become one file, their lines in the order of their files' names. Names, order and dates in the ZIP are fixed:
the same files give the same bytes, in whatever order they come (zlib's version being the same).

What can still go wrong here: polygons are taken as they are, once they are numbers within 0…1. There are no pictures in
the ZIP: for training, put the tree that `train.txt` names beside it.
"""

from __future__ import annotations

import io
import posixpath
import re
import unicodedata
import zipfile
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np

from sam_poll.errors import InputError
from sam_poll.formats import Documents, Gathered, gathered, size_of, yaml_of
from sam_poll.types import Size
from sam_poll.yaml_lines import NotYaml, read_yaml

LINES, FACTS = ".yolo.txt", ".yolo.yaml"
_Lines: TypeAlias = list[tuple[str, str]]  # a polygon's label, and its coordinates
_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that a ZIP can say
_NUMBERS = re.compile(r"[-+.0-9eE ]*")  # neither `nan` nor `1_0`, which Python takes for numbers


def merged_yolo(documents: Documents) -> Iterator[bytes]:
    """The ZIP from (file name, content) pairs, both files of each job among them.

    Raises InputError with the file's name as its place when one is broken, lacks its other half, or contradicts another
    about a picture's size.
    """
    found: dict[str, bytes] = {}
    images: dict[str, Gathered[_Lines]] = {}
    labels: set[str] = set()
    for file, body in documents:
        stem = file.removesuffix(FACTS).removesuffix(LINES)
        other = stem + (LINES if file.endswith(FACTS) else FACTS)
        if other not in found:
            found[file] = body
            continue
        pair = {file: body, other: found.pop(other)}
        labels |= _gather(images, stem, pair[stem + LINES], pair[stem + FACTS])
    for file in sorted(found):
        kind = LINES if file.endswith(FACTS) else FACTS
        raise InputError(
            f"the {kind} of it is not there",
            place=file,
            remedy="merge again if it is being answered just now, else answer the picture again",
        )
    yield _zipped(images, sorted(labels))


def _gather(images: dict[str, Gathered[_Lines]], stem: str, lines: bytes, facts: bytes) -> set[str]:
    """Adds a job's lines to its picture; its labels."""
    name, size, names = _facts(stem + FACTS, facts)
    image = gathered(images, name, size, stem + FACTS)
    image.pieces.append((stem, _lines(stem + LINES, lines, names)))
    return set(names.values())


def _facts(file: str, body: bytes) -> tuple[str, Size, dict[str, str]]:
    """The picture's name and size, and its labels by their numbers."""
    try:
        read, _, _ = read_yaml(body.decode("utf-8"))
    except NotYaml as error:
        where = f"{file}, line {error.line}" if error.line else file
        raise InputError(error.reason, place=where) from None
    except UnicodeDecodeError:
        raise InputError("is not UTF-8", place=file) from None
    if not isinstance(read, dict):
        raise InputError("has no keys `image`, `width`, `height`, `names`", place=file)
    name, names = read.get("image"), read.get("names")
    if not isinstance(name, str) or not name:
        raise InputError("`image` is not a name", place=file)
    if not _fits(name):
        raise InputError(f"image {name!r} cannot be named in a ZIP", place=file, remedy="rename the picture")
    try:
        size = size_of(name, read)
    except InputError as error:
        raise InputError(error.reason, place=file) from None
    if not isinstance(names, dict) or not all(re.fullmatch("[0-9]{1,9}", number) for number in names):
        raise InputError("`names` does not give classes by their numbers", place=file)
    odd = next((number for number, label in names.items() if not isinstance(label, str) or not label), None)
    if odd is not None:
        raise InputError(f"the name of class {odd} is not a text", place=file)
    return name, size, names


def _fits(name: str) -> bool:
    """Whether a name leads to one place below a folder, for whoever unpacks it, and has a line to itself."""
    odd = any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c == "\\" for c in name)
    return not odd and not {"", ".", ".."} & set(name.split("/"))


def _lines(file: str, body: bytes, names: dict[str, str]) -> _Lines:
    try:
        text = body.decode("ascii")
    except UnicodeDecodeError:
        raise InputError("is not a text of numbers", place=file) from None
    found: _Lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        where = f"{file}, line {number}"
        if words[0] not in names:
            raise InputError(f"class {words[0][:20]} is not among the names", place=where)
        if len(words) < 7 or len(words) % 2 == 0:
            raise InputError("is not a class and the x and y of three points or more", place=where)
        points = " ".join(words[1:])
        if not _within(points, words[1:]):
            raise InputError("a coordinate is not a number within 0…1", place=where)
        found.append((names[words[0]], points))
    return found


def _within(text: str, words: list[str]) -> bool:
    try:
        values = np.array(words, np.float64)
    except ValueError:
        return False
    return bool(_NUMBERS.fullmatch(text) and values.min() >= 0 and values.max() <= 1)


def _zipped(images: dict[str, Gathered[_Lines]], labels: list[str]) -> bytes:
    numbers = {label: number for number, label in enumerate(labels)}
    data = {"path": "./", "train": "train.txt", "names": dict(enumerate(labels))}
    listed = "".join(f"images/train/{name}\n" for name in sorted(images))
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        _add(archive, "data.yaml", yaml_of(data))
        _add(archive, "train.txt", listed)
        taken: dict[str, str] = {}
        for name in sorted(images):
            path = f"labels/train/{posixpath.splitext(name)[0]}.txt"
            image = images.pop(name)
            if path in taken:
                reason = f"for YOLO, image {name!r} is the same as {taken[path]!r}: only their endings differ"
                raise InputError(reason, place=image.source, remedy="rename one of the pictures")
            taken[path] = name
            lines = (f"{numbers[label]} {points}\n" for piece in image.in_order() for label, points in piece)
            _add(archive, path, "".join(lines))
    return target.getvalue()


def _add(archive: zipfile.ZipFile, name: str, text: str) -> None:
    entry = zipfile.ZipInfo(name, _DATE)
    entry.create_system = 3  # Unix, wherever it is made
    entry.external_attr = 0o644 << 16
    entry.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(entry, text)
