"""From a picture's annotations to its prompt file.

What can still go wrong here: a prompt file that is written need not be one that is answered: a box that is inside out,
or points beside the picture, are refused when it is.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

from sam_poll import prompts
from sam_poll.annotations import Annotated, Asked, Shape, objects, with_negatives
from sam_poll.annotations.reading import image_place
from sam_poll.complaints import quoted
from sam_poll.errors import PromptError


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
