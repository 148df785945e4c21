"""Requests to a Nuclio function: a picture in base64, and what the user has clicked.

Two forms: CVAT's own (`pos_points`, `neg_points`, `obj_bbox`), and `points` with `labels` and
a flat `box`, as other clients send them; either with a rough shape (`polygon` or `mask`), as prompt
files have it. Instead of clicks there may be the keys of a prompt file
that say what to find: `text`, `exemplars`, `threshold`, `max_objects`. Whatever is invalid raises
an InputError with place and remedy, which the caller answers with HTTP 400.

Limitations: whether a point is inside the picture is checked later, when its size is known.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sam_poll.core.base64_text import picture_file
from sam_poll.core.errors import InputError, PromptError
from sam_poll.core.types import Box, ConceptRequest, Point, Polygon, Prompt, RunLengths
from sam_poll.prompts import parser

_PAIRS = "write [[x, y], …] in pixels of the picture"
_CORNERS = "write [[x0, y0], [x1, y1]], or null"


@dataclass(frozen=True, slots=True, eq=False)
class NuclioRequest:
    """One request.

    `picture` is the file's bytes. `prompt` is None if nothing was clicked: all objects of the kind
    that `concept` describes are to be found, or, if it is None, too, everything is to be segmented.
    `threshold` is the lowest score of a mask.
    """

    picture: bytes
    prompt: Prompt | None
    threshold: float | None = None
    concept: ConceptRequest | None = None


def parse_request(
    body: Any, *, label: str = "object", box_first: bool = False, clicks: bool = True
) -> NuclioRequest:
    """Return the request in a body, which is JSON text or parsed already.

    `label` is that of the prompt. `box_first`: the function is annotated `startswith_box`, and the
    server does not know `obj_bbox` yet, so that the first two of `pos_points` are the box. Without
    `clicks` only the picture is read.

    Raises InputError (PictureError, PromptError).
    """
    fields = _mapping(body)
    picture = picture_file(fields.get("image"), "image")
    if not clicks:
        return NuclioRequest(picture, None)
    prompt = _prompt(fields, label, box_first)
    threshold = _threshold(fields.get("threshold"))
    concept = _concept(fields, label)
    if prompt is not None and concept is not None:
        raise PromptError(
            "a text or exemplars stand beside clicks",
            place="text" if concept.texts else "exemplars",
            remedy="send one of the two",
        )
    return NuclioRequest(picture, prompt, threshold, concept)


def _mapping(body: Any) -> Mapping[str, Any]:
    if isinstance(body, (bytes, bytearray, str)):
        try:
            body = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"the request is not JSON: {error}", place="body", remedy="send a JSON object"
            ) from None
    if not isinstance(body, Mapping):
        raise InputError(
            "the request is not a JSON object", place="body", remedy='send {"image": base64, …}'
        )
    return body


def _prompt(fields: Mapping[str, Any], label: str, box_first: bool) -> Prompt | None:
    positive = _points(fields.get("pos_points"), "pos_points")
    negative = _points(fields.get("neg_points"), "neg_points")
    box = _box(fields.get("obj_bbox"), "obj_bbox") or _box(fields.get("box"), "box")
    if box_first and "obj_bbox" not in fields and len(positive) >= 2:
        box, positive = _box(positive[:2], "pos_points"), positive[2:]
    points = (
        [Point(x, y, 1) for x, y in positive]
        + [Point(x, y, 0) for x, y in negative]
        + _labelled(fields)
    )
    shape = _shape(fields)
    if points and not (box or shape) and not any(point.label for point in points):
        raise PromptError(
            "there are negative points only",
            place="pos_points",
            remedy="add a positive point, or a box",
        )
    return Prompt(label, tuple(points), box, shape=shape) if points or box or shape else None


def _shape(fields: Mapping[str, Any]) -> Polygon | RunLengths | None:
    """Return the rough shape; None where neither a polygon nor a mask is given."""
    document = {key: fields[key] for key in ("polygon", "mask") if fields.get(key) is not None}
    return parser.shape_of(document) if document else None


def _concept(fields: Mapping[str, Any], label: str) -> ConceptRequest | None:
    """Return what to find; None where neither a text nor exemplars are given."""
    keys = ("text", "exemplars", "threshold", "max_objects")
    document = {key: fields[key] for key in keys if fields.get(key) is not None}
    if not document.keys() & {"text", "exemplars"}:
        return None
    if "text" not in document:
        document["label"] = label
    concept = parser.parse(parser.encoded(document)).prompts
    assert isinstance(concept, ConceptRequest)
    return concept


def _labelled(fields: Mapping[str, Any]) -> list[Point]:
    """Return the points of `points`, with their labels of `labels`."""
    points = _points(fields.get("points"), "points")
    labels = fields.get("labels") or []
    if not isinstance(labels, list) or len(labels) != len(points):
        count = len(labels) if isinstance(labels, list) else "no list of"
        raise PromptError(
            f"{count} labels for {len(points)} points",
            place="labels",
            remedy="give each point a 1, or a 0 for background",
        )
    for index, value in enumerate(labels):
        if isinstance(value, bool) or value not in (0, 1):
            raise PromptError(
                "neither 0 nor 1", place=f"labels[{index}]", remedy="1 is the object, 0 background"
            )
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
    """Return the box of two opposite corners or of four numbers; None if there is no box."""
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return None
    if isinstance(value, (list, tuple)) and len(value) == 4:
        value = [value[:2], value[2:]]
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise PromptError("not two corners", place=place, remedy=_CORNERS)
    (ax, ay), (bx, by) = (
        _pair(corner, f"{place}[{index}]", _CORNERS) for index, corner in enumerate(value)
    )
    return Box(min(ax, bx), min(ay, by), max(ax, bx), max(ay, by))


def _threshold(value: Any) -> float | None:
    if value is None:
        return None
    number = _number(value, "threshold")
    if not 0 <= number <= 1:
        raise InputError(
            "not between 0 and 1", place="threshold", remedy="leave it out, or give a predicted IoU"
        )
    return number
