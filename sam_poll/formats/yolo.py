"""YOLO segmentation, `.yolo.txt`: the text that Ultralytics' training reads; and `.yolo.yaml`: what the text is of.

A line is `class x1 y1 x2 y2 …`, a polygon as parts of the picture's width and height (0…1). Classes are the numbers of
the labels sorted by name. YOLO has one polygon a line and nothing to tie lines together: each part of an object has a
line of its own, largest first. It has no holes, no score and no name of the picture either; what is needed to read a
file alone, or to join it with others, stands in the `.yolo.yaml`.

What can still go wrong here: classes of two files differ, unless both were asked for the same labels; `sam-poll merge`
makes them one. Parts smaller than `min_area_px` are left out, and an object of such parts only is not there at all: the
`.yolo.yaml` notes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from sam_poll.formats import FormatOptions, labels_of, left_out, named, yaml_of
from sam_poll.geometry import Polygon, outlines
from sam_poll.types import Document, Format, Mask, Result, Size

SUFFIX = ".yolo.txt"
FACTS_SUFFIX = ".yolo.yaml"


def make(options: FormatOptions) -> Format:
    """The format `yolo`."""
    find = partial(outlines, tolerance_px=options.tolerance_px, min_area_px=options.min_area_px)
    return partial(segments, find=find)


def segments(result: Result, find: Callable[[Mask], list[Polygon]]) -> Sequence[Document]:
    """The lines, and what they are about. A picture without objects has an empty file, as YOLO wants it; where objects
    were asked for, the facts note why."""
    labels = labels_of(result)
    lines: list[str] = []
    missing: list[str] = []
    for number, mask in enumerate(result.masks, start=1):
        polygons = find(mask)
        lines += [f"{labels.index(named(mask.label))} {_line(polygon, result.size)}\n" for polygon in polygons]
        if not polygons:
            missing.append(left_out(number, mask))
    notes = [*result.notes, *missing]
    facts = {
        "image": result.name,
        "width": result.size.width,
        "height": result.size.height,
        "names": dict(enumerate(labels)),
        **({"notes": "; ".join(notes)} if notes else {}),
    }
    return [
        Document(SUFFIX, "text/plain", "".join(lines).encode()),
        Document(FACTS_SUFFIX, "application/yaml", yaml_of(facts).encode(), notes=tuple(missing)),
    ]


def digits(size: Size) -> int:
    """Decimals with which a point is off by a twentieth of a pixel at most. YOLO's usual six do up to 99,999 pixels a
    side; points lie a quarter of a pixel inside the true edge, so nothing changes sides."""
    return max(6, len(str(max(size))) + 1)


def _line(polygon: Polygon, size: Size) -> str:
    places = digits(size)
    return " ".join(f"{value:.{places}f}" for value in (polygon / np.array(size)).ravel().tolist())
