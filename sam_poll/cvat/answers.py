"""What we need of a CVAT server's answers, looked at once, where they come in.

An answer that lacks it is refused with its place. Taken for an empty list, a proxy's 200 with an error in it would be a
task without boxes, or one whose masks have all to be sent once more. What is more than we need is left as it is: a
server of another version may add to it.

What can still go wrong here: an answer of the right form that is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sam_poll.errors import CvatError, ExitCode

Answer = Mapping[str, Any]
STRANGE = "the server's answer is not what CVAT answers"
_REMEDY = "look at what lies between here and the server; cvat-sdk should be of the server's version"
_MISSING = object()
_NUMBERS = frozenset({int, float})
_OR_NONE = type(None)
_SHAPE: Mapping[str, Any] = {"id": int, "frame": int, "label_id": int, "type": str}
_SHAPE_MAY: Mapping[str, Any] = {
    "group": (int, _OR_NONE),
    "z_order": (int, _OR_NONE),
    "rotation": (int, float, _OR_NONE),
    "points": (list, _OR_NONE),
    "attributes": (list, _OR_NONE),
}


def mapping(answer: Any, what: str) -> Answer:
    """A JSON object. CvatError."""
    if not isinstance(answer, dict):
        raise _strange(what)
    return answer


def entries(answer: Answer, key: str, what: str) -> list[Answer]:
    """The list of JSON objects that an answer holds under `key`. CvatError."""
    found = answer.get(key)
    if not isinstance(found, list):
        raise _strange(f"{what}: {key}")
    for number, entry in enumerate(found):
        if not isinstance(entry, dict):
            raise _strange(f"{what}: {key}[{number}]")
    return found


def drawn(answer: Any, what: str) -> Answer:
    """A task's `shapes` and `tracks`. CvatError."""
    read = mapping(answer, what)
    entries(read, "tracks", what)
    for place, shape in _numbered(read, "shapes", what):
        _hold(shape, _SHAPE, _SHAPE_MAY, place)
        if not set(map(type, shape.get("points") or ())) <= _NUMBERS:
            raise _strange(f"{place}.points")
        for attribute in shape.get("attributes") or ():
            if isinstance(attribute, dict):
                _hold(attribute, {"spec_id": int}, {}, f"{place}.attributes")
    return read


def frames(answer: Any, what: str) -> Answer:
    """A task's `frames` (one for all of a video), their number, and those that are deleted. CvatError."""
    read = mapping(answer, what)
    _hold(read, {"size": int}, {"deleted_frames": (list, _OR_NONE)}, what)
    if not set(map(type, read.get("deleted_frames") or ())) <= {int}:
        raise _strange(f"{what}: deleted_frames")
    for place, frame in _numbered(read, "frames", what):
        _hold(frame, {"name": str, "width": int, "height": int}, {}, place)
    return read


def labels(found: list[Answer], what: str) -> list[Answer]:
    """Labels with their attributes. CvatError."""
    for number, label in enumerate(found):
        place = f"{what}[{number}]"
        _hold(label, {"id": int, "name": str}, {"attributes": (list, _OR_NONE)}, place)
        for attribute in label.get("attributes") or ():
            if isinstance(attribute, dict):
                _hold(attribute, {"id": int, "name": str}, {"values": (list, _OR_NONE)}, f"{place}.attributes")
    return found


def _numbered(answer: Answer, key: str, what: str) -> Iterator[tuple[str, Answer]]:
    return ((f"{what}: {key}[{number}]", entry) for number, entry in enumerate(entries(answer, key, what)))


def _hold(entry: Answer, must: Mapping[str, Any], may: Mapping[str, Any], place: str) -> None:
    for key, kind in must.items():
        if not isinstance(entry.get(key, _MISSING), kind):
            raise _strange(f"{place}.{key}")
    for key, kind in may.items():
        if key in entry and not isinstance(entry[key], kind):
            raise _strange(f"{place}.{key}")


def _strange(place: str) -> CvatError:
    return CvatError(STRANGE, ExitCode.CVAT_REFUSED, place=place, remedy=_REMEDY)
