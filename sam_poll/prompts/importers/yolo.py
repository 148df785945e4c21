"""YOLO's text files: a line for each box, `class cx cy width height`.

The coordinates are fractions of the picture's sides. The classes' names come from a file beside the
texts. Values after a box are ignored: a detector's confidence, a track's number, both; and
keypoints, where the names' YAML states their number (`kpt_shape`), or where each third of the
values is a visibility. Other lines of more numbers are outlines (or rotated boxes, which look the
same): they are counted, not used.

Limitations: the numbers of classes have a meaning only with their file of names; the wrong file
gives wrong labels without an error.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sam_poll.core.errors import PromptError
from sam_poll.core.types import Size
from sam_poll.core.validation import describe_value, quoted
from sam_poll.core.yaml_reader import YamlError, read_yaml
from sam_poll.prompts.importers.common import counted, number, whole
from sam_poll.prompts.importers.shapes import Annotated, Shape, box_shape, faulty

NAMES = (
    "data.yaml",
    "data.yml",
    "dataset.yaml",
    "classes.txt",
    "obj.names",
    "predefined_classes.txt",
)
"""Files with the classes' names; the first that exists is used."""

_LISTS = frozenset(
    {
        "train",
        "val",
        "valid",
        "validation",
        "test",
        "trainval",
        "classes",
        "predefined_classes",
        "labelmap",
    }
)

# How far a box that was clipped to its picture reaches over an edge because numbers are rounded
_ROUNDING = 0.01
MAX_CLASSES = 100_000
_LINE = "a line is `class cx cy width height`, all but the class between 0 and 1"
_NAMES = f"put {NAMES[0]} or {NAMES[3]} with the classes' names into the folder of the texts"


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes' names, and the number of keypoint values after each box.

    0: there are none, or their number is not stated.
    """

    names: Mapping[int, str]
    keypoints: int = 0


def is_list(name: str) -> bool:
    """Return whether a text's path is that of a list of names or pictures, or a readme."""
    stem = name.rpartition("/")[2].rpartition(".")[0].lower()
    return stem in _LISTS or stem.startswith("readme") or "ImageSets" in name.split("/")


def read(
    data: bytes, name: str, size: Size, names: Mapping[int, str], *, keypoints: int = 0
) -> Annotated:
    """Return the boxes of one text file for the picture called `name`, which has this size.

    `name` is also the place of errors. `keypoints`: as in `Classes`. A box with invalid numbers is
    a faulty shape. Raises PromptError with the line and the remedy for a line that is not YOLO's,
    and for a class without a name.
    """
    shapes: list[Shape] = []
    left_out: Counter[str] = Counter()
    lines = [line.split() for line in _text(data, name).splitlines()]
    tracks = _are_tracks(lines)
    for at, words in enumerate(lines, start=1):
        place = f"{name}, line {at}"
        if not words:
            continue
        if len(words) < 5:
            raise PromptError(f"is no box: {quoted(' '.join(words))}", place=place, remedy=_LINE)
        if len(words) <= 6 or (len(words) == 7 and tracks) or _is_pose(words, keypoints):
            shapes.append(_box(words, size, names, place))
        else:
            left_out["outline"] += 1
    return Annotated(name, size, tuple(shapes), counted(left_out))


def _box(words: Sequence[str], size: Size, names: Mapping[int, str], place: str) -> Shape:
    label = names.get(whole(words[0], f"{place}, class"))
    if label is None:
        raise PromptError(f"class {words[0]} has no name", place=place, remedy=_NAMES)
    try:
        cx, cy, width, height = (number(word, place) for word in words[1:5])
        # Detectors overshoot a little; larger values are pixels.
        if max(abs(cx), abs(cy), width, height) > 2:
            reason = f"is not in fractions of the picture's sides: {quoted(' '.join(words[:5]))}"
            raise PromptError(reason, place=place, remedy=_LINE)
    except PromptError as error:
        return faulty("box", label, error)
    x, half_w = cx * size.width, width * size.width / 2
    y, half_h = cy * size.height, height * size.height / 2
    return box_shape((x - half_w, y - half_h, x + half_w, y + half_h), label)


def _are_tracks(lines: Sequence[Sequence[str]]) -> bool:
    """Return whether lines of seven numbers are boxes with a confidence and a track's number.

    They are, and not triangles, where that number is whole and above 0 in all of them, and the
    boxes are inside the picture.
    """
    return all(
        words[6].isdecimal() and int(words[6][:9]) > 0 and _lies_inside(words)
        for words in lines
        if len(words) == 7
    )


def _lies_inside(words: Sequence[str]) -> bool:
    cx, cy, width, height = (_value(word) for word in words[1:5])
    return all(
        side / 2 - _ROUNDING <= centre <= 1 - side / 2 + _ROUNDING
        for centre, side in ((cx, width), (cy, height))
    )


def _is_pose(words: Sequence[str], keypoints: int) -> bool:
    """Return whether a line is a box with keypoints, and maybe a confidence and a track."""
    more = len(words) - 5
    if keypoints:
        return 0 <= more - keypoints <= 2
    # Each third number is 0, 1 or 2; an outline's numbers are never 2.
    seen = {_value(word) for word in words[7::3]}
    return more % 3 == 0 and 2.0 in seen and seen <= {0.0, 1.0, 2.0}


def _value(word: str) -> float:
    """Return a number; NaN, which compares with nothing, for invalid text."""
    try:
        return number(word, "")
    except PromptError:
        return math.nan


def looks_like(data: bytes) -> bool:
    """Return whether a text begins as YOLO's."""
    words = data[:2000].split(b"\n")[0].split()
    try:
        return (
            len(words) >= 5
            and words[0].isdigit()
            and all(number(w.decode(), "") is not None for w in words[1:])
        )
    except (PromptError, UnicodeDecodeError):
        return False


def classes_of(data: bytes, file: str) -> Classes:
    """Return the classes from one of the files in `NAMES`. Raises PromptError."""
    names = names_of(data, file)
    if not file.endswith((".yaml", ".yml")):
        return Classes(names)
    document = read_yaml(_text(data, file))[0]
    shape = document.get("kpt_shape") if isinstance(document, dict) else None
    if not isinstance(shape, list) or len(shape) != 2:
        return Classes(names)
    count, numbers = (whole(value, f"{file}, kpt_shape", least=1) for value in shape)
    return Classes(names, count * numbers)


def names_of(data: bytes, file: str) -> dict[int, str]:
    """Return the classes' names from one of the files in `NAMES`.

    The file has a name a line, or is YAML with `names`, a list or a mapping.
    """
    text = _text(data, file)
    if file.endswith((".yaml", ".yml")):
        return _names_of_yaml(text, file)
    lines = text.rstrip().splitlines()
    return _checked({index: line.strip() for index, line in enumerate(lines)}, file)


def _names_of_yaml(text: str, file: str) -> dict[int, str]:
    try:
        document = read_yaml(text)[0]
    except YamlError as error:
        raise PromptError(f"is not YAML: {error}", place=file, remedy="correct it there") from None
    names: Any = document.get("names") if isinstance(document, dict) else None
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict):
        raise PromptError(
            "has no `names`", place=file, remedy="names: [dog, cat], or names: {0: dog, 1: cat}"
        )
    return _checked({whole(key, f"{file}, names"): name for key, name in names.items()}, file)


def _checked(names: dict[int, Any], file: str) -> dict[int, str]:
    if not names or len(names) > MAX_CLASSES:
        raise PromptError(
            f"has {len(names):,} classes", place=file, remedy=f"name 1 to {MAX_CLASSES:,} of them"
        )
    checked: dict[int, str] = {}
    for key, name in names.items():
        if not isinstance(name, str) or not name.strip():  # an unquoted 007 would be read as 7
            raise PromptError(
                f"the name of class {key} is {describe_value(name)}",
                place=file,
                remedy="put it in quotes",
            )
        checked[key] = name
    return checked


def _text(data: bytes, file: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise PromptError("is not UTF-8", place=file, remedy="save it as UTF-8") from None
