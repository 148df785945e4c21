"""What CVAT asks a Nuclio function, read with care: a picture in base64, and what the user has clicked.

Two forms: CVAT's own (`pos_points`, `neg_points`, `obj_bbox`), and `points` with `labels` and a flat `box`, as others
ask. Whatever is not understood is an InputError with the place and the remedy, which the caller answers as HTTP 400.

What can still go wrong here: nothing but a click on the wrong thing; whether it lies on the picture is seen later.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sam_poll.base64_text import picture_file
from sam_poll.errors import InputError, PromptError
from sam_poll.types import Box, Point, Prompt

_PAIRS = "write [[x, y], …] in pixels of the picture"
_CORNERS = "write [[x0, y0], [x1, y1]], or null"


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """One request. `picture` is the file's bytes; `prompt` None: nothing was clicked, everything is wanted;
    `threshold`: the least score that counts."""

    picture: bytes
    prompt: Prompt | None
    threshold: float | None = None


def read(body: Any, *, label: str = "object", box_first: bool = False, clicks: bool = True) -> Asked:
    """The body of a request, as JSON text or already parsed. InputError (PictureError, PromptError) says what is wrong.

    `box_first`: the function is `startswith_box` on a server that does not know `obj_bbox` yet, so that the first two
    of `pos_points` are the box. Without `clicks` only the picture is looked at.
    """
    asked = _mapping(body)
    picture = picture_file(asked.get("image"), "image")
    if not clicks:
        return Asked(picture, None)
    return Asked(picture, _prompt(asked, label, box_first), _threshold(asked.get("threshold")))


def _mapping(body: Any) -> Mapping[str, Any]:
    if isinstance(body, (bytes, bytearray, str)):
        try:
            body = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the request is not JSON: {error}", place="body", remedy="send a JSON object") from None
    if not isinstance(body, Mapping):
        raise InputError("the request is not a JSON object", place="body", remedy='send {"image": base64, …}')
    return body


def _prompt(asked: Mapping[str, Any], label: str, box_first: bool) -> Prompt | None:
    positive = _points(asked.get("pos_points"), "pos_points")
    negative = _points(asked.get("neg_points"), "neg_points")
    box = _box(asked.get("obj_bbox"), "obj_bbox") or _box(asked.get("box"), "box")
    if box_first and "obj_bbox" not in asked and len(positive) >= 2:
        box, positive = _box(positive[:2], "pos_points"), positive[2:]
    points = [Point(x, y, 1) for x, y in positive] + [Point(x, y, 0) for x, y in negative] + _labelled(asked)
    if points and box is None and not any(point.label for point in points):
        raise PromptError("there are negative points only", place="pos_points", remedy="add a positive point, or a box")
    return Prompt(label, tuple(points), box) if points or box else None


def _labelled(asked: Mapping[str, Any]) -> list[Point]:
    points, labels = _points(asked.get("points"), "points"), asked.get("labels") or []
    if not isinstance(labels, list) or len(labels) != len(points):
        count = len(labels) if isinstance(labels, list) else "no list of"
        raise PromptError(
            f"{count} labels for {len(points)} points",
            place="labels",
            remedy="give each point a 1, or a 0 for background",
        )
    for index, value in enumerate(labels):
        if isinstance(value, bool) or value not in (0, 1):
            raise PromptError("neither 0 nor 1", place=f"labels[{index}]", remedy="1 is the object, 0 background")
    return [Point(x, y, int(value)) for (x, y), value in zip(points, labels, strict=True)]


def _points(value: Any, place: str) -> list[tuple[float, float]]:
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        raise PromptError("not a list of points", place=place, remedy=_PAIRS)
    return [_pair(entry, f"{place}[{index}]", _PAIRS) for index, entry in enumerate(value)]


def _pair(entry: Any, place: str, remedy: str) -> tuple[float, float]:
    if not isinstance(entry, (list, tuple)) or len(entry) != 2:
        raise PromptError("not a pair of numbers", place=place, remedy=remedy)
    x, y = (_number(part, place) for part in entry)
    return x, y


def _number(value: Any, place: str) -> float:
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise PromptError("not a finite number", place=place, remedy="give pixels of the picture")
    return number


def _box(value: Any, place: str) -> Box | None:
    """Two corners that lie across, or four numbers; None where there is none."""
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return None
    if isinstance(value, (list, tuple)) and len(value) == 4:
        value = [value[:2], value[2:]]
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise PromptError("not two corners", place=place, remedy=_CORNERS)
    (ax, ay), (bx, by) = (_pair(corner, f"{place}[{index}]", _CORNERS) for index, corner in enumerate(value))
    return Box(min(ax, bx), min(ay, by), max(ax, bx), max(ay, by))


def _threshold(value: Any) -> float | None:
    if value is None:
        return None
    number = _number(value, "threshold")
    if not 0 <= number <= 1:
        raise InputError("not between 0 and 1", place="threshold", remedy="leave it out, or give a predicted IoU")
    return number
