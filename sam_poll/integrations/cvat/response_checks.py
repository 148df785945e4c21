"""Checks of a CVAT server's answers, made once, where they are received.

An answer without a field that is used here is refused with its place. Taken for an empty list, a
proxy's error with HTTP 200 would be a task without boxes, or one whose masks have all to be sent
again. Further fields are not checked: a server of another version may add some.

Limitations: only the form is checked, not whether the answer is right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sam_poll.core.errors import CvatError, ExitCode

Answer = Mapping[str, Any]
UNEXPECTED = "the server's answer does not have the form of CVAT's API"
_REMEDY = "check for a proxy before the server; cvat-sdk should be of the server's version"
_MISSING = object()
_NUMBERS = frozenset({int, float})
_NONE = type(None)
_SHAPE_REQUIRED: Mapping[str, Any] = {"id": int, "frame": int, "label_id": int, "type": str}
_SHAPE_OPTIONAL: Mapping[str, Any] = {
    "group": (int, _NONE),
    "z_order": (int, _NONE),
    "rotation": (int, float, _NONE),
    "points": (list, _NONE),
    "attributes": (list, _NONE),
}


def mapping(answer: Any, what: str) -> Answer:
    """Return the answer if it is a JSON object. Raises CvatError."""
    if not isinstance(answer, dict):
        raise _unexpected(what)
    return answer


def entries(answer: Answer, key: str, what: str) -> list[Answer]:
    """Return the list of JSON objects that an answer holds under `key`. Raises CvatError."""
    values = answer.get(key)
    if not isinstance(values, list):
        raise _unexpected(f"{what}: {key}")
    for index, entry in enumerate(values):
        if not isinstance(entry, dict):
            raise _unexpected(f"{what}: {key}[{index}]")
    return values


def task_annotations(answer: Any, what: str) -> Answer:
    """Return a task's annotations if `shapes` and `tracks` are well-formed. Raises CvatError."""
    checked = mapping(answer, what)
    entries(checked, "tracks", what)
    for place, shape in _with_places(checked, "shapes", what):
        _check_fields(shape, _SHAPE_REQUIRED, _SHAPE_OPTIONAL, place)
        if not set(map(type, shape.get("points") or ())) <= _NUMBERS:
            raise _unexpected(f"{place}.points")
        for attribute in shape.get("attributes") or ():
            if isinstance(attribute, dict):
                _check_fields(attribute, {"spec_id": int}, {}, f"{place}.attributes")
    return checked


def frames(answer: Any, what: str) -> Answer:
    """Return a task's frames: `frames` (one entry for a video), `size` and `deleted_frames`.

    Raises CvatError.
    """
    checked = mapping(answer, what)
    _check_fields(checked, {"size": int}, {"deleted_frames": (list, _NONE)}, what)
    if not set(map(type, checked.get("deleted_frames") or ())) <= {int}:
        raise _unexpected(f"{what}: deleted_frames")
    for place, frame in _with_places(checked, "frames", what):
        _check_fields(frame, {"name": str, "width": int, "height": int}, {}, place)
    return checked


def job(answer: Any, what: str) -> Answer:
    """Return a job with the numbers of its task and its first and last frame. Raises CvatError."""
    checked = mapping(answer, what)
    numbers = {"id": int, "task_id": int, "start_frame": int, "stop_frame": int}
    _check_fields(checked, numbers, {"type": (str, _NONE)}, what)
    return checked


def frame_numbers(answer: Any, key: str, what: str) -> frozenset[int]:
    """Return the frame numbers that an answer holds under `key`, which it may lack.

    Raises CvatError.
    """
    numbers = mapping(answer, what).get(key) or ()
    if not isinstance(numbers, (list, tuple)) or not set(map(type, numbers)) <= {int}:
        raise _unexpected(f"{what}: {key}")
    return frozenset(numbers)


def labels(answers: list[Answer], what: str) -> list[Answer]:
    """Return labels if they and their attributes are well-formed. Raises CvatError."""
    for index, label in enumerate(answers):
        place = f"{what}[{index}]"
        _check_fields(label, {"id": int, "name": str}, {"attributes": (list, _NONE)}, place)
        for attribute in label.get("attributes") or ():
            if isinstance(attribute, dict):
                _check_fields(
                    attribute,
                    {"id": int, "name": str},
                    {"values": (list, _NONE)},
                    f"{place}.attributes",
                )
    return answers


def _with_places(answer: Answer, key: str, what: str) -> Iterator[tuple[str, Answer]]:
    return (
        (f"{what}: {key}[{index}]", entry) for index, entry in enumerate(entries(answer, key, what))
    )


def _check_fields(
    entry: Answer, required: Mapping[str, Any], optional: Mapping[str, Any], place: str
) -> None:
    for key, kind in required.items():
        if not isinstance(entry.get(key, _MISSING), kind):
            raise _unexpected(f"{place}.{key}")
    for key, kind in optional.items():
        if key in entry and not isinstance(entry[key], kind):
            raise _unexpected(f"{place}.{key}")


def _unexpected(place: str) -> CvatError:
    return CvatError(UNEXPECTED, ExitCode.CVAT_REFUSED, place=place, remedy=_REMEDY)
