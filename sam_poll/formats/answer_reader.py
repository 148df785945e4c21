"""Read the objects of an answer back from its files, for programs that show it.

Whatever format an answer was written in, its objects become the same: a label, a score, and the
contours of its parts. The formats differ in what they hold (docs/formats.md): a mask PNG has
neither labels nor scores, YOLO no scores and no holes.

The files are untrusted: every user of the share may have written them.

Limitations: contours are those of the file where it has some (OPEX, YOLO, polygons of COCO and
CVAT); they differ from the mask by the tolerance that they were made with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from sam_poll.core import xml_reader
from sam_poll.core.errors import InputError
from sam_poll.core.files import parse_json
from sam_poll.core.types import BoolArray, Mask, Size
from sam_poll.imaging import masks
from sam_poll.imaging.contours import Polygon, contours
from sam_poll.imaging.decode import read_header

MAX_OBJECTS = 5_000
"""Objects of one answer that are read; further ones are left out."""
_MAX_SIDE = 1_000_000
_MAX_PIXELS = 300_000_000  # of a mask that is unpacked
_MAX_SHIFT = 60  # bits of a run length
_MASK_WORK = 200_000_000  # pixels of a mask PNG that are compared, for all objects together
_SINGLE = 255  # the value of an only object in a mask PNG

Part = tuple[Polygon, ...]
"""One connected part: its outer polygon (N×2, pixels of the full picture), then its holes."""


@dataclass(frozen=True, slots=True, eq=False)
class AnswerObject:
    """One object: `number` from 1 in the order of the prompts; `score` None where there is none."""

    number: int
    label: str
    score: float | None
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """The objects of one picture.

    `image` is the picture's name in CVAT (`done/cam1/dog.jpg`) and `size` its size, None where the
    file does not say. `notes` are the answer's remarks.
    """

    objects: tuple[AnswerObject, ...]
    image: str | None = None
    size: Size | None = None
    notes: str = ""


def read(format: str, body: bytes) -> Answer:
    """Read an answer's file of a format in `READERS`.

    Raises InputError for content that the format does not have.
    """
    try:
        return READERS[format](body)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, cv2.error) as error:
        raise InputError(f"not an answer in the format {format}: {error}") from error
    except RecursionError:
        raise InputError(f"not an answer in the format {format}: nested too deep") from None


# ── formats ──


def _opex(body: bytes) -> Answer:
    """Read OPEX: an entry for each part; `meta.object` says which object it belongs to."""
    document = parse_json(body)
    meta = document.get("meta") or {}
    gathered: dict[int, tuple[str, float | None, list[Part]]] = {}
    for position, entry in enumerate(document["objects"][:MAX_OBJECTS], start=1):
        own = entry.get("meta") or {}
        number = int(own.get("object", position))
        holes = json.loads(own.get("holes", "[]"))
        part = tuple(_polygon(points) for points in (entry["polygon"]["points"], *holes))
        label, score = str(entry.get("label", "")), _score(entry.get("score"))
        gathered.setdefault(number, (label, score, []))[2].append(part)
    size = None
    if "width" in meta and "height" in meta:
        size = _size(int(meta["width"]), int(meta["height"]))
    return Answer(_objects(gathered), _text(meta.get("image")), size, str(meta.get("notes", "")))


def _coco(body: bytes) -> Answer:
    document = parse_json(body)
    image = document["images"][0]
    size = _size(int(image["width"]), int(image["height"]))
    names = {entry["id"]: str(entry["name"]) for entry in document.get("categories", [])}
    found = {}
    for entry in document["annotations"][:MAX_OBJECTS]:
        segmentation = entry["segmentation"]
        if isinstance(segmentation, Mapping):
            parts = _parts(_unpacked(segmentation, size))
        else:
            parts = [(_polygon(np.reshape(points, (-1, 2))),) for points in segmentation]
        label = names.get(entry.get("category_id"), "")
        found[int(entry["id"])] = (label, _score(entry.get("score")), parts)
    notes = str(image.get("notes", ""))
    return Answer(_objects(found), _text(image.get("file_name")), size, notes)


def _unpacked(segmentation: Mapping[str, Any], size: Size) -> BoolArray:
    """Return the mask of COCO's run lengths, compressed or not: bool H×W."""
    _check_pixels(size)
    if list(segmentation["size"]) != [size.height, size.width]:
        raise ValueError("the run lengths are of another size than the picture")
    counts = segmentation["counts"]
    # pycocotools would write past the end of the mask where the runs are too long.
    runs = _decompressed(counts.encode("ascii")) if isinstance(counts, str) else counts
    return _filled(runs, size.width, size.height).T  # column by column


def _decompressed(counts: bytes) -> list[int]:
    """Return the run lengths of COCO's text: five bits a character, differences from the third."""
    runs: list[int] = []
    value, shift = 0, 0
    for character in counts:
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if shift > _MAX_SHIFT:
            raise ValueError("a run length is too long")
        if bits & 32:  # more characters belong to this number
            continue
        if bits & 16:  # it is negative
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value, shift = 0, 0
    return runs


def _filled(runs: Sequence[int], height: int, width: int) -> BoolArray:
    """Return what alternating run lengths, zeros first, fill row by row: bool height×width."""
    if not runs or min(runs) < 0 or sum(runs) != width * height:
        raise ValueError("the run lengths do not fill the mask's box")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)


def _cvat(body: bytes) -> Answer:
    """Read CVAT's XML: shapes with one `group_id` are the parts of one object."""
    image = xml_reader.parse(body).find("image")
    size = _size(int(image.get("width")), int(image.get("height")))
    found: dict[int, tuple[str, float | None, list[Part]]] = {}
    groups: dict[str, int] = {}
    for element in list(image)[:MAX_OBJECTS]:
        if element.tag == "mask":
            parts = _parts(_run_lengths(element), int(element.get("left")), int(element.get("top")))
        elif element.tag == "polygon":
            pairs = [pair.split(",") for pair in element.get("points").split(";")]
            parts = [(_polygon([[float(x), float(y)] for x, y in pairs]),)]
        else:
            continue
        group = element.get("group_id")
        number = groups.get(group) or len(found) + 1
        if group:
            groups[group] = number
        attribute = element.find("attribute[@name='score']")
        score = None if attribute is None else _score(float(attribute.text or "nan"))
        found.setdefault(number, (element.get("label", ""), score, []))[2].extend(parts)
    return Answer(_objects(found), _text(image.get("name")), size)


def _run_lengths(element: Any) -> BoolArray:
    """Return the crop that a `mask` element's run lengths fill: bool h×w."""
    size = _size(int(element.get("width")), int(element.get("height")))
    _check_pixels(size)
    runs = [int(run) for run in element.get("rle").split(",")]
    return _filled(runs, size.height, size.width)


def _mask(body: bytes) -> Answer:
    """Read a PNG of object numbers, or of 0 and 255 for one object."""
    size = read_header(body, max_pixels=_MAX_PIXELS).size
    frame = np.asarray(cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_UNCHANGED))
    if frame.shape != (size.height, size.width):
        raise ValueError("not a grey PNG")
    numbers = np.unique(frame)
    numbers = numbers[numbers > 0][:MAX_OBJECTS]
    # Each object is searched for in the whole frame: of many objects a coarser one is looked at.
    step = math.ceil(math.sqrt(frame.size * len(numbers) / _MASK_WORK)) or 1
    seen = frame[::step, ::step]
    found: dict[int, tuple[str, float | None, Sequence[Part]]] = {}
    for index, number in enumerate(numbers.tolist(), start=1):
        parts = [tuple(polygon * step for polygon in part) for part in _parts(seen == number)]
        found[1 if number == _SINGLE and index == 1 else number] = ("", None, parts)
    return Answer(_objects(found), size=size)


READERS: dict[str, Callable[[bytes], Answer]] = {
    "opex": _opex,
    "coco": _coco,
    "cvat": _cvat,
    "mask": _mask,
}
"""The formats that are read, those that say most first."""


# ── shapes ──


def _objects(
    found: Mapping[int, tuple[str, float | None, Sequence[Part]]],
) -> tuple[AnswerObject, ...]:
    return tuple(
        AnswerObject(number, label, score, tuple(parts))
        for number, (label, score, parts) in sorted(found.items())
    )


def _parts(bitmap: BoolArray, left: int = 0, top: int = 0) -> list[Part]:
    """Return the contours of a bool array whose upper left corner is at (left, top)."""
    tight = masks.tight(bitmap, "", 0.0)
    moved = Mask("", 0.0, tight.left + left, tight.top + top, tight.pixels)
    return parts_of(moved, tolerance_px=1.0, min_area_px=1)


def parts_of(mask: Mask, *, tolerance_px: float, min_area_px: float) -> list[Part]:
    """Return the contours of a mask as parts."""
    found = contours(mask, tolerance_px=tolerance_px, min_area_px=min_area_px)
    return [(part.points, *part.holes) for part in found]


def _polygon(points: Iterable[Any] | npt.NDArray[Any]) -> Polygon:
    """Return checked points: N×2, finite and within reason."""
    polygon = np.asarray(points, dtype=np.float64)
    if polygon.ndim != 2 or polygon.shape[1] != 2 or not len(polygon):
        raise ValueError("a polygon is not a list of points")
    if not bool(np.isfinite(polygon).all() and (np.abs(polygon) <= _MAX_SIDE).all()):
        raise ValueError("a polygon leads far out of the picture")
    return polygon


def _size(width: int, height: int) -> Size:
    if not (0 < width <= _MAX_SIDE and 0 < height <= _MAX_SIDE):
        raise ValueError(f"{width} × {height} is not the size of a picture")
    return Size(width, height)


def _check_pixels(size: Size) -> None:
    if size.width * size.height > _MAX_PIXELS:
        raise ValueError("the mask is too large to be shown")


def _score(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
