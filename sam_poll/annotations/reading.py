"""What the readers of annotation files share: numbers, names, limits, who is meant by what.

What can still go wrong here: the limits keep a file from taking the machine's memory, not from taking minutes.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from sam_poll.annotations import Annotated
from sam_poll.complaints import show
from sam_poll.errors import PromptError
from sam_poll.fs import shown
from sam_poll.types import Size

MAX_IMAGES = 1_000_000
MAX_SHAPES = 5_000_000  # of all pictures together, those that are left out included; about 2.5 GB as shapes
MAX_VALUE = 1e9  # no picture has so many pixels a side; sums and products of such numbers stay finite
_NUMBER = re.compile(r"\s*[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?\s*")
_MAX_DIGITS = 400
_SHOWN = 300  # characters of a picture's name

NUMBERS = "coordinates are numbers of pixels; export the annotations again"


def number(value: object, place: str) -> float:
    """A finite number, written as text or as JSON's; PromptError for all else, `true` and "nan" included."""
    if isinstance(value, str):
        if len(value) > _MAX_DIGITS or not _NUMBER.fullmatch(value):
            raise PromptError(f"is not a number: it is {show(value)}", place=place, remedy=NUMBERS)
        found = float(value)
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value):
        found = float(value) if abs(value) <= MAX_VALUE else math.inf  # a JSON number may be longer than any float
    else:
        raise PromptError(f"is not a number: it is {show(value)}", place=place, remedy=NUMBERS)
    if not abs(found) <= MAX_VALUE:
        raise PromptError(f"lies beyond ±{MAX_VALUE:,.0f}, outside any picture", place=place, remedy=NUMBERS)
    return found


def whole(value: object, place: str, *, least: int = 0) -> int:
    """A whole number of at least `least`, as text or as JSON's (`3.0` is 3); else PromptError."""
    found = number(value, place)
    if found != int(found) or found < least:
        raise PromptError(f"is not a whole number from {least} on: it is {show(value)}", place=place, remedy=NUMBERS)
    return int(found)


def size_of(width: object, height: object, at_width: str, at_height: str) -> Size | None:
    """A picture's size as a file states it; None where it states neither side. PromptError, at one of these places."""
    if width is None and height is None:
        return None
    return Size(whole(width, at_width, least=1), whole(height, at_height, least=1))


def image_place(name: str) -> str:
    """`image "cam1/dog.jpg"`, as the place of an error."""
    return f'image "{shown(name if len(name) <= _SHOWN else f"…{name[-_SHOWN:]}")}"'


def counted(counts: Counter[str]) -> tuple[tuple[str, int], ...]:
    """Counts as `Annotated.left_out` has them: by name."""
    return tuple(sorted(counts.items()))


def each_once(annotated: Iterable[Annotated]) -> list[Annotated]:
    """All of them; PromptError where two have one name: whose boxes are whose cannot be told."""
    pictures = list(annotated)
    names: set[str] = set()
    for picture in pictures:
        if picture.name in names:
            raise PromptError(
                "is there twice",
                place=image_place(picture.name),
                remedy="export each task by itself; pictures of one name in two tasks cannot be told apart",
            )
        names.add(picture.name)
    return pictures


def load_json(data: bytes, lean: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """A JSON document; PromptError with the line for what is none. `lean` makes each object while it is read."""
    place, remedy = "the JSON file", "export it again"
    try:
        return json.loads(data, object_pairs_hook=lean, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise PromptError(
            f"is not JSON: {error.msg[:1].lower()}{error.msg[1:]}", place=f"line {error.lineno}", remedy=remedy
        ) from None
    except UnicodeDecodeError:
        raise PromptError("is not UTF-8", place=place, remedy="save it as UTF-8") from None
    except RecursionError:
        raise PromptError("is nested deeper than any file of annotations", place=place, remedy=remedy) from None


def _integer(text: str) -> int | float:
    """Long ones as float, which has no limit of digits."""
    return int(text) if len(text) <= 18 else float(text)
