"""YOLO segmentation: `.yolo.txt` for Ultralytics' training, and its description, `.yolo.yaml`.

A line is `class x1 y1 x2 y2 …`, a polygon in fractions of the picture's width and height (0…1).
Classes are the numbers of the labels sorted by name. YOLO has one polygon a line and no way to join
lines: each part of an object has a line of its own, largest first. It has no holes, no score and no
name of the picture either; the `.yolo.yaml` holds what is needed to read a file by itself or to
join it with others.

Limitations: the classes of two files differ, unless both were requested with the same labels;
`sam-poll merge` unifies them. Parts smaller than `min_area_px` are left out, and an object with
such parts only is missing: a note in the `.yolo.yaml` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from sam_poll.core.protocols import Format
from sam_poll.core.types import Mask, OutputFile, Result, Size
from sam_poll.formats.common import label_or_default, labels_of, left_out, yaml_of
from sam_poll.formats.registry import FormatOptions
from sam_poll.imaging.contours import Polygon
from sam_poll.imaging.outlines import outlines

SUFFIX = ".yolo.txt"
FACTS_SUFFIX = ".yolo.yaml"


def make(options: FormatOptions) -> Format:
    """Return the format `yolo` for these options."""
    find = partial(outlines, tolerance_px=options.tolerance_px, min_area_px=options.min_area_px)
    return partial(segments, find=find)


def segments(result: Result, find: Callable[[Mask], list[Polygon]]) -> Sequence[OutputFile]:
    """Return the lines and their description.

    A picture without objects has an empty file, as YOLO requires; where objects were requested, the
    description notes why they are missing.
    """
    labels = labels_of(result)
    lines: list[str] = []
    missing: list[str] = []
    for number, mask in enumerate(result.masks, start=1):
        polygons = find(mask)
        lines += [
            f"{labels.index(label_or_default(mask.label))} {_line(polygon, result.size)}\n"
            for polygon in polygons
        ]
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
        OutputFile(SUFFIX, "text/plain", "".join(lines).encode()),
        OutputFile(FACTS_SUFFIX, "application/yaml", yaml_of(facts).encode(), notes=tuple(missing)),
    ]


def digits(size: Size) -> int:
    """Return the number of decimals that locates a point to a twentieth of a pixel.

    YOLO's usual six suffice up to 99,999 pixels a side; points are a quarter of a pixel inside the
    true edge, so rounding does not move any across it.
    """
    return max(6, len(str(max(size))) + 1)


def _line(polygon: Polygon, size: Size) -> str:
    places = digits(size)
    return " ".join(f"{value:.{places}f}" for value in (polygon / np.array(size)).ravel().tolist())
