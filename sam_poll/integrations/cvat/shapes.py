"""Labels, frames and shapes of a CVAT task, and masks as the shapes that CVAT's API takes.

Pure: JSON in, JSON out. Shapes are compared by frame, label, type and points, never by number or
group: in this way a shape that is on the server already is recognized.

Where a score is kept is decided here alone. From CVAT 2.57 on, a shape has a score of its own;
before, only an attribute of its label can hold one, which labels that are created here then get. A
label that has the attribute gets the score in any case.

Limitations: a shape that a person has drawn, to a hundredth of a pixel, like one that this program
has written is taken for the latter.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sam_poll.core.errors import CvatError, ExitCode
from sam_poll.core.types import Box, Mask, Size
from sam_poll.formats.common import published_score
from sam_poll.formats.cvat import z_orders
from sam_poll.imaging import outlines
from sam_poll.imaging.found_objects import within_room
from sam_poll.prompts.importers.shapes import (
    NEGATIVE_ATTRIBUTE,
    Shape,
    box_shape,
    is_negative_label,
)

Form = Literal["mask", "polygon", "rectangle"]
FORMS: tuple[Form, ...] = ("mask", "polygon", "rectangle")
Source = Literal["boxes", "polygons"]  # what marks the objects to segment
SOURCES: tuple[Source, ...] = ("boxes", "polygons")
SCORE = "score"  # the attribute of a label that takes the predicted IoU
# The attribute's value for shapes drawn by hand: the COCO export fails on one that is no number.
DEFAULT_SCORE = "1"
# The first version whose API gives each shape a `score` of its own: `LabeledShapeRequest` has it in
# cvat-sdk 2.57.0, and not in 2.56.0.
NATIVE_SCORE_SINCE = (2, 57)
Fingerprint = bytes
_DIGITS = 2  # decimals of a coordinate in pixels: as many as CVAT's own interface keeps


@dataclass(frozen=True, slots=True)
class Label:
    """A label of a task.

    `kind` is the only type of shape that it allows, or `any`; `score` is its attribute for scores,
    if it has one that can hold them; `negative` is the number of its attribute that marks negative
    points. `native_score`: the server's shapes have a score of their own.
    """

    id: int
    name: str
    kind: str
    score: Attribute | None = None
    negative: int | None = None
    native_score: bool = False

    @property
    def keeps_score(self) -> bool:
        """Return whether the score of a shape with this label is kept."""
        return self.native_score or self.score is not None

    def allows(self, form: str) -> bool:
        """Return whether shapes of this type may have the label."""
        return self.kind in ("any", form)


@dataclass(frozen=True, slots=True)
class Attribute:
    """A label's attribute for scores: its number, and its range if it is a number attribute."""

    id: int
    low: float = float("-inf")
    high: float = float("inf")


@dataclass(frozen=True, slots=True)
class FramePicture:
    """A frame: its number in the task, its picture's name, and the upright picture's size."""

    number: int
    name: str
    size: Size


def has_native_score(version: str) -> bool:
    """Return whether the shapes of a server of this version have a score of their own.

    A server whose version cannot be read counts as one without: an attribute works everywhere.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None:
        return False
    return (int(numbers[1]), int(numbers[2])) >= NATIVE_SCORE_SINCE


def new_label(name: str, *, native_score: bool) -> dict[str, Any]:
    """Return a label for the API to create.

    It has an attribute for scores unless the server's shapes have a score of their own.
    """
    attributes = []
    if not native_score:
        attributes.append(
            {
                "name": SCORE,
                "mutable": False,
                "input_type": "text",  # a number attribute of CVAT takes whole steps only
                "default_value": DEFAULT_SCORE,
                "values": [DEFAULT_SCORE],
            }
        )
    return {"name": name, "attributes": attributes}


def advice_for_new_labels(*, native_score: bool) -> str:
    """Return what to add after "add the label" in an error message; begins with a comma."""
    if native_score:
        return ""
    return f", with a text attribute `{SCORE}` whose default value is {DEFAULT_SCORE}"


def labels_of(
    entries: Iterable[Mapping[str, Any]], *, native_score: bool = False
) -> dict[int, Label]:
    """Return the labels by number, without those of a skeleton's parts."""
    labels = {}
    for entry in entries:
        if entry.get("has_parent"):
            continue
        attributes = [a for a in entry.get("attributes") or () if isinstance(a, dict)]
        score = next((a for a in attributes if a.get("name") == SCORE), None)
        negative = next((a for a in attributes if a.get("name") == NEGATIVE_ATTRIBUTE), None)
        labels[int(entry["id"])] = Label(
            int(entry["id"]),
            str(entry["name"]),
            str(entry.get("type") or "any"),
            _score_attribute(score) if score else None,
            int(negative["id"]) if negative else None,
            native_score,
        )
    return labels


def _score_attribute(entry: Mapping[str, Any]) -> Attribute | None:
    """Return the attribute if it is a text or a number; None if it cannot hold a score."""
    if entry.get("input_type") == "text":
        return Attribute(int(entry["id"]))
    if entry.get("input_type") != "number":
        return None
    try:
        low, high = (float(value) for value in list(entry.get("values") or ())[:2])
    except (TypeError, ValueError):
        return None
    return Attribute(int(entry["id"]), low, high)


def frames_of(meta: Mapping[str, Any], *, first: int = 0) -> dict[int, FramePicture]:
    """Return the frames of a task or a job by number in the task, without the deleted ones.

    `first` is the number of the first frame in `meta`: that of a job's first frame. A video has one
    entry for all its frames, which get the names `NAME#0`, `NAME#1`, …
    """
    entries = list(meta.get("frames") or ())
    count = int(meta.get("size") or len(entries))
    deleted = {int(number) for number in meta.get("deleted_frames") or ()}
    if len(entries) == 1 and count > 1:
        entries = [
            {**entries[0], "name": f"{entries[0].get('name')}#{first + number}"}
            for number in range(count)
        ]
    return {
        number: FramePicture(
            number, str(entry.get("name")), Size(int(entry["width"]), int(entry["height"]))
        )
        for number, entry in enumerate(entries, start=first)
        if number not in deleted
    }


# ── shapes as prompts ──


def prompt_shape(
    entry: Mapping[str, Any], labels: Mapping[int, Label], size: Size, source: Source = "boxes"
) -> Shape | None:
    """Return a rectangle or points of a task as a shape of a prompt; None for all other shapes.

    With `source` "polygons" a polygon or points. The shape's `key` is the API's entry.
    """
    label = labels.get(int(entry.get("label_id") or 0))
    points = [float(value) for value in entry.get("points") or ()]
    if label is None or entry.get("outside"):
        return None
    group = int(entry.get("group") or 0)
    if source == "polygons" and entry.get("type") == "polygon" and len(points) >= 6:
        pairs = tuple(zip(points[::2], points[1::2], strict=False))
        return Shape("polygon", label.name, pairs, group=group, key=entry)
    if source == "boxes" and entry.get("type") == "rectangle" and len(points) == 4:
        corners = (points[0], points[1], points[2], points[3])
        rotation = float(entry.get("rotation") or 0.0)
        return box_shape(corners, label.name, rotation=rotation, size=size, group=group, key=entry)
    if entry.get("type") == "points" and len(points) >= 2:
        ticked = {
            int(a.get("spec_id") or 0)
            for a in entry.get("attributes") or ()
            if str(a.get("value")) == "true"
        }
        negative = is_negative_label(label.name) or label.negative in ticked
        pairs = tuple(zip(points[::2], points[1::2], strict=False))
        return Shape("points", label.name, pairs, group=group, negative=negative, key=entry)
    return None


def box_around(entry: Mapping[str, Any]) -> Box | None:
    """Return the upright box around a rectangle, polygon, mask or ellipse of a task.

    None for all other shapes, and for one that has no area. CVAT's points of an ellipse are its
    centre, and a corner of the box around it: right and top.
    """
    points = [float(value) for value in entry.get("points") or ()]
    kind = entry.get("type")
    corners: tuple[float, float, float, float] | None = None
    if entry.get("outside"):
        return None
    if kind == "rectangle" and len(points) == 4:
        corners = (points[0], points[1], points[2], points[3])
    elif kind == "ellipse" and len(points) == 4:
        x, y, right, top = points
        corners = (2 * x - right, top, right, 2 * y - top)
    elif kind == "polygon" and len(points) >= 6:
        xs, ys = points[::2], points[1::2]
        corners = (min(xs), min(ys), max(xs), max(ys))
    elif kind == "mask" and len(points) > 4:
        left, top, right, bottom = points[-4:]
        corners = (left, top, right + 1, bottom + 1)
    if corners is None:
        return None
    (x0, y0), (x1, y1) = box_shape(corners, "", rotation=float(entry.get("rotation") or 0.0)).points
    return Box(x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


# ── what is on the server ──


def fingerprint(entry: Mapping[str, Any]) -> Fingerprint:
    """Return a digest of 16 bytes of a shape's frame, label, type, rotation and points.

    Equal shapes have equal fingerprints; points are compared to a hundredth of a pixel.
    """
    points = np.round(np.asarray(entry.get("points") or (), np.float64), _DIGITS)
    points = points + 0.0  # -0.0 becomes 0.0, which has other bytes
    head = (
        int(entry["frame"]),
        int(entry["label_id"]),
        str(entry["type"]),
        round(float(entry.get("rotation") or 0), 1),
    )
    hasher = hashlib.blake2b(repr(head).encode(), digest_size=16)
    hasher.update(struct.pack("<q", points.size))
    hasher.update(points.tobytes())
    return hasher.digest()


class ServerShapes:
    """The shapes on a server: their numbers and groups, by fingerprint."""

    def __init__(self, shapes: Iterable[Mapping[str, Any]]) -> None:
        self._ids: dict[Fingerprint, list[int]] = {}
        self._groups: dict[Fingerprint, int] = {}
        self.last_group = 0
        self._automatic: set[int] = set()
        for entry in shapes:
            number = int(entry.get("id") or 0)
            key = fingerprint(entry)
            self._ids.setdefault(key, []).append(number)
            self._groups[key] = int(entry.get("group") or 0)
            self.last_group = max(self.last_group, self._groups[key])
            if entry.get("source") == "auto":
                self._automatic.add(number)

    def __contains__(self, wanted: Fingerprint) -> bool:
        return wanted in self._ids

    def group_of(self, wanted: Fingerprint) -> int:
        """Return the group of a shape; 0 if it is in none, or not on the server."""
        return self._groups.get(wanted, 0)

    def duplicates(self, fingerprints: Iterable[Fingerprint]) -> set[int]:
        """Return the numbers of all shapes with these fingerprints but the first of each.

        Only shapes of source `auto`, which a program has made, are returned.
        """
        return {
            number
            for one in set(fingerprints)
            for number in sorted(self._ids.get(one, ()))[1:]
            if number in self._automatic
        }


def other_shapes(annotations: Mapping[str, Any], source: Source = "boxes") -> Counter[str]:
    """Return the numbers of shapes that are no prompts, by type (masks, tracks …)."""
    kinds = Counter(str(entry.get("type")) for entry in annotations.get("shapes") or ())
    kinds["track"] += len(annotations.get("tracks") or ())
    del kinds["rectangle" if source == "boxes" else "polygon"], kinds["points"]
    return +kinds


# ── what is written ──


def run_lengths_fit(flat: Sequence[float]) -> bool:
    """Return whether the run lengths of CVAT's flat form fill the box that follows them."""
    if len(flat) < 5:
        return False
    *runs, left, top, right, bottom = flat
    width, height = right - left + 1, bottom - top + 1
    return width >= 1 and height >= 1 and min(runs) >= 0 and sum(runs) == width * height


def mask_of(flat: Sequence[int], label: str, score: float) -> Mask:
    """Return the mask of CVAT's flat form; the inverse of `formats.cvat.flat`.

    Raises CvatError if the run lengths do not fill the box.
    """
    if not run_lengths_fit(flat):
        raise CvatError(
            "a mask's run lengths do not fill its box",
            ExitCode.CVAT_REFUSED,
            place=f"mask {label!r}",
        )
    *runs, left, top, right, bottom = (int(value) for value in flat)
    width, height = right - left + 1, bottom - top + 1
    pixels = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
    return Mask(label, score, left, top, pixels)


def points_of(
    mask: Mask, form: Form, flat: Sequence[int], *, tolerance_px: float, min_area_px: float
) -> list[list[float]]:
    """Return the points of a mask's shapes: one list, or for polygons one for each part.

    `flat` is the mask in CVAT's flat form. Returns an empty list if nothing is left of the mask.
    """
    if form == "mask":
        return [list(flat)]
    if form == "rectangle":
        height, width = mask.pixels.shape
        return [[mask.left, mask.top, mask.left + width, mask.top + height]]
    parts = outlines.outlines(mask, tolerance_px=tolerance_px, min_area_px=min_area_px)
    if not parts:  # all parts are below the minimum area: keep the first one nevertheless
        parts = outlines.outlines(mask, tolerance_px=tolerance_px, min_area_px=0)[:1]
    return [np.round(part, _DIGITS).ravel().tolist() for part in parts]


@dataclass(frozen=True, slots=True)
class SegmentedObject:
    """An object to be written: its label, its mask in CVAT's flat form, and its score.

    An empty list is an empty mask. `template` is as for `entry`.
    """

    label: Label
    flat: Sequence[int]
    score: float
    template: Mapping[str, Any] | None = None


def entries_of(
    frame: int,
    objects: Sequence[SegmentedObject],
    form: Form,
    *,
    tolerance_px: float,
    min_area_px: float,
) -> Iterator[list[dict[str, Any]]]:
    """Yield the shapes of each of a frame's objects; none for an empty mask.

    Smaller objects are in layers above larger ones that they overlap.
    """
    masks = within_room(
        mask_of(one.flat, one.label.name, float(one.score)) for one in objects if one.flat
    )
    layered = iter(zip(masks, z_orders(masks), strict=True))
    for one in objects:
        if not one.flat:
            yield []
            continue
        mask, layer = next(layered)
        point_lists = points_of(
            mask, form, one.flat, tolerance_px=tolerance_px, min_area_px=min_area_px
        )
        entries = [
            entry(frame, one.label, form, points, mask.score, one.template)
            for points in point_lists
        ]
        yield [{**made, "z_order": made["z_order"] + layer} for made in entries]


def entry(
    frame: int,
    label: Label,
    form: str,
    points: list[float],
    score: float | None,
    template: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return one shape as the API takes it.

    `template` is the shape that was the prompt: its flags, its layer and its attributes other than
    the score are kept. The score is written as the shape's own if the server's shapes have one, and
    into the label's attribute if there is one that can hold it.
    """
    template = template or {}
    attributes = [
        {"spec_id": int(a["spec_id"]), "value": str(a.get("value", ""))}
        for a in template.get("attributes") or ()
        if isinstance(a, dict) and (label.score is None or int(a["spec_id"]) != label.score.id)
    ]
    published = published_score(score) if score is not None else None
    if label.score and published is not None and label.score.low <= published <= label.score.high:
        attributes.append({"spec_id": label.score.id, "value": str(published)})
    own_score = {}
    if label.native_score and published is not None:
        own_score = {"score": published}
    return {
        "type": form,
        "frame": frame,
        "label_id": label.id,
        "points": points,
        "rotation": 0.0,
        "occluded": bool(template.get("occluded", False)),
        "outside": False,
        "z_order": int(template.get("z_order") or 0),
        "group": 0,
        "source": "auto",
        "attributes": attributes,
        "elements": [],
        **own_score,
    }
