"""CVAT annotations, `.cvat.xml`: CVAT imports it as `CVAT 1.1`; masks as run lengths, or polygons.

Each object is one `<mask>` with `source="auto"` and its predicted IoU as attribute `score` (CVAT
keeps it only where the label has a text attribute of that name). Images are named as in CVAT,
relative to the share, and numbered beyond the frames of any task. `z_order` is 0 except for an
object whose box overlaps a larger one's: it is one layer above, so that the smaller object stays on
top. `cvat: polygon` writes a `<polygon>` for each part instead, without holes, which CVAT's
polygons cannot have; the parts of one object share a `group_id`, from which CVAT's exports make one
instance.

Limitations: CVAT refuses a file whose labels or images are not in the task, and importing replaces
the task's annotations. XML cannot hold most control characters nor lone surrogates: they become
U+FFFD, and a picture with such a name is not found by it.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from sam_poll.core.protocols import Format
from sam_poll.core.types import BoolArray, Mask, OutputFile, Result
from sam_poll.formats.common import (
    CVAT_FIRST_IMAGE_ID,
    left_out,
    paint_order,
    published_score,
)
from sam_poll.formats.registry import FormatOptions
from sam_poll.imaging.contours import Polygon
from sam_poll.imaging.outlines import outlines

SUFFIX = ".cvat.xml"
VERSION = "1.1"
_COMMENT_END = re.compile("-{2,}")  # what must not stand in a comment
# What XML 1.0 does not allow, not even escaped (https://www.w3.org/TR/xml/#charsets).
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def make(options: FormatOptions) -> Format:
    """Return the format `cvat` for these options."""
    find = partial(outlines, tolerance_px=options.tolerance_px, min_area_px=options.min_area_px)
    return partial(annotations_xml, find=find if options.cvat == "polygon" else None)


def annotations_xml(
    result: Result, find: Callable[[Mask], list[Polygon]] | None = None
) -> Sequence[OutputFile]:
    """Return one XML file with one `<image>`. `find` makes polygons of a mask; None: masks.

    An object without polygons is left out, and a comment in the `<image>` says so.
    """
    root = ET.Element("annotations")
    ET.SubElement(root, "version").text = VERSION
    image = ET.SubElement(root, "image", id=str(CVAT_FIRST_IMAGE_ID), name=xml_safe(result.name))
    image.attrib |= {"width": str(result.size.width), "height": str(result.size.height)}
    layers = z_orders(result.masks)
    group = 0
    missing = []
    for number, (mask, layer) in enumerate(zip(result.masks, layers, strict=True), start=1):
        parts = find(mask) if find else []
        if not (parts if find else mask.pixels.size):
            missing.append(left_out(number, mask))
            image.append(ET.Comment(f" {_COMMENT_END.sub('-', xml_safe(missing[-1]))} "))
        if len(parts) > 1:
            group += 1
        if find:
            image.extend(_polygons(mask, layer, parts, group))
        elif mask.pixels.size:
            image.append(_mask(mask, layer))
    ET.indent(root)
    body = ET.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"
    return [OutputFile(SUFFIX, "application/xml", body, notes=tuple(missing))]


def run_lengths(pixels: BoolArray) -> list[int]:
    """Return the alternating run lengths of h×w bools, row by row, zeros first.

    The first is 0 when the first pixel is set. Their sum is h·w; an empty array has none.
    """
    flat = pixels.ravel()
    if not flat.size:
        return []
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(changes, prepend=0, append=flat.size).tolist()
    return [0, *runs] if flat[0] else runs


def flat(mask: Mask) -> list[int]:
    """Return a mask as CVAT's API and functions take it: run lengths, left, top, right, bottom.

    Right and bottom are inclusive. Raises ValueError for an empty mask, which this form cannot
    express.
    """
    height, width = mask.pixels.shape
    if not mask.pixels.size:
        raise ValueError("an empty mask has no position in the picture")
    return [
        *run_lengths(mask.pixels),
        mask.left,
        mask.top,
        mask.left + width - 1,
        mask.top + height - 1,
    ]


def z_orders(masks: Sequence[Mask]) -> list[int]:
    """Return each mask's layer: 0, or one above the highest larger mask whose box overlaps its own.

    Of two masks with the same area the later counts as the smaller.
    """
    layers = [0] * len(masks)
    if not masks:
        return layers
    boxes = np.array(
        [(m.left, m.top, m.left + m.pixels.shape[1], m.top + m.pixels.shape[0]) for m in masks]
    )
    order = paint_order(masks)
    ranked = boxes[order]
    ranked_layers = np.zeros(len(masks), np.int64)
    for rank, index in enumerate(order):
        overlapping = _overlaps(ranked[:rank], ranked[rank])
        if overlapping.any():
            ranked_layers[rank] = int(ranked_layers[:rank][overlapping].max()) + 1
        layers[index] = int(ranked_layers[rank])
    return layers


def xml_safe(text: str) -> str:
    """Replace the characters that XML 1.0 cannot hold by U+FFFD."""
    return _NOT_XML.sub("\ufffd", text)


def _overlaps(boxes: npt.NDArray[np.int64], box: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return which of n×4 boxes share a pixel with `box`.

    Boxes are left, top, right, bottom; right and bottom exclusive.
    """
    starts = np.maximum(boxes[:, :2], box[:2])
    ends = np.minimum(boxes[:, 2:], box[2:])
    return np.asarray((starts < ends).all(axis=1), np.bool_)


def _mask(mask: Mask, layer: int) -> ET.Element:
    height, width = mask.pixels.shape
    shape = {
        "rle": ", ".join(map(str, run_lengths(mask.pixels))),
        "left": str(mask.left),
        "top": str(mask.top),
        "width": str(width),
        "height": str(height),
    }
    return _scored("mask", mask, shape | {"z_order": str(layer)})


def _polygons(mask: Mask, layer: int, parts: Sequence[Polygon], group: int) -> Iterator[ET.Element]:
    grouped = {"group_id": str(group)} if len(parts) > 1 else {}
    for part in parts:
        # Points are quarters of a pixel, so that two digits are exact.
        points = ";".join(f"{x:.2f},{y:.2f}" for x, y in part.tolist())
        yield _scored("polygon", mask, {"points": points, "z_order": str(layer)} | grouped)


def _scored(tag: str, mask: Mask, shape: dict[str, str]) -> ET.Element:
    element = ET.Element(
        tag, {"label": xml_safe(mask.label), "source": "auto", "occluded": "0", **shape}
    )
    score = published_score(mask.score)
    if score is not None:
        ET.SubElement(element, "attribute", name="score").text = str(score)
    return element
