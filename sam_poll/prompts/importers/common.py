"""Helpers that the readers of annotation files share: numbers, names, limits.

Limitations: the limits keep a file from taking all memory, not from taking minutes.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from sam_poll.core.errors import PromptError
from sam_poll.core.text import shown
from sam_poll.core.types import Size
from sam_poll.core.validation import describe_value
from sam_poll.prompts.importers.shapes import Annotated

MAX_IMAGES = 1_000_000
# Of all pictures together, including shapes that are left out; about 2.5 GB
MAX_SHAPES = 5_000_000
# More pixels than any picture has on a side; sums and products of such numbers stay finite
MAX_VALUE = 1e9
_NUMBER = re.compile(r"\s*[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?\s*")
_MAX_DIGITS = 400
_SHOWN = 300  # characters of a picture's name

NUMBERS = "coordinates are numbers of pixels; export the annotations again"


def number(value: object, place: str) -> float:
    """Return a finite number, given as text or as a JSON number.

    Raises PromptError for all else, `true` and "nan" included.
    """
    if isinstance(value, str):
        if len(value) > _MAX_DIGITS or not _NUMBER.fullmatch(value):
            raise PromptError(
                f"is not a number: it is {describe_value(value)}", place=place, remedy=NUMBERS
            )
        result = float(value)
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value):
        # A JSON integer may be too long for a float.
        result = float(value) if abs(value) <= MAX_VALUE else math.inf
    else:
        raise PromptError(
            f"is not a number: it is {describe_value(value)}", place=place, remedy=NUMBERS
        )
    if not abs(result) <= MAX_VALUE:
        raise PromptError(
            f"is beyond ±{MAX_VALUE:,.0f}, outside any picture", place=place, remedy=NUMBERS
        )
    return result


def whole(value: object, place: str, *, least: int = 0) -> int:
    """Return a whole number of at least `least`, given as text or as a JSON number (`3.0` is 3).

    Raises PromptError for all else.
    """
    result = number(value, place)
    if result != int(result) or result < least:
        raise PromptError(
            f"is not a whole number from {least} on: it is {describe_value(value)}",
            place=place,
            remedy=NUMBERS,
        )
    return int(result)


def size_of(width: object, height: object, at_width: str, at_height: str) -> Size | None:
    """Return a picture's size as a file states it; None where it states neither side.

    Raises PromptError at one of these places.
    """
    if width is None and height is None:
        return None
    return Size(whole(width, at_width, least=1), whole(height, at_height, least=1))


def image_place(name: str) -> str:
    """Return `image "cam1/dog.jpg"`, the place of an error."""
    return f'image "{shown(name if len(name) <= _SHOWN else f"…{name[-_SHOWN:]}")}"'


def counted(counts: Counter[str]) -> tuple[tuple[str, int], ...]:
    """Return counts sorted by name, as `Annotated.left_out` has them."""
    return tuple(sorted(counts.items()))


def each_once(annotated: Iterable[Annotated]) -> list[Annotated]:
    """Return the pictures as a list.

    Raises PromptError where two have one name, since their shapes cannot be told apart.
    """
    pictures = list(annotated)
    names: set[str] = set()
    for picture in pictures:
        if picture.name in names:
            raise PromptError(
                "is there twice",
                place=image_place(picture.name),
                remedy="export each task by itself; "
                "pictures of one name in two tasks cannot be told apart",
            )
        names.add(picture.name)
    return pictures


def load_json(data: bytes, lean: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Return a JSON document; raises PromptError with the line for anything else.

    `lean` builds each object while the document is parsed.
    """
    place, remedy = "the JSON file", "export it again"
    try:
        return json.loads(data, object_pairs_hook=lean, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise PromptError(
            f"is not JSON: {error.msg[:1].lower()}{error.msg[1:]}",
            place=f"line {error.lineno}",
            remedy=remedy,
        ) from None
    except UnicodeDecodeError:
        raise PromptError("is not UTF-8", place=place, remedy="save it as UTF-8") from None
    except RecursionError:
        raise PromptError(
            "is nested deeper than any file of annotations", place=place, remedy=remedy
        ) from None


def _integer(text: str) -> int | float:
    """Convert integers longer than any id to float, whose number of digits is not limited."""
    return int(text) if len(text) <= 40 else float(text)
