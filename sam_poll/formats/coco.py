"""COCO instances, `.coco.json`: CVAT imports it as `COCO 1.0`, and most training code reads it.

The file holds one picture, its categories (ids from 1, sorted by name) and an annotation for each
object, whose `id` is the object's number. Masks are compressed run lengths by `pycocotools`, exact
and with holes; `coco: polygon` writes a polygon for each part instead, without holes. `area` and
`bbox` are those of the mask either way. COCO has no score of an annotation: it is written where
detections have it (`score`), and where CVAT reads it (`attributes`).

Limitations: CVAT keeps the score only where the label has an attribute of that name. COCO has no
layers: where objects overlap, a reader paints them in an order of its own. A part smaller than
`min_area_px` has no polygon.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pycocotools import mask as coco_mask

from sam_poll.core.protocols import Format
from sam_poll.core.types import Mask, OutputFile, Result, Size
from sam_poll.formats.common import label_or_default, labels_of, left_out, published_score
from sam_poll.formats.registry import FormatOptions
from sam_poll.imaging.contours import Polygon
from sam_poll.imaging.masks import column_runs
from sam_poll.imaging.outlines import outlines

SUFFIX = ".coco.json"


def make(options: FormatOptions) -> Format:
    """Return the format `coco` for these options."""
    find = partial(outlines, tolerance_px=options.tolerance_px, min_area_px=options.min_area_px)
    return partial(instances, find=find if options.coco == "polygon" else None)


def instances(
    result: Result, find: Callable[[Mask], list[Polygon]] | None = None
) -> Sequence[OutputFile]:
    """Return one JSON file. `find` makes polygons of a mask; None: run lengths.

    Objects without polygons are left out, with a note.
    """
    labels = labels_of(result)
    missing = []
    annotations = []
    for number, mask in enumerate(result.masks, start=1):
        segmentation = _segmentation(mask, result.size, find)
        if segmentation:
            category = labels.index(label_or_default(mask.label)) + 1
            annotation = _annotation(number, mask, category, segmentation)
            prompt_notes = result.prompts[number - 1].notes if number <= len(result.prompts) else ()
            annotations.append(annotation | _notes(prompt_notes))
        else:
            missing.append(left_out(number, mask))
    notes = [*result.notes, *missing]
    image = {
        "id": 1,
        "file_name": result.name,
        "width": result.size.width,
        "height": result.size.height,
    }
    document = {
        "info": {"description": "sam_poll"},
        "licenses": [],
        "categories": [
            {"id": n, "name": label, "supercategory": ""} for n, label in enumerate(labels, start=1)
        ],
        "images": [image | _notes(notes)],
        "annotations": annotations,
    }
    text = json.dumps(document, ensure_ascii=False, allow_nan=False)
    # A lone surrogate cannot be encoded; Python's escape for it is valid JSON.
    body = text.encode("utf-8", "backslashreplace") + b"\n"
    return [OutputFile(SUFFIX, "application/json", body, notes=tuple(missing))]


def _notes(notes: Sequence[str]) -> dict[str, str]:
    return {"notes": "; ".join(notes)} if notes else {}


def rle(mask: Mask, size: Size) -> dict[str, Any]:
    """Return a mask as COCO's compressed run lengths: `size` [height, width], `counts` text."""
    whole = [size.height, size.width]
    runs = {"size": whole, "counts": column_runs(mask, size)}
    packed = coco_mask.frPyObjects(runs, size.height, size.width)
    return {"size": whole, "counts": packed["counts"].decode("ascii")}


def _segmentation(
    mask: Mask, size: Size, find: Callable[[Mask], list[Polygon]] | None
) -> dict[str, Any] | list[list[float]] | None:
    if not mask.pixels.size:
        return None
    return [part.ravel().tolist() for part in find(mask)] if find else rle(mask, size)


def _annotation(number: int, mask: Mask, category: int, segmentation: Any) -> dict[str, Any]:
    height, width = mask.pixels.shape
    score = published_score(mask.score)
    scored: dict[str, Any] = {} if score is None else {"score": score}
    return {
        "id": number,
        "image_id": 1,
        "category_id": category,
        "segmentation": segmentation,
        "area": mask.area,
        "bbox": [mask.left, mask.top, width, height],
        "iscrowd": 0,
        **scored,
        "attributes": dict(scored),
    }
