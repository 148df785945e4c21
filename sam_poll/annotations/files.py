"""From an annotation file of any kind to its pictures, and from a picture's annotations to its prompt file.

What can still go wrong here: a prompt file that is written need not be one that is answered: where the annotations do
not tell the picture's size, points beside the picture are refused when it is.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sam_poll import foreign, prompts
from sam_poll.annotations import (
    Annotated,
    Asked,
    Shape,
    coco,
    cvat_xml,
    labelme,
    objects,
    opex,
    reading,
    voc,
    with_negatives,
    yolo,
)
from sam_poll.annotations.reading import image_place
from sam_poll.complaints import quoted
from sam_poll.errors import PromptError
from sam_poll.fs import shown
from sam_poll.prompt_forms import MAX_NOTE
from sam_poll.types import Box, Prompt, Size

KINDS = "CVAT for images 1.1 (.xml), COCO (.json), OPEX (.json), labelme (.json), Pascal VOC (.xml), or YOLO texts"
_NO_KIND = f"give one of these kinds: {KINDS}"
_TOLD = 20  # refused objects that a prompt's notes name; the others are counted


@dataclass(frozen=True, slots=True)
class Named:
    """A picture of an annotation file, and all the names that it may have, most trustworthy first."""

    annotated: Annotated
    names: tuple[str, ...]


def read(data: bytes, stem: str = "") -> list[Named]:
    """The pictures of an annotation file called `stem` (without its ending); its content says which kind it is.

    PromptError, with the place in the file and the remedy, for what is of none of these kinds, or broken.
    """
    start = data[:64].removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"<") or data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        if foreign.of_xml(data) is foreign.VOC:
            return [Named(*voc.read(data, stem))]
        return [Named(found, (found.name,)) for found in cvat_xml.read(data)]
    if start.startswith((b"{", b"[")):
        return _read_json(data, stem)
    if yolo.looks_like(data):
        raise PromptError("is one text of YOLO", place="line 1", remedy="give the folder with all the texts and names")
    reason = "is empty" if not data.strip() else "is of no kind that can be read"
    raise PromptError(reason, place="line 1", remedy=_NO_KIND)


def _read_json(data: bytes, stem: str) -> list[Named]:
    document = reading.load_json(data, coco.lean)
    kind = foreign.of_json(document)
    if kind is foreign.LABELME:
        return [Named(*labelme.read_document(document, stem))]
    if opex.is_opex(document):
        return [Named(*opex.read_document(document, stem))]
    if isinstance(document, dict) and {"points", "box", "extreme_points", "objects", "everything"} & document.keys():
        raise PromptError("is a prompt file already", place="top level", remedy="drop it beside its picture")
    if kind in (foreign.LABEL_STUDIO, foreign.DATUMARO):
        raise kind.refusal("top level", "a file that can be read")
    if isinstance(document, list) or (isinstance(document, dict) and {"images", "annotations"} & document.keys()):
        return [Named(found, (found.name,)) for found in coco.read_document(document)]
    raise PromptError("is JSON of no kind that can be read", place="top level", remedy=_NO_KIND)


@dataclass(frozen=True, slots=True)
class Split:
    """The objects of a picture: those that can be asked for, and why each of the others is refused."""

    sound: tuple[Asked, ...]
    refused: tuple[PromptError, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for each refused object, the last of many a count."""
        lines = [_line(error) for error in self.refused[:_TOLD]]
        more = len(self.refused) - _TOLD
        return tuple(lines + ([f"… and {more:,} more objects were left out"] if more > 0 else []))


def split(chosen: Sequence[Asked], size: Size | None) -> Split:
    """Tell the objects that can be asked for from those that cannot, on a picture of this size (None: not known).

    One bad box (inside out, outside the picture, of numbers that are none) refuses its object alone. The place of a
    refusal is `object 3 "dog", box.x1`; objects are counted from 1, in the order of `chosen`.
    """
    if all(map(_is_sound, chosen)) and _misfit(chosen, size) is None:
        return Split(tuple(chosen), ())
    sound: list[Asked] = []
    refused: list[PromptError] = []
    for position, one in enumerate(chosen, start=1):
        fault = next((shape.fault for shape in one.shapes if shape.fault), None)
        error = PromptError(fault, remedy=reading.NUMBERS) if fault else _refusal(one) or _misfit([one], size)
        if error is None:
            sound.append(one)
            continue
        key = (error.place or "").removeprefix("objects[0]").lstrip(".")
        error.place = f"object {position} {quoted(one.prompt.label)}" + (f", {key}" if key else "")
        refused.append(error)
    return Split(tuple(sound), tuple(refused))


def _is_sound(one: Asked) -> bool:
    """Whether `_refusal` finds nothing, told without the detour of a text: files have a million objects."""
    box, points = one.prompt.box, one.prompt.points
    numbers = [value for point in points for value in (point.x, point.y)]
    if box is not None:
        numbers += (box.x0, box.y0, box.x1, box.y1)
        if not (box.x0 < box.x1 and box.y0 < box.y1):
            return False
    return all(map(math.isfinite, numbers)) and not any(s.fault for s in one.shapes) and _is_label(one.prompt.label)


@lru_cache(maxsize=10_000)
def _is_label(label: str) -> bool:
    """Whether a prompt file may have this label."""
    return _refusal(Asked(Prompt(label, box=Box(1, 1, 2, 2)), ())) is None


def _refusal(one: Asked) -> PromptError | None:
    """Why a prompt file of this object would be refused when it is read; None: it would not."""
    try:
        prompts.parse(_text([one], "x", None, ()))
    except PromptError as error:
        return error
    return None


def _misfit(chosen: Sequence[Asked], size: Size | None) -> PromptError | None:
    """Why prompts of these objects would be refused on a picture of this size; None: they would not."""
    if size is None:
        return None
    try:
        prompts.fit([one.prompt for one in chosen], size)
    except PromptError as error:
        return error
    return None


def _line(error: PromptError) -> str:
    text = shown(f"{error.place} was left out: {error.reason}")
    return text if len(text) <= MAX_NOTE else text[: MAX_NOTE - 1] + "…"


def prompt_file(
    annotated: Annotated, image: str, *, labels: Collection[str] = (), negatives: Collection[str] = ()
) -> bytes:
    """The prompt file for a picture that lies beside it under the plain name `image`: JSON, an object a line.

    `labels`: only objects of these; empty: all. `negatives`: points of these labels are not on the object, beside
    `NEGATIVE_LABELS`. The same annotations give the same bytes. `prompts.parse` reads the same prompts back, or refuses
    what is wrong with them (a box inside out). PromptError where it cannot be told which shapes are one object, or
    where there is nothing to ask for (see `asks`).
    """
    chosen = asked(annotated, labels=labels, negatives=negatives)
    if not chosen:
        of = f" of the labels {', '.join(map(quoted, sorted(labels)))}" if labels else ""
        raise PromptError(f"has neither box nor points{of}", place=image_place(annotated.name), remedy="draw some")
    return document(chosen, image, annotated.size)


def document(chosen: Sequence[Asked], image: str, size: Size | None = None) -> bytes:
    """`prompt_file` of objects that have been chosen already, for a picture of this size (None: not known).

    Objects that cannot be asked for are left out, which the file's notes say. Where that leaves none, all are written:
    the file is then refused with the reason when it is read.
    """
    found = split(chosen, size)
    return _text(found.sound, image, size, found.notes) if found.sound else _text(chosen, image, size, ())


def _text(chosen: Sequence[Asked], image: str, size: Size | None, notes: Sequence[str]) -> bytes:
    head: dict[str, Any] = {"image": image}
    if size is not None:
        head["image_size"] = {"width": size.width, "height": size.height}
    if notes:
        head["notes"] = list(notes)
    lines = "".join(f"{_json(key)}: {_json(value)}, " for key, value in head.items())
    entries = ",\n".join(_json(prompts.as_dict(one.prompt)) for one in chosen)
    text = f'{{{lines}"objects": [\n{entries}\n]}}\n'
    # A lone surrogate has no UTF-8; written as JSON's escape it is refused by whoever reads the prompt, with its place.
    return text.encode("utf-8", "backslashreplace")


def asks(annotated: Annotated, labels: Collection[str] = (), *, negatives: Collection[str] = ()) -> bool:
    """Whether there is anything to ask for. True also where that cannot be told: `prompt_file` then says why."""
    try:
        return bool(asked(annotated, labels=labels, negatives=negatives))
    except PromptError:
        return True


def asked(annotated: Annotated, *, labels: Collection[str] = (), negatives: Collection[str] = ()) -> list[Asked]:
    """The objects of a picture, as `prompt_file` has them. PromptError with the picture's name in its place."""
    shapes: Sequence[Shape] = with_negatives(annotated.shapes, negatives) if negatives else annotated.shapes
    try:
        found = objects(shapes)
    except PromptError as error:
        place = image_place(annotated.name)
        raise PromptError(
            error.reason, place=f"{place}, {error.place}" if error.place else place, remedy=error.remedy
        ) from None
    # Chosen only now: which points belong to which box does not depend on whom one asks for.
    return [one for one in found if not labels or one.prompt.label in labels]


def _json(value: object) -> str:
    # NaN is what a faulty shape has; whoever reads the prompt refuses it.
    return json.dumps(value, ensure_ascii=False)
