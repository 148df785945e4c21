"""Merge the `.yolo.txt` and `.yolo.yaml` files of many pictures into one ZIP.

The layout is that of Ultralytics; CVAT imports it as `Ultralytics YOLO Segmentation 1.0`. The ZIP
contains `data.yaml`, `train.txt`, and a `labels/train/….txt` for each picture. Classes are all
labels that occur, sorted by name, and the lines are renumbered; several jobs on one picture become
one file, their lines in the order of their files' names. Names, order and dates in the ZIP are
fixed: the same files give the same bytes, in any order (with the same version of zlib).

Limitations: polygons are copied unchanged once they are numbers within 0…1. The ZIP contains no
pictures: for training, put the tree that `train.txt` names beside it.
"""

from __future__ import annotations

import io
import posixpath
import re
import unicodedata
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from sam_poll.core.errors import InputError
from sam_poll.core.types import Size
from sam_poll.core.yaml_reader import YamlError, read_yaml
from sam_poll.formats.common import yaml_of
from sam_poll.formats.merge.common import (
    PictureParts,
    parts_of,
    refuse_shared_stems,
    size_of,
)
from sam_poll.formats.registry import Documents

LINES, FACTS = ".yolo.txt", ".yolo.yaml"
_Lines: TypeAlias = list[tuple[str, str]]  # a polygon's label, and its coordinates
_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest date in a ZIP
_NUMBERS = re.compile(r"[-+.0-9eE ]*")  # excludes `nan` and `1_0`, which Python accepts


def merged_yolo(documents: Documents, prefix: str = "") -> Iterator[bytes]:
    """Merge (file name, content) pairs, both files of each job among them, into a ZIP.

    `prefix` is put before the pictures' names. Raises InputError with the file's name as its place
    where a file is invalid, lacks its other half, contradicts another about a picture's size, or
    has a picture whose name differs from another one's in its extension only.
    """
    unpaired: dict[str, bytes] = {}
    images: dict[str, PictureParts[_Lines]] = {}
    labels: set[str] = set()
    for file, body in documents:
        stem = file.removesuffix(FACTS).removesuffix(LINES)
        other = stem + (LINES if file.endswith(FACTS) else FACTS)
        if other not in unpaired:
            unpaired[file] = body
            continue
        pair = {file: body, other: unpaired.pop(other)}
        facts = _facts(stem + FACTS, pair[stem + FACTS], prefix)
        image = parts_of(images, facts.name, facts.size, stem + FACTS)
        image.pieces.append((stem, _lines(stem + LINES, pair[stem + LINES], facts.labels)))
        labels |= set(facts.labels.values())
    for file in sorted(unpaired):
        kind = LINES if file.endswith(FACTS) else FACTS
        raise InputError(
            f"its {kind} file is missing",
            place=file,
            remedy="merge again if the job is being written just now, else run the job again",
        )
    refuse_shared_stems(images, "YOLO")
    yield _zipped(images, sorted(labels))


@dataclass(frozen=True, slots=True)
class _Facts:
    """The content of a `.yolo.yaml`: the picture's name and size, and its labels by number."""

    name: str
    size: Size
    labels: dict[str, str]


def _facts(file: str, body: bytes, prefix: str) -> _Facts:
    """Read a `.yolo.yaml`; `prefix` is put before the picture's name."""
    try:
        read = read_yaml(body.decode("utf-8")).values
    except YamlError as error:
        where = f"{file}, line {error.line}" if error.line else file
        raise InputError(error.reason, place=where) from None
    except UnicodeDecodeError:
        raise InputError("is not UTF-8", place=file) from None
    if not isinstance(read, dict):
        raise InputError("has no keys `image`, `width`, `height`, `names`", place=file)
    name, names = read.get("image"), read.get("names")
    if not isinstance(name, str) or not name:
        raise InputError("`image` is not a name", place=file)
    name = prefix + name
    if not _fits(name):
        raise InputError(
            f"image {name!r} cannot be named in a ZIP", place=file, remedy="rename the picture"
        )
    try:
        size = size_of(name, read)
    except InputError as error:
        raise InputError(error.reason, place=file) from None
    if not isinstance(names, dict) or not all(
        re.fullmatch("[0-9]{1,9}", number) for number in names
    ):
        raise InputError("`names` does not give classes by their numbers", place=file)
    odd = next(
        (number for number, label in names.items() if not isinstance(label, str) or not label), None
    )
    if odd is not None:
        raise InputError(f"the name of class {odd} is not a text", place=file)
    return _Facts(name, size, names)


def _fits(name: str) -> bool:
    """Return whether a name is a path below a folder for every ZIP tool, and fits on one line."""
    odd = any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c == "\\" for c in name)
    return not odd and not {"", ".", ".."} & set(name.split("/"))


def _lines(file: str, body: bytes, names: dict[str, str]) -> _Lines:
    try:
        text = body.decode("ascii")
    except UnicodeDecodeError:
        raise InputError("is not a text of numbers", place=file) from None
    polygons: _Lines = []
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
        polygons.append((names[words[0]], points))
    return polygons


def _within(text: str, words: list[str]) -> bool:
    try:
        values = np.array(words, np.float64)
    except ValueError:
        return False
    return bool(_NUMBERS.fullmatch(text) and values.min() >= 0 and values.max() <= 1)


def _zipped(images: dict[str, PictureParts[_Lines]], labels: list[str]) -> bytes:
    numbers = {label: number for number, label in enumerate(labels)}
    data = {"path": "./", "train": "train.txt", "names": dict(enumerate(labels))}
    listed = "".join(f"images/train/{name}\n" for name in sorted(images))
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        _add(archive, "data.yaml", yaml_of(data))
        _add(archive, "train.txt", listed)
        for name in sorted(images):
            path = f"labels/train/{posixpath.splitext(name)[0]}.txt"
            image = images.pop(name)
            lines = (
                f"{numbers[label]} {points}\n"
                for piece in image.in_order()
                for label, points in piece
            )
            _add(archive, path, "".join(lines))
    return target.getvalue()


def _add(archive: zipfile.ZipFile, name: str, text: str) -> None:
    entry = zipfile.ZipInfo(name, _DATE)
    entry.create_system = 3  # Unix, on every platform
    entry.external_attr = 0o644 << 16
    entry.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(entry, text)
