"""CVAT annotations, `.cvat.xml`: what CVAT imports as `CVAT 1.1`, masks as run lengths, holes and all; or polygons.

Each object is one `<mask>` with `source="auto"` and its predicted IoU as attribute `score` (CVAT keeps it only where
the label has a number attribute of that name). Images are named as CVAT knows them, relative to the share. `z_order` is
0 except for an object whose box meets a larger one's: it lies one layer above, so that the smaller stays on top.
`cvat: polygon` writes a `<polygon>` for each part instead, without its holes, which CVAT's polygons cannot have; the
parts of one object share a `group_id`, by which CVAT's exports make one instance of them.

What can still go wrong here: CVAT refuses a file whose labels or images are not in the task, and importing replaces the
task's annotations. XML cannot hold most control characters nor lone surrogates: they become U+FFFD, and a picture so
named will not be found by its name.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from sam_poll.formats import FormatOptions, left_out, paint_order, published_score
from sam_poll.geometry import Polygon, outlines
from sam_poll.types import Bitmap, Document, Format, Mask, Result

SUFFIX = ".cvat.xml"
VERSION = "1.1"
_COMMENT_END = re.compile("-{2,}")  # what must not stand in a comment
# What XML 1.0 does not allow, not even escaped (https://www.w3.org/TR/xml/#charsets).
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def make(options: FormatOptions) -> Format:
    """The format `cvat`."""
    find = partial(outlines, tolerance_px=options.tolerance_px, min_area_px=options.min_area_px)
    return partial(annotations_xml, find=find if options.cvat == "polygon" else None)


def annotations_xml(result: Result, find: Callable[[Mask], list[Polygon]] | None = None) -> Sequence[Document]:
    """One XML with one `<image>`. `find` makes polygons of a mask; None: masks stay masks. An object that has none is
    left out, which a comment in the `<image>` says."""
    root = ET.Element("annotations")
    ET.SubElement(root, "version").text = VERSION
    image = ET.SubElement(root, "image", id="0", name=xml_safe(result.name))
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
    return [Document(SUFFIX, "application/xml", body, notes=tuple(missing))]


def run_lengths(pixels: Bitmap) -> list[int]:
    """Alternating run lengths of h×w bools, row by row, starting with zeros (0 when the first pixel is set).
    Their sum is h·w; an empty array gives none."""
    flat = pixels.ravel()
    if not flat.size:
        return []
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(changes, prepend=0, append=flat.size).tolist()
    return [0, *runs] if flat[0] else runs


def flat(mask: Mask) -> list[int]:
    """A mask as CVAT's API and its functions take it: the run lengths, then left, top, right and bottom, the latter
    two inclusive. Raises ValueError for an empty mask, which CVAT has no way to say."""
    height, width = mask.pixels.shape
    if not mask.pixels.size:
        raise ValueError("an empty mask has no place on the picture")
    return [*run_lengths(mask.pixels), mask.left, mask.top, mask.left + width - 1, mask.top + height - 1]


def z_orders(masks: Sequence[Mask]) -> list[int]:
    """Each mask's layer: 0, or one above the highest larger mask whose box meets its own. Of two with the same area
    the later counts as the smaller."""
    layers = [0] * len(masks)
    if not masks:
        return layers
    boxes = np.array([(m.left, m.top, m.left + m.pixels.shape[1], m.top + m.pixels.shape[0]) for m in masks])
    order = paint_order(masks)
    done = np.zeros(len(masks), np.int64)  # layers in the order of `boxes[order]`
    ranked = boxes[order]
    for rank, index in enumerate(order):
        met = _meets(ranked[:rank], ranked[rank])
        done[rank] = int(done[:rank][met].max()) + 1 if met.any() else 0
        layers[index] = int(done[rank])
    return layers


def xml_safe(text: str) -> str:
    """The text with what XML 1.0 cannot hold replaced by U+FFFD."""
    return _NOT_XML.sub("\ufffd", text)


def _meets(boxes: npt.NDArray[np.int64], box: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which of n×4 boxes (left, top, right, bottom; right and bottom exclusive) share a pixel with `box`."""
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
        points = ";".join(f"{x:.2f},{y:.2f}" for x, y in part.tolist())  # quarters of a pixel: two digits are exact
        yield _scored("polygon", mask, {"points": points, "z_order": str(layer)} | grouped)


def _scored(tag: str, mask: Mask, shape: dict[str, str]) -> ET.Element:
    element = ET.Element(tag, {"label": xml_safe(mask.label), "source": "auto", "occluded": "0", **shape})
    score = published_score(mask.score)
    if score is not None:
        ET.SubElement(element, "attribute", name="score").text = str(score)
    return element
