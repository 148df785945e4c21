"""OPEX predictions, `.opex.json`: contours as Waikato's tools read them (the `opex` and `fast-opex` libraries).

One OPEX object for each connected part of a mask. Coordinates are whole pixels, as OPEX wants them: every polygon runs
through the centres of its border pixels, and `bbox` names the first and last row and column, both inclusive. OPEX has
no word for holes, an object's number or its prompt, and allows only text in `meta`: they stand there, what has
structure as JSON. There is no `timestamp` unless one is handed in, and no timing: the same result gives the same bytes.

What can still go wrong here: a reader that fills the polygons and ignores `meta.holes` gets masks without holes. The
parts of one mask share its score; SAM predicts none for a part.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np

from sam_poll.formats import FormatOptions, published_score
from sam_poll.geometry import Contour, Polygon, contours
from sam_poll.prompts import as_dict
from sam_poll.types import Document, Format, Mask, Prompt, Result

SUFFIX = ".opex.json"


def make(options: FormatOptions) -> Format:
    """The format `opex`."""
    return partial(predictions, options=options)


def predictions(result: Result, options: FormatOptions, timestamp: str | None = None) -> Sequence[Document]:
    """One JSON file. `timestamp` (RFC 3339, the time the picture was taken) is written as it is given."""
    find = partial(contours, tolerance_px=options.tolerance_px, min_area_px=options.min_area_px)
    objects, notes = _objects(result, find)
    made: dict[str, Any] = {} if timestamp is None else {"timestamp": timestamp}
    made |= {"id": result.job_id, "objects": objects, "meta": _file_meta(result, [*result.notes, *notes])}
    text = json.dumps(made, ensure_ascii=False, allow_nan=False)
    # A lone surrogate has no UTF-8, but Python's escape for it is JSON's too.
    return [Document(SUFFIX, "application/json", text.encode("utf-8", "backslashreplace") + b"\n")]


def _objects(result: Result, find: Callable[[Mask], list[Contour]]) -> tuple[list[dict[str, Any]], list[str]]:
    """All parts of all masks, and a note for each mask that has none."""
    objects: list[dict[str, Any]] = []
    notes: list[str] = []
    pairs = zip_longest(result.masks, result.prompts[: len(result.masks)])
    for number, (mask, prompt) in enumerate(pairs, start=1):
        parts = find(mask)
        meta = {"object": str(number), **_prompt_meta(prompt)}
        objects += [_object(mask, part, meta) for part in parts]
        if not parts:
            why = "its mask is empty" if not mask.pixels.size else "every part of it is below the minimum area"
            notes.append(f"object {number} ({mask.label}) has no contour: {why}")
    return objects, notes


def _object(mask: Mask, part: Contour, meta: dict[str, str]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    score = published_score(mask.score)
    if score is not None:
        made["score"] = score
    made["label"] = mask.label or "object"  # OPEX refuses an empty label
    made["bbox"] = {
        "top": int(part.box.y0),
        "left": int(part.box.x0),
        "bottom": int(part.box.y1) - 1,
        "right": int(part.box.x1) - 1,
    }
    made["polygon"] = {"points": _whole(part.points)}
    holes = json.dumps([_whole(hole) for hole in part.holes], separators=(",", ":"))
    made["meta"] = {**meta, "area": str(part.area), "holes": holes}
    return made


def _whole(polygon: Polygon) -> list[list[int]]:
    """Points at whole pixels: rounded, as `geometry.rasterize` rounds them."""
    points: list[list[int]] = np.rint(polygon).astype(np.int64).tolist()
    return points


def _prompt_meta(prompt: Prompt | None) -> dict[str, str]:
    if prompt is None:
        return {}
    made = {"prompt": json.dumps(as_dict(prompt), ensure_ascii=False, separators=(",", ":"))}
    return made | ({"notes": "; ".join(prompt.notes)} if prompt.notes else {})


def _file_meta(result: Result, notes: Sequence[str]) -> dict[str, str]:
    """What the whole file is about; empty entries are left out."""
    model = result.model
    made = {
        "image": result.name,
        "width": str(result.size.width),
        "height": str(result.size.height),
        "model": model.name,
        "family": model.family,
        "device": model.device,
        "precision": model.precision,
        "step": model.step,
        "side": str(model.side),
        "peak_mib": "" if model.peak_mib is None else f"{model.peak_mib:.0f}",
        "notes": "; ".join(notes),
    }
    return {key: text for key, text in made.items() if text}
