"""From an annotation file of any kind to its pictures, and from a picture's annotations to its prompt file.

What can still go wrong here: a prompt file that is written need not be one that is answered: a box that is inside out,
or points beside the picture, are refused when it is.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sam_poll import prompts
from sam_poll.annotations import (
    Annotated,
    Asked,
    Shape,
    coco,
    cvat_xml,
    objects,
    opex,
    reading,
    with_negatives,
    yolo,
)
from sam_poll.annotations.reading import image_place
from sam_poll.complaints import quoted
from sam_poll.errors import PromptError

KINDS = "CVAT for images 1.1 (.xml), COCO (.json), OPEX (.json), or a folder of YOLO texts"
_NO_KIND = f"give one of the four kinds: {KINDS}"


@dataclass(frozen=True, slots=True)
class Named:
    """A picture of an annotation file, and all the names that it may have, most trustworthy first."""

    annotated: Annotated
    names: tuple[str, ...]


def read(data: bytes, stem: str = "") -> list[Named]:
    """The pictures of an annotation file called `stem` (without its ending); its content says which kind it is.

    PromptError, with the place in the file and the remedy, for what is of none of the four kinds, or broken.
    """
    start = data[:64].removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"<") or data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return [Named(found, (found.name,)) for found in cvat_xml.read(data)]
    if start.startswith((b"{", b"[")):
        return _read_json(data, stem)
    if yolo.looks_like(data):
        raise PromptError("is one text of YOLO", place="line 1", remedy="give the folder with all the texts and names")
    reason = "is empty" if not data.strip() else "is of no kind that can be read"
    raise PromptError(reason, place="line 1", remedy=_NO_KIND)


def _read_json(data: bytes, stem: str) -> list[Named]:
    document = reading.load_json(data, coco.lean)
    if opex.is_opex(document):
        return [Named(*opex.read_document(document, stem))]
    if isinstance(document, dict) and {"points", "box", "extreme_points", "objects", "everything"} & document.keys():
        raise PromptError("is a prompt file already", place="top level", remedy="drop it beside its picture")
    if isinstance(document, list) or (isinstance(document, dict) and {"images", "annotations"} & document.keys()):
        return [Named(found, (found.name,)) for found in coco.read_document(document)]
    raise PromptError("is JSON of no kind that can be read", place="top level", remedy=_NO_KIND)


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
    return document(chosen, image)


def document(chosen: Sequence[Asked], image: str) -> bytes:
    """`prompt_file` of objects that have been chosen already."""
    entries = ",\n".join(_json(prompts.as_dict(one.prompt)) for one in chosen)
    text = f'{{"image": {_json(image)}, "objects": [\n{entries}\n]}}\n'
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
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
