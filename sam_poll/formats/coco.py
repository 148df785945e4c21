"""COCO instances, `.coco.json`: what CVAT imports as `COCO 1.0`, and what most training code reads.

One picture, its categories (ids from 1, sorted by name) and an annotation for each object, whose `id` is the object's
number. Masks are compressed run lengths by `pycocotools`, exact, holes and all; `coco: polygon` writes a polygon for
each part instead, without its holes. `area` and `bbox` are the mask's own either way. COCO knows no score of an
annotation: it stands where detections have it (`score`), and where CVAT looks (`attributes`).

What can still go wrong here: CVAT keeps the score only where the label has an attribute of that name. COCO has no
layers: where objects overlap, a reader paints them in an order of its own. A part smaller than `min_area_px` has no
polygon.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from sam_poll.formats import FormatOptions, labels_of, left_out, named, published_score
from sam_poll.geometry import Polygon, outlines
from sam_poll.types import Document, Format, Mask, Result, Size

SUFFIX = ".coco.json"


def make(options: FormatOptions) -> Format:
    """The format `coco`."""
    find = partial(outlines, tolerance_px=options.tolerance_px, min_area_px=options.min_area_px)
    return partial(instances, find=find if options.coco == "polygon" else None)


def instances(result: Result, find: Callable[[Mask], list[Polygon]] | None = None) -> Sequence[Document]:
    """One JSON file. `find` makes polygons of a mask; None: run lengths. What has none is left out, and noted."""
    labels = labels_of(result)
    missing = []
    annotations = []
    for number, mask in enumerate(result.masks, start=1):
        segmentation = _segmentation(mask, result.size, find)
        if segmentation:
            made = _annotation(number, mask, labels.index(named(mask.label)) + 1, segmentation)
            prompt_notes = result.prompts[number - 1].notes if number <= len(result.prompts) else ()
            annotations.append(made | ({"notes": "; ".join(prompt_notes)} if prompt_notes else {}))
        else:
            missing.append(left_out(number, mask))
    notes = [*result.notes, *missing]
    image = {"id": 1, "file_name": result.name, "width": result.size.width, "height": result.size.height}
    made = {
        "info": {"description": "sam_poll"},
        "licenses": [],
        "categories": [{"id": n, "name": label, "supercategory": ""} for n, label in enumerate(labels, start=1)],
        "images": [image | ({"notes": "; ".join(notes)} if notes else {})],
        "annotations": annotations,
    }
    text = json.dumps(made, ensure_ascii=False, allow_nan=False)
    # A lone surrogate has no UTF-8, but Python's escape for it is JSON's too.
    body = text.encode("utf-8", "backslashreplace") + b"\n"
    return [Document(SUFFIX, "application/json", body, notes=tuple(missing))]


def rle(mask: Mask, size: Size) -> dict[str, Any]:
    """A mask as COCO's compressed run lengths: `size` [height, width], `counts` text."""
    whole = [size.height, size.width]
    found = coco_mask.frPyObjects({"size": whole, "counts": column_runs(mask, size)}, size.height, size.width)
    return {"size": whole, "counts": found["counts"].decode("ascii")}


def column_runs(mask: Mask, size: Size) -> list[int]:
    """Alternating run lengths of the whole picture, column by column, starting with zeros. Their sum is H·W.

    Made from the crop's own runs: memory is about the crop's, never the picture's.
    """
    height, width = mask.pixels.shape
    columns = np.zeros((width, height + 1), np.int8)  # the zero below each column ends its last run
    columns[:, :height] = mask.pixels.T
    steps = np.diff(columns.ravel(), prepend=0)
    at = np.flatnonzero(steps)  # in turn: where a run of ones begins, where it ends
    column, row = np.divmod(at, height + 1)
    edges = (mask.left + column) * size.height + mask.top + row
    # A run that ends with the picture's last row goes on where one begins in the next column's first.
    goes_on = np.flatnonzero(edges[1:-1:2] == edges[2::2]) * 2 + 1
    edges = np.delete(edges, np.concatenate([goes_on, goes_on + 1]))
    runs: list[int] = np.diff(edges, prepend=0, append=size.width * size.height).tolist()
    return runs if runs[-1] else runs[:-1]


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
