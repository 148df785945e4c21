"""YOLO's text files: a line for each box, `class cx cy width height`, as parts of the picture's sides, and the classes'
names from beside them.

A sixth number is a detector's confidence and is passed over. Lines with more numbers are outlines (or turned boxes,
which look the same): they are counted, not asked for.

What can still go wrong here: the numbers of a class mean nothing without the file of names that belongs to them; the
wrong one gives wrong labels without a word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sam_poll.annotations import Annotated, Shape, box_shape
from sam_poll.annotations.reading import counted, number, whole
from sam_poll.complaints import quoted, show
from sam_poll.errors import PromptError
from sam_poll.types import Size
from sam_poll.yaml_lines import NotYaml, read_yaml

NAMES = ("data.yaml", "data.yml", "dataset.yaml", "classes.txt", "obj.names", "predefined_classes.txt")
"""Files that say what the classes are called; the first that is there counts."""

LISTS = frozenset({"train", "val", "valid", "validation", "test", "trainval", "classes", "predefined_classes"})
"""Texts called so hold names or lists of pictures, no boxes."""

MAX_CLASSES = 100_000
_LINE = "a line is `class cx cy width height`, all but the class between 0 and 1"
_NAMES = f"put {NAMES[0]} or {NAMES[3]} with the classes' names into the folder of the texts"


def read(data: bytes, name: str, size: Size, names: Mapping[int, str]) -> Annotated:
    """The boxes of one text file, for the picture called `name` (`place` of errors too), which is of this size.

    PromptError with the line and the remedy."""
    shapes: list[Shape] = []
    left_out: Counter[str] = Counter()
    for at, line in enumerate(_text(data, name).splitlines(), start=1):
        words = line.split()
        place = f"{name}, line {at}"
        if len(words) in (5, 6):
            shapes.append(_box(words, size, names, place))
        elif len(words) >= 7:
            left_out["outline"] += 1
        elif words:
            raise PromptError(f"is no box: {quoted(line)}", place=place, remedy=_LINE)
    return Annotated(name, size, tuple(shapes), counted(left_out))


def _box(words: Sequence[str], size: Size, names: Mapping[int, str], place: str) -> Shape:
    label = names.get(whole(words[0], f"{place}, class"))
    if label is None:
        raise PromptError(f"class {words[0]} has no name", place=place, remedy=_NAMES)
    cx, cy, width, height = (number(word, place) for word in words[1:5])
    if max(abs(cx), abs(cy), width, height) > 2:  # detectors overshoot a little; pixels are no parts of a side
        raise PromptError(
            f"is not in parts of the picture's sides: {quoted(' '.join(words))}", place=place, remedy=_LINE
        )
    x, y, half_w, half_h = cx * size.width, cy * size.height, width * size.width / 2, height * size.height / 2
    return box_shape((x - half_w, y - half_h, x + half_w, y + half_h), label)


def looks_like(data: bytes) -> bool:
    """Whether the beginning of a text could be YOLO's."""
    words = data[:2000].split(b"\n")[0].split()
    try:
        return len(words) >= 5 and words[0].isdigit() and all(number(w.decode(), "") is not None for w in words[1:])
    except (PromptError, UnicodeDecodeError):
        return False


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
