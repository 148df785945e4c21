"""YOLO's text files: a line for each box, `class cx cy width height`, as parts of the picture's sides, and the classes'
names from beside them.

What follows a box is passed over: a detector's confidence, a track's number, both; and keypoints, where the names' YAML
tells how many (`kpt_shape`), or where each third number of them is a visibility. Other lines of more numbers are
outlines (or turned boxes, which look the same): they are counted, not asked for.

What can still go wrong here: the numbers of a class mean nothing without the file of names that belongs to them; the
wrong one gives wrong labels without a word.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sam_poll.annotations import Annotated, Shape, box_shape, faulty
from sam_poll.annotations.reading import counted, number, whole
from sam_poll.complaints import quoted, show
from sam_poll.errors import PromptError
from sam_poll.types import Size
from sam_poll.yaml_lines import NotYaml, read_yaml

NAMES = ("data.yaml", "data.yml", "dataset.yaml", "classes.txt", "obj.names", "predefined_classes.txt")
"""Files that say what the classes are called; the first that is there counts."""

_LISTS = frozenset(
    {"train", "val", "valid", "validation", "test", "trainval", "classes", "predefined_classes", "labelmap"}
)

_ROUNDING = 0.01  # how far a box that was cut to its picture reaches over its edges, as texts round its numbers
MAX_CLASSES = 100_000
_LINE = "a line is `class cx cy width height`, all but the class between 0 and 1"
_NAMES = f"put {NAMES[0]} or {NAMES[3]} with the classes' names into the folder of the texts"


@dataclass(frozen=True, slots=True)
class Classes:
    """What the classes are called, and how many numbers of keypoints follow each box (0: none, or it is not told)."""

    names: Mapping[int, str]
    keypoints: int = 0


def is_list(name: str) -> bool:
    """Whether a text holds names, lists of pictures or words for people, by its path: no boxes."""
    stem = name.rpartition("/")[2].rpartition(".")[0].lower()
    return stem in _LISTS or stem.startswith("readme") or "ImageSets" in name.split("/")


def read(data: bytes, name: str, size: Size, names: Mapping[int, str], *, keypoints: int = 0) -> Annotated:
    """The boxes of one text file, for the picture called `name` (`place` of errors too), which is of this size.

    `keypoints`: as in `Classes`. A box of numbers that are none, or no parts of a side, is a faulty shape. PromptError
    with the line and the remedy for what is no line of YOLO's, and for a class without a name."""
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
        if max(abs(cx), abs(cy), width, height) > 2:  # detectors overshoot a little; pixels are no parts of a side
            reason = f"is not in parts of the picture's sides: {quoted(' '.join(words[:5]))}"
            raise PromptError(reason, place=place, remedy=_LINE)
    except PromptError as error:
        return faulty("box", label, error)
    x, y, half_w, half_h = cx * size.width, cy * size.height, width * size.width / 2, height * size.height / 2
    return box_shape((x - half_w, y - half_h, x + half_w, y + half_h), label)


def _are_tracks(lines: Sequence[Sequence[str]]) -> bool:
    """Whether lines of seven numbers are boxes with a confidence and a track's number, and no triangles: that number
    is whole and above 0 in all of them, and the boxes lie in the picture."""
    return all(
        words[6].isdecimal() and int(words[6][:9]) > 0 and _lies_inside(words) for words in lines if len(words) == 7
    )


def _lies_inside(words: Sequence[str]) -> bool:
    cx, cy, width, height = (_value(word) for word in words[1:5])
    return all(
        side / 2 - _ROUNDING <= centre <= 1 - side / 2 + _ROUNDING for centre, side in ((cx, width), (cy, height))
    )


def _is_pose(words: Sequence[str], keypoints: int) -> bool:
    """Whether a box and its keypoints are in a line, maybe with a confidence and a track's number."""
    more = len(words) - 5
    if keypoints:
        return 0 <= more - keypoints <= 2
    # Each third number says 0, 1 or 2; an outline's numbers are never 2.
    seen = {_value(word) for word in words[7::3]}
    return more % 3 == 0 and 2.0 in seen and seen <= {0.0, 1.0, 2.0}


def _value(word: str) -> float:
    """A number; NaN for what is none, which compares with nothing."""
    try:
        return number(word, "")
    except PromptError:
        return math.nan


def looks_like(data: bytes) -> bool:
    """Whether the beginning of a text could be YOLO's."""
    words = data[:2000].split(b"\n")[0].split()
    try:
        return len(words) >= 5 and words[0].isdigit() and all(number(w.decode(), "") is not None for w in words[1:])
    except (PromptError, UnicodeDecodeError):
        return False


def classes_of(data: bytes, file: str) -> Classes:
    """The classes of one of the files in `NAMES`. PromptError."""
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
    """The classes' names of one of the files in `NAMES`: a name a line, or `names` of a YAML, a list or a mapping."""
    text = _text(data, file)
    if file.endswith((".yaml", ".yml")):
        return _names_of_yaml(text, file)
    lines = text.rstrip().splitlines()
    return _checked({index: line.strip() for index, line in enumerate(lines)}, file)


def _names_of_yaml(text: str, file: str) -> dict[int, str]:
    try:
        document = read_yaml(text)[0]
    except NotYaml as error:
        raise PromptError(f"is not YAML: {error}", place=file, remedy="mend it there") from None
    names: Any = document.get("names") if isinstance(document, dict) else None
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict):
        raise PromptError("has no `names`", place=file, remedy="names: [dog, cat], or names: {0: dog, 1: cat}")
    return _checked({whole(key, f"{file}, names"): name for key, name in names.items()}, file)


def _checked(names: dict[int, Any], file: str) -> dict[int, str]:
    if not names or len(names) > MAX_CLASSES:
        raise PromptError(f"has {len(names):,} classes", place=file, remedy=f"name 1 to {MAX_CLASSES:,} of them")
    made: dict[int, str] = {}
    for key, name in names.items():
        if not isinstance(name, str) or not name.strip():  # a bare 007 would be read as 7
            raise PromptError(f"the name of class {key} is {show(name)}", place=file, remedy="put it in quotes")
        made[key] = name
    return made


def _text(data: bytes, file: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise PromptError("is not UTF-8", place=file, remedy="save it as UTF-8") from None
