"""Read annotation files of any kind, and write the prompt files of their pictures.

Limitations: a written prompt file may still be refused when it is used: where the annotations do
not state the picture's size, points outside the picture are detected only then.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sam_poll.core.errors import PromptError
from sam_poll.core.text import shown
from sam_poll.core.types import Box, Prompt, Size
from sam_poll.core.validation import quoted
from sam_poll.prompts import foreign_formats, parser
from sam_poll.prompts.importers import (
    coco,
    common,
    cvat_xml,
    datumaro,
    labelme,
    opex,
    voc,
    yolo,
)
from sam_poll.prompts.importers.common import image_place
from sam_poll.prompts.importers.shapes import (
    Annotated,
    PromptObject,
    Shape,
    objects,
    with_negatives,
)
from sam_poll.prompts.schema import MAX_NOTE

KINDS = (
    "CVAT for images 1.1 (.xml), COCO (.json), Datumaro (.json), OPEX (.json), "
    "labelme (.json, .xml), Pascal VOC (.xml), or YOLO texts"
)
_NO_KIND = f"give one of these kinds: {KINDS}"
_MAX_NAMED = 20  # refused objects that are named in a prompt's notes; the others are counted


@dataclass(frozen=True, slots=True)
class Named:
    """A picture of an annotation file, with all its possible names, most reliable first."""

    annotated: Annotated
    names: tuple[str, ...]


def read(data: bytes, stem: str = "") -> list[Named]:
    """Return the pictures of an annotation file; its content determines its kind.

    `stem` is the file's name without its extension. Raises PromptError, with the place in the file
    and the remedy, for a file of an unknown kind or an invalid one.
    """
    start = data[:64].removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"<") or data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        if foreign_formats.of_xml(data) is foreign_formats.VOC:
            return [Named(*voc.read(data, stem))]
        return [Named(annotated, (annotated.name,)) for annotated in cvat_xml.read(data)]
    if start.startswith((b"{", b"[")):
        return _read_json(data, stem)
    if yolo.looks_like(data):
        raise PromptError(
            "is a single YOLO text",
            place="line 1",
            remedy="give the folder with all the texts and names",
        )
    reason = "is of no kind that can be read" if data.strip() else "is empty"
    raise PromptError(reason, place="line 1", remedy=_NO_KIND)


def _read_json(data: bytes, stem: str) -> list[Named]:
    document = common.load_json(data, _lean)
    kind = foreign_formats.of_json(document)
    if kind is foreign_formats.LABELME:
        return [Named(*labelme.read_document(document, stem))]
    if opex.is_opex(document):
        return [Named(*opex.read_document(document, stem))]
    if (
        isinstance(document, dict)
        and {"points", "box", "extreme_points", "objects", "everything"} & document.keys()
    ):
        raise PromptError(
            "is a prompt file already", place="top level", remedy="drop it beside its picture"
        )
    if kind is foreign_formats.DATUMARO:
        return [Named(annotated, names) for annotated, names in datumaro.read_document(document)]
    if kind is foreign_formats.LABEL_STUDIO:
        raise kind.refusal("top level", "a file that can be read")
    if isinstance(document, list) or (
        isinstance(document, dict) and {"images", "annotations"} & document.keys()
    ):
        return [Named(annotated, (annotated.name,)) for annotated in coco.read_document(document)]
    raise PromptError("is JSON of no kind that can be read", place="top level", remedy=_NO_KIND)


def _lean(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object during parsing, without what no reader needs."""
    return datumaro.lean(coco.lean(pairs))


@dataclass(frozen=True, slots=True)
class Split:
    """The objects of a picture: the valid ones, and the errors of the others."""

    sound: tuple[PromptObject, ...]
    refused: tuple[PromptError, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for each refused object; of many, the last line is a count."""
        lines = [_line(error) for error in self.refused[:_MAX_NAMED]]
        more = len(self.refused) - _MAX_NAMED
        return tuple(lines + ([f"… and {more:,} more objects were left out"] if more > 0 else []))


def split(chosen: Sequence[PromptObject], size: Size | None) -> Split:
    """Separate valid objects from invalid ones, on a picture of this size (None: not known).

    An invalid box (inside out, outside the picture, of invalid numbers) refuses its object only.
    The place of an error is `object 3 "dog", box.x1`; objects are counted from 1, in the order of
    `chosen`.
    """
    if all(map(_is_sound, chosen)) and _misfit(chosen, size) is None:
        return Split(tuple(chosen), ())
    sound: list[PromptObject] = []
    refused: list[PromptError] = []
    for position, one in enumerate(chosen, start=1):
        error = _error_of(one, size)
        if error is None:
            sound.append(one)
            continue
        key = (error.place or "").removeprefix("objects[0]").lstrip(".")
        error.place = f"object {position} {quoted(one.prompt.label)}" + (f", {key}" if key else "")
        refused.append(error)
    return Split(tuple(sound), tuple(refused))


def _error_of(one: PromptObject, size: Size | None) -> PromptError | None:
    """Return why an object cannot be used on a picture of this size; None where it can."""
    fault = next((shape.fault for shape in one.shapes if shape.fault), None)
    if fault:
        return PromptError(fault, remedy=common.NUMBERS)
    return _refusal(one) or _misfit([one], size)


def _is_sound(one: PromptObject) -> bool:
    """Return whether `_refusal` finds nothing, quickly: files may have a million objects."""
    box, points = one.prompt.box, one.prompt.points
    numbers = [value for point in points for value in (point.x, point.y)]
    if box is not None:
        numbers += (box.x0, box.y0, box.x1, box.y1)
        if not (box.x0 < box.x1 and box.y0 < box.y1):
            return False
    return (
        all(map(math.isfinite, numbers))
        and not any(s.fault for s in one.shapes)
        and _is_label(one.prompt.label)
    )


@lru_cache(maxsize=10_000)
def _is_label(label: str) -> bool:
    """Return whether a prompt file may have this label."""
    return _refusal(PromptObject(Prompt(label, box=Box(1, 1, 2, 2)), ())) is None


def _refusal(one: PromptObject) -> PromptError | None:
    """Return the error of reading a prompt file of this object; None without one."""
    try:
        parser.parse(_text([one], "x", None, ()))
    except PromptError as error:
        return error
    return None


def _misfit(chosen: Sequence[PromptObject], size: Size | None) -> PromptError | None:
    """Return the error of these objects' prompts on a picture of this size; None without one."""
    if size is None:
        return None
    try:
        parser.fit([one.prompt for one in chosen], size)
    except PromptError as error:
        return error
    return None


def _line(error: PromptError) -> str:
    text = shown(f"{error.place} was left out: {error.reason}")
    return text if len(text) <= MAX_NOTE else text[: MAX_NOTE - 1] + "…"


def document(chosen: Sequence[PromptObject], image: str, size: Size | None = None) -> bytes:
    """Return the prompt file of selected objects, for a picture of this size (None: not known).

    It is for a picture beside it with the plain name `image`: JSON, an object a line. The same
    objects give the same bytes. `parser.parse` reads the same prompts back, or reports their errors
    (an inside-out box).

    Invalid objects are left out, which the file's notes state. Where all are invalid, all are
    written: the file is then refused with the reason when it is read.
    """
    parts = split(chosen, size)
    if parts.sound:
        return _text(parts.sound, image, size, parts.notes)
    return _text(chosen, image, size, ())


def _text(
    chosen: Sequence[PromptObject], image: str, size: Size | None, notes: Sequence[str]
) -> bytes:
    head: dict[str, Any] = {"image": image}
    if size is not None:
        head["image_size"] = {"width": size.width, "height": size.height}
    if notes:
        head["notes"] = list(notes)
    lines = "".join(f"{_json(key)}: {_json(value)}, " for key, value in head.items())
    entries = ",\n".join(_json(parser.as_dict(one.prompt)) for one in chosen)
    text = f'{{{lines}"objects": [\n{entries}\n]}}\n'
    # A lone surrogate cannot be encoded; as JSON's escape it is refused when the prompt is read,
    # with its place.
    return text.encode("utf-8", "backslashreplace")


def selected_objects(
    annotated: Annotated, *, labels: Collection[str] = (), negatives: Collection[str] = ()
) -> list[PromptObject]:
    """Return the objects of a picture, as `document` takes them.

    `labels`: only objects of these; empty: all. `negatives`: points of these labels are not on the
    object, in addition to `NEGATIVE_LABELS`. Raises PromptError with the picture's name in its
    place where it is ambiguous which shapes are one object.
    """
    shapes: Sequence[Shape] = (
        with_negatives(annotated.shapes, negatives) if negatives else annotated.shapes
    )
    try:
        grouped = objects(shapes)
    except PromptError as error:
        place = image_place(annotated.name)
        raise PromptError(
            error.reason,
            place=f"{place}, {error.place}" if error.place else place,
            remedy=error.remedy,
        ) from None
    # Selected after grouping: which points belong to which box does not depend on the labels.
    return [one for one in grouped if not labels or one.prompt.label in labels]


def _json(value: object) -> str:
    # A faulty shape has NaN, which is refused when the prompt is read.
    return json.dumps(value, ensure_ascii=False)
