"""Masks as JSON text, as CVAT's Nuclio functions answer: written from runs of pixels, never through lists of numbers.

20 megapixels are 40 to 80 MB of text; `json.dumps(bitmap.tolist())` takes many times as long, and gigabytes.

What can still go wrong here: the answer's size; who reads it as lists needs a gigabyte for 20 megapixels.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sam_poll import geometry
from sam_poll.formats import published_score
from sam_poll.formats.cvat import flat
from sam_poll.types import Bitmap, Field, Mask, Size

NOISY = 16  # a row of more runs than one for so many pixels is written pixel by pixel
Row = list[tuple[int, int]]  # the runs of set pixels, first and end


def frame(mask: Mask, size: Size, *, head: str = "", tail: str = "") -> str:
    """`[[0,255,…],…]`: the whole picture, a list for each row, 255 where the mask is set.

    `head` and `tail` are what stands around it: put there later, they would cost a copy of it all.
    """
    zeros, full = memoryview(b",0" * size.width), memoryview(b",255" * size.width)
    parts: list[bytes | memoryview] = [head.encode("ascii")]
    rows = _rows(mask.pixels)
    for y in range(size.height):
        inside = mask.top <= y < mask.top + len(mask.pixels)
        runs = next(rows) if inside else []
        if len(runs) * NOISY > size.width:
            parts += b",[", _by_pixel(mask, y - mask.top, zeros), b"]"
        else:
            parts += b",[", *_by_run(runs, mask.left, zeros, full), b"]"
    parts[1] = b"[["
    parts += b"]", tail.encode("ascii")
    return b"".join(parts).decode("ascii")


def interacted(masks: Sequence[Mask], size: Size, *, clicked: bool) -> str:
    """An interactor's answer, `{"mask": [[0,255,…],…]}`: the one mask of what was `clicked`. Else all that was found,
    taken together, and in `objects` each by itself, in few words."""
    if clicked:
        (mask,) = masks
        return frame(mask, size, head='{"mask": ', tail="}")
    return frame(_together(masks, size), size, head='{"mask": ', tail=f', "objects": {listed(masks)}}}')


def embedded(embedding: Field) -> str:
    """SAM1's answer for the decoder in the browser: `{"blob": base64 of float32 1×256×64×64}`."""
    blob = base64.b64encode(embedding.astype("<f4").tobytes()).decode("ascii")
    return f'{{"blob": "{blob}"}}'


def detected(masks: Sequence[Mask]) -> str:
    """A detector's answer: `[{"confidence","label","type":"mask","points","mask"}, …]`, empty masks left out.

    `mask` is the crop's pixels row by row, 0 or 1, and left, top, right, bottom behind them (inclusive); `points` the
    largest part's outer polygon, which CVAT takes where it wants polygons. `confidence` is text, as in CVAT's own
    functions.
    """
    return "[" + ",".join(_detected(mask) for mask in masks if mask.pixels.size) + "]"


def listed(masks: Sequence[Mask]) -> str:
    """The same objects with `rle` in place of `mask`: run lengths, and the box behind them, as CVAT's API takes masks.
    A thousandth of the text."""
    return json.dumps([_named(mask) | {"rle": flat(mask)} for mask in masks if mask.pixels.size])


def _together(masks: Sequence[Mask], size: Size) -> Mask:
    together = np.zeros((size.height, size.width), dtype=bool)
    for mask in masks:
        height, width = mask.pixels.shape
        together[mask.top : mask.top + height, mask.left : mask.left + width] |= mask.pixels
    return geometry.tight(together, "", 0.0)


def _detected(mask: Mask) -> str:
    height, width = mask.pixels.shape
    digits = np.full((mask.pixels.size, 2), ord(","), dtype=np.uint8)
    digits[:, 0] = mask.pixels.ravel() + np.uint8(ord("0"))
    box = f"{mask.left},{mask.top},{mask.left + width - 1},{mask.top + height - 1}"
    return json.dumps(_named(mask))[:-1] + ', "mask": [' + digits.tobytes().decode("ascii") + box + "]}"


def _named(mask: Mask) -> dict[str, Any]:
    # The outline of a part that is smaller than any threshold is still the only one there is.
    outline = (geometry.outlines(mask) or geometry.outlines(mask, min_area_px=0))[0]
    return {
        "confidence": f"{published_score(mask.score) or 0.0:.4f}",
        "label": mask.label,
        "type": "mask",
        "points": outline.ravel().round(2).tolist(),
    }


def _by_run(runs: Row, left: int, zeros: memoryview, full: memoryview) -> list[bytes | memoryview]:
    """One row's numbers, each with its comma but the first."""
    pieces: list[bytes | memoryview] = []
    at, width = 0, len(zeros) // 2
    for start, end in runs:
        if left + start > at:
            pieces.append(zeros[: 2 * (left + start - at)])
        pieces.append(full[: 4 * (end - start)])
        at = left + end
    if at < width:
        pieces.append(zeros[: 2 * (width - at)])
    pieces[0] = pieces[0][1:]
    return pieces


def _by_pixel(mask: Mask, row: int, zeros: memoryview) -> bytes:
    """One row's numbers where there are many short runs."""
    pixels = mask.pixels[row]
    after = len(zeros) // 2 - mask.left - len(pixels)
    inside = pixels.tobytes().replace(b"\0", b",0").replace(b"\1", b",255")
    return b"".join((zeros[: 2 * mask.left], inside, zeros[: 2 * after]))[1:]


def _rows(bitmap: Bitmap) -> Iterator[Row]:
    """The runs of each row in turn."""
    height, width = bitmap.shape
    fenced = np.zeros((height, width + 1), dtype=bool)  # so that no run goes on in the next row
    fenced[:, :width] = bitmap
    flat = fenced.ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    if flat.size and flat[0]:
        edges = np.concatenate([[0], edges])
    starts, ends = edges[::2], edges[1::2]
    which = starts // (width + 1)
    first = np.searchsorted(which, np.arange(height + 1)).tolist()
    pairs = list(zip((starts % (width + 1)).tolist(), (ends - which * (width + 1)).tolist(), strict=True))
    return (pairs[first[y] : first[y + 1]] for y in range(height))
