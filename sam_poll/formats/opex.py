"""OPEX predictions, `.opex.json`: contours for Waikato's tools.

The libraries `opex` and `fast-opex` read them. One OPEX object for each connected part of a mask.
Coordinates are whole pixels, as OPEX requires: every polygon runs through the centres of its border
pixels, and `bbox` names the first and last row and column, both inclusive. OPEX has no keys for
holes, an object's number or its prompt, and allows only text in `meta`: they are written there,
structured values as JSON. There is no `timestamp` unless one is given, and no timing: the same
result gives the same bytes.

Limitations: a reader that fills the polygons and ignores `meta.holes` gets masks without holes. The
parts of one mask share its score; SAM predicts none for a part.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np

from sam_poll.core.protocols import Format
from sam_poll.core.types import Mask, OutputFile, Prompt, Result
from sam_poll.formats.common import label_or_default, published_score
from sam_poll.formats.registry import FormatOptions
from sam_poll.imaging.contours import Contour, Polygon, contours
from sam_poll.prompts.parser import as_dict

SUFFIX = ".opex.json"


def make(options: FormatOptions) -> Format:
    """Return the format `opex` for these options."""
    return partial(predictions, options=options)


def predictions(
    result: Result, options: FormatOptions, timestamp: str | None = None
) -> Sequence[OutputFile]:
    """Return one JSON file.

    `timestamp` (RFC 3339, the time the picture was taken) is written unchanged.
    """
    find = partial(contours, tolerance_px=options.tolerance_px, min_area_px=options.min_area_px)
    objects, notes = _objects(result, find)
    document: dict[str, Any] = {} if timestamp is None else {"timestamp": timestamp}
    document |= {
        "id": result.job_id,
        "objects": objects,
        "meta": _file_meta(result, [*result.notes, *notes]),
    }
    text = json.dumps(document, ensure_ascii=False, allow_nan=False)
    # A lone surrogate cannot be encoded; Python's escape for it is valid JSON.
    body = text.encode("utf-8", "backslashreplace") + b"\n"
    return [OutputFile(SUFFIX, "application/json", body)]


def _objects(
    result: Result, find: Callable[[Mask], list[Contour]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return all parts of all masks, and a note for each mask without any."""
    objects: list[dict[str, Any]] = []
    notes: list[str] = []
    pairs = zip_longest(result.masks, result.prompts[: len(result.masks)])
    for number, (mask, prompt) in enumerate(pairs, start=1):
        parts = find(mask)
        meta = {"object": str(number), **_prompt_meta(prompt)}
        objects += [_object(mask, part, meta) for part in parts]
        if not parts:
            why = "every part of it is below the minimum area"
            if not mask.pixels.size:
                why = "its mask is empty"
            notes.append(f"object {number} ({mask.label}) has no contour: {why}")
    return objects, notes


def _object(mask: Mask, part: Contour, meta: dict[str, str]) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    score = published_score(mask.score)
    if score is not None:
        entry["score"] = score
    entry["label"] = label_or_default(mask.label)  # OPEX refuses an empty label
    entry["bbox"] = {
        "top": int(part.box.y0),
        "left": int(part.box.x0),
        "bottom": int(part.box.y1) - 1,
        "right": int(part.box.x1) - 1,
    }
    entry["polygon"] = {"points": _whole(part.points)}
    holes = json.dumps([_whole(hole) for hole in part.holes], separators=(",", ":"))
    entry["meta"] = {**meta, "area": str(part.area), "holes": holes}
    return entry


def _whole(polygon: Polygon) -> list[list[int]]:
    """Return the points rounded to whole pixels, as `contours.rasterize` rounds them."""
    points: list[list[int]] = np.rint(polygon).astype(np.int64).tolist()
    return points


def _prompt_meta(prompt: Prompt | None) -> dict[str, str]:
    if prompt is None:
        return {}
    meta = {"prompt": json.dumps(as_dict(prompt), ensure_ascii=False, separators=(",", ":"))}
    if prompt.notes:
        meta["notes"] = "; ".join(prompt.notes)
    return meta


def _file_meta(result: Result, notes: Sequence[str]) -> dict[str, str]:
    """Return the metadata of the file; empty entries are left out."""
    model = result.model
    entries = {
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
    return {key: text for key, text in entries.items() if text}
