"""The responses of CVAT's Nuclio functions: masks as JSON text.

An interactor answers with run lengths (`shapes_response`), or, for clients that do not take them,
with the whole picture (`mask_response`): 40 to 80 MB of text for 20 megapixels, written from runs
of pixels. `json.dumps(bitmap.tolist())` would take many times as long, and gigabytes of memory.

Limitations: a client that parses the whole picture into lists needs a gigabyte for 20 megapixels.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sam_poll.core.types import BoolArray, FloatArray, Mask, Size
from sam_poll.formats.common import published_score
from sam_poll.formats.cvat import flat
from sam_poll.imaging import masks as mask_arrays
from sam_poll.imaging import outlines
from sam_poll.integrations.nuclio.answer_form import AnswerForm

# A row with more runs than one for this number of pixels is written pixel by pixel.
MIN_PIXELS_PER_RUN = 16
CONFIDENCE_ID = 0  # `spec_id` of the attribute that CVAT's editor takes for a shape's confidence
Row = list[tuple[int, int]]  # the runs of set pixels in one row: first pixel, end (exclusive)


def frame(mask: Mask, size: Size, *, head: str = "", tail: str = "") -> str:
    """Return `[[0,255,…],…]`: the whole picture, a list for each row, 255 where the mask is set.

    `head` and `tail` are put before and after it; adding them later would copy the whole text.
    """
    # Any run of a row is a slice of one of these two.
    zeros, full = memoryview(b",0" * size.width), memoryview(b",255" * size.width)
    parts: list[bytes | memoryview] = [head.encode("ascii")]
    rows = _rows(mask.pixels)
    for y in range(size.height):
        inside = mask.top <= y < mask.top + len(mask.pixels)
        runs = next(rows) if inside else []
        if len(runs) * MIN_PIXELS_PER_RUN > size.width:
            parts += b",[", _by_pixel(mask, y - mask.top, zeros), b"]"
        else:
            parts += b",[", *_by_run(runs, mask.left, zeros, full), b"]"
    parts[1] = b"[["  # the first row's `,[`, after `head`
    parts += b"]", tail.encode("ascii")
    return b"".join(parts).decode("ascii")


def interactor_response(
    masks: Sequence[Mask], size: Size, *, clicked: bool, form: AnswerForm
) -> str:
    """Return an interactor's response in one of its forms.

    `clicked`: `masks` is the one mask of what was clicked, otherwise those of all objects.
    """
    if form is AnswerForm.SHAPES:
        return shapes_response(masks)
    return mask_response(masks, size, clicked=clicked)


def shapes_response(masks: Sequence[Mask]) -> str:
    """Return `{"shapes": [{"type": "mask", "points": [0,4,…,l,t,r,b], "attributes"}, …]}`.

    A shape for each mask; empty masks are left out. `points` are CVAT's run lengths and box;
    `attributes` has the predicted IoU as the confidence.
    """
    return json.dumps({"shapes": [_shape(mask) for mask in masks if mask.pixels.size]})


def mask_response(masks: Sequence[Mask], size: Size, *, clicked: bool) -> str:
    """Return `{"mask": [[0,255,…],…]}`, the whole picture by rows.

    If something was `clicked`, `masks` is its one mask. Otherwise `mask` is the union of all masks,
    and `objects` has each of them in a compact form.
    """
    if clicked:
        (mask,) = masks
        return frame(mask, size, head='{"mask": ', tail="}")
    objects = compact(masks)
    return frame(_union(masks, size), size, head='{"mask": ', tail=f', "objects": {objects}}}')


def embedding_response(embedding: FloatArray) -> str:
    """Return SAM1's response for the browser: `{"blob": base64 of float32 1×256×64×64}`."""
    blob = base64.b64encode(embedding.astype("<f4").tobytes()).decode("ascii")
    return f'{{"blob": "{blob}"}}'


def detector_response(masks: Sequence[Mask]) -> str:
    """Return a detector's response: `[{"confidence","label","type":"mask","points", …}, …]`.

    Empty masks are left out. `mask` is the crop's pixels by rows, 0 or 1, followed by left, top,
    right, bottom (inclusive); `points` is the outer polygon of the largest part, which CVAT uses
    where it needs polygons. `confidence` is text, as in CVAT's own functions. `attributes` has the
    predicted IoU as `score`; it is empty where the network's number is not finite.
    """
    return "[" + ",".join(_detected(mask) for mask in masks if mask.pixels.size) + "]"


def compact(masks: Sequence[Mask]) -> str:
    """Return the objects of `detector_response` with `rle` in place of `mask` and `attributes`.

    The text is a thousand times shorter. `rle` is run lengths followed by the box, as CVAT's API
    takes masks."""
    return json.dumps([_object(mask) | {"rle": flat(mask)} for mask in masks if mask.pixels.size])


def _shape(mask: Mask) -> dict[str, Any]:
    score = published_score(mask.score)
    attributes = []
    if score is not None:
        attributes.append({"spec_id": CONFIDENCE_ID, "value": str(score)})
    return {"type": "mask", "points": flat(mask), "attributes": attributes}


def _union(masks: Sequence[Mask], size: Size) -> Mask:
    union = np.zeros((size.height, size.width), dtype=bool)
    for mask in masks:
        height, width = mask.pixels.shape
        union[mask.top : mask.top + height, mask.left : mask.left + width] |= mask.pixels
    return mask_arrays.tight(union, "", 0.0)


def _detected(mask: Mask) -> str:
    height, width = mask.pixels.shape
    digits = np.full((mask.pixels.size, 2), ord(","), dtype=np.uint8)  # `0,` or `1,` for each pixel
    digits[:, 0] = mask.pixels.ravel() + np.uint8(ord("0"))
    pixels = digits.tobytes().decode("ascii")
    box = f"{mask.left},{mask.top},{mask.left + width - 1},{mask.top + height - 1}"
    score = published_score(mask.score)
    attributes = [] if score is None else [{"name": "score", "value": str(score)}]
    # without its closing brace
    opened = json.dumps({**_object(mask), "attributes": attributes})[:-1]
    return f'{opened}, "mask": [{pixels}{box}]}}'


def _object(mask: Mask) -> dict[str, Any]:
    # If every part is below the minimum area, the outline of the first one is used nevertheless.
    outline = (outlines.outlines(mask) or outlines.outlines(mask, min_area_px=0))[0]
    return {
        "confidence": f"{published_score(mask.score) or 0.0:.4f}",
        "label": mask.label,
        "type": "mask",
        "points": outline.ravel().round(2).tolist(),
    }


def _by_run(runs: Row, left: int, zeros: memoryview, full: memoryview) -> list[bytes | memoryview]:
    """Return one row's numbers, separated by commas, from its runs."""
    pieces: list[bytes | memoryview] = []
    at = 0  # pixels written so far
    width = len(zeros) // 2
    for start, end in runs:
        if left + start > at:
            pieces.append(zeros[: 2 * (left + start - at)])
        pieces.append(full[: 4 * (end - start)])
        at = left + end
    if at < width:
        pieces.append(zeros[: 2 * (width - at)])
    pieces[0] = pieces[0][1:]  # without the first comma
    return pieces


def _by_pixel(mask: Mask, row: int, zeros: memoryview) -> bytes:
    """Return one row's numbers, separated by commas, pixel by pixel: for many short runs."""
    pixels = mask.pixels[row]
    after = len(zeros) // 2 - mask.left - len(pixels)
    inside = pixels.tobytes().replace(b"\0", b",0").replace(b"\1", b",255")
    return b"".join((zeros[: 2 * mask.left], inside, zeros[: 2 * after]))[1:]


def _rows(bitmap: BoolArray) -> Iterator[Row]:
    """Return the runs of each row, in order."""
    height, width = bitmap.shape
    stride = width + 1  # with an unset pixel after each row, so that no run continues in the next
    padded = np.zeros((height, stride), dtype=bool)
    padded[:, :width] = bitmap
    pixels = padded.ravel()
    edges = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    if pixels.size and pixels[0]:
        edges = np.concatenate([[0], edges])
    starts, ends = edges[::2], edges[1::2]
    rows = starts // stride
    first = np.searchsorted(rows, np.arange(height + 1)).tolist()
    runs = list(zip((starts % stride).tolist(), (ends - rows * stride).tolist(), strict=True))
    return (runs[first[y] : first[y + 1]] for y in range(height))
