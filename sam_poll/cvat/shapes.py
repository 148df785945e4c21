"""A CVAT task's labels, frames and shapes as we need them; masks as the shapes that CVAT's API takes.

Pure: JSON comes in, JSON goes out. Shapes are compared by what they are (frame, label, type, points), never by number
or group: that is how what is already on a server is known again.

What can still go wrong here: a person who draws to the hundredth of a pixel what we made is taken for us.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sam_poll import geometry
from sam_poll.annotations import NEGATIVE_ATTRIBUTE, NEGATIVE_LABELS, Shape, box_shape
from sam_poll.errors import CvatError, ExitCode
from sam_poll.formats import published_score
from sam_poll.types import Mask, Size

Form = Literal["mask", "polygon", "rectangle"]
FORMS: tuple[Form, ...] = ("mask", "polygon", "rectangle")
SCORE = "score"
Sign = bytes
_DIGITS = 2  # of a pixel: what CVAT's own interface keeps


@dataclass(frozen=True, slots=True)
class Label:
    """A label: `kind` is the only type of shape it allows, or `any`. `score` is the attribute for scores, if it has a
    fit one; `negative` that of negative points."""

    id: int
    name: str
    kind: str
    score: Attribute | None = None
    negative: int | None = None

    def allows(self, form: str) -> bool:
        """Whether shapes of this type may have it."""
        return self.kind in ("any", form)


@dataclass(frozen=True, slots=True)
class Attribute:
    """A label's attribute that can hold a score: its number, and the range it takes where it is a number."""

    id: int
    low: float = float("-inf")
    high: float = float("inf")


@dataclass(frozen=True, slots=True)
class FramePicture:
    """A frame: its number in the task, its picture's name and upright size."""

    number: int
    name: str
    size: Size


def labels_of(entries: Iterable[Mapping[str, Any]]) -> dict[int, Label]:
    """The labels by number; those of a skeleton's parts are left out."""
    found = {}
    for entry in entries:
        if entry.get("has_parent"):
            continue
        attributes = [a for a in entry.get("attributes") or () if isinstance(a, dict)]
        score = next((a for a in attributes if a.get("name") == SCORE), None)
        negative = next((a for a in attributes if a.get("name") == NEGATIVE_ATTRIBUTE), None)
        found[int(entry["id"])] = Label(
            int(entry["id"]),
            str(entry["name"]),
            str(entry.get("type") or "any"),
            _score_attribute(score) if score else None,
            int(negative["id"]) if negative else None,
        )
    return found


def _score_attribute(entry: Mapping[str, Any]) -> Attribute | None:
    if entry.get("input_type") == "text":
        return Attribute(int(entry["id"]))
    if entry.get("input_type") != "number":
        return None
    try:
        low, high = (float(value) for value in list(entry.get("values") or ())[:2])
    except (TypeError, ValueError):
        return None
    return Attribute(int(entry["id"]), low, high)


def frames_of(meta: Mapping[str, Any]) -> dict[int, FramePicture]:
    """The frames by number, without the deleted ones. A video has one entry for all its frames."""
    entries = list(meta.get("frames") or ())
    count = int(meta.get("size") or len(entries))
    deleted = {int(number) for number in meta.get("deleted_frames") or ()}
    if len(entries) == 1 and count > 1:
        entries = [{**entries[0], "name": f"{entries[0].get('name')}#{number}"} for number in range(count)]
    return {
        number: FramePicture(number, str(entry.get("name")), Size(int(entry["width"]), int(entry["height"])))
        for number, entry in enumerate(entries)
        if number not in deleted
    }


# ── what is asked for ──


def asking(entry: Mapping[str, Any], labels: Mapping[int, Label], size: Size) -> Shape | None:
    """A rectangle or points of a task as a shape to ask with, the API's own entry as its key; None for all others."""
    label = labels.get(int(entry.get("label_id") or 0))
    points = [float(value) for value in entry.get("points") or ()]
    if label is None or entry.get("outside"):
        return None
    group = int(entry.get("group") or 0)
    if entry.get("type") == "rectangle" and len(points) == 4:
        corners = (points[0], points[1], points[2], points[3])
        turn = float(entry.get("rotation") or 0.0)
        return box_shape(corners, label.name, rotation=turn, size=size, group=group, key=entry)
    if entry.get("type") == "points" and len(points) >= 2:
        ticked = {int(a.get("spec_id") or 0) for a in entry.get("attributes") or () if str(a.get("value")) == "true"}
        negative = label.name.lower() in NEGATIVE_LABELS or label.negative in ticked
        pairs = tuple(zip(points[::2], points[1::2], strict=False))
        return Shape("points", label.name, pairs, group=group, negative=negative, key=entry)
    return None


# ── what is on the server ──


def sign(entry: Mapping[str, Any]) -> Sign:
    """What a shape is, in 16 bytes: frame, label, type, points, rotation. Equal shapes have equal signs."""
    points = np.round(np.asarray(entry.get("points") or (), np.float64), _DIGITS) + 0.0  # and no minus zero
    head = (
        int(entry["frame"]),
        int(entry["label_id"]),
        str(entry["type"]),
        round(float(entry.get("rotation") or 0), 1),
    )
    made = hashlib.blake2b(repr(head).encode(), digest_size=16)
    made.update(struct.pack("<q", points.size))
    made.update(points.tobytes())
    return made.digest()


class Placed:
    """The shapes that a server has: their numbers by their signs."""

    def __init__(self, shapes: Iterable[Mapping[str, Any]]) -> None:
        self._ids: dict[Sign, list[int]] = {}
        self.last_group = 0
        self._auto: set[int] = set()
        for entry in shapes:
            number = int(entry.get("id") or 0)
            self._ids.setdefault(sign(entry), []).append(number)
            self.last_group = max(self.last_group, int(entry.get("group") or 0))
            if entry.get("source") == "auto":
                self._auto.add(number)

    def __contains__(self, wanted: Sign) -> bool:
        return wanted in self._ids

    def doubles(self, signs: Iterable[Sign]) -> set[int]:
        """The numbers of the second and further shapes of these signs, as far as a program made them."""
        return {number for one in set(signs) for number in sorted(self._ids.get(one, ()))[1:] if number in self._auto}


def counted(annotations: Mapping[str, Any]) -> Counter[str]:
    """How many of what a task holds that cannot be asked with, by type: polygons, masks, tracks …"""
    kinds = Counter(str(entry.get("type")) for entry in annotations.get("shapes") or ())
    kinds["track"] += len(annotations.get("tracks") or ())
    del kinds["rectangle"], kinds["points"]
    return +kinds


# ── what is written ──


def fills(flat: Sequence[float]) -> bool:
    """Whether CVAT's flat form fits itself: run lengths that fill the box behind them."""
    if len(flat) < 5:
        return False
    *runs, left, top, right, bottom = flat
    width, height = right - left + 1, bottom - top + 1
    return width >= 1 and height >= 1 and min(runs) >= 0 and sum(runs) == width * height


def unflat(flat: Sequence[int], label: str, score: float) -> Mask:
    """A mask out of CVAT's flat form (`formats.cvat.flat`). CvatError where that does not fit itself."""
    if not fills(flat):
        raise CvatError("a mask's run lengths do not fill its box", ExitCode.CVAT_REFUSED, place=f"mask {label!r}")
    *runs, left, top, right, bottom = (int(value) for value in flat)
    width, height = right - left + 1, bottom - top + 1
    pixels = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
    return Mask(label, score, left, top, pixels)


def points_of(
    mask: Mask, form: Form, flat: Sequence[int], *, tolerance_px: float, min_area_px: float
) -> list[list[float]]:
    """A mask as the points of one shape, or (polygons) of one for each part; none where nothing is left of it."""
    if form == "mask":
        return [list(flat)]
    if form == "rectangle":
        height, width = mask.pixels.shape
        return [[mask.left, mask.top, mask.left + width, mask.top + height]]
    parts = geometry.outlines(mask, tolerance_px=tolerance_px, min_area_px=min_area_px)
    parts = parts or geometry.outlines(mask, tolerance_px=tolerance_px, min_area_px=0)[:1]
    return [np.round(part, _DIGITS).ravel().tolist() for part in parts]


def entry(
    frame: int, label: Label, form: str, points: list[float], score: float | None, like: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """One shape as the API takes it. `like` is the shape that asked for it: its other attributes are kept."""
    given = [a for a in (like or {}).get("attributes") or () if isinstance(a, dict)]
    said = published_score(score) if score is not None else None
    attributes = [
        {"spec_id": int(a["spec_id"]), "value": str(a.get("value", ""))}
        for a in given
        if label.score is None or int(a["spec_id"]) != label.score.id
    ]
    if label.score and said is not None and label.score.low <= said <= label.score.high:
        attributes.append({"spec_id": label.score.id, "value": str(said)})
    return {
        "type": form,
        "frame": frame,
        "label_id": label.id,
        "points": points,
        "rotation": 0.0,
        "occluded": bool((like or {}).get("occluded", False)),
        "outside": False,
        "z_order": int((like or {}).get("z_order") or 0),
        "group": 0,
        "source": "auto",
        "attributes": attributes,
        "elements": [],
    }
