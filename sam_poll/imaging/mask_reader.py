"""Read rough masks that are pictures: what is drawn is inside.

A pixel is inside unless it is black or fully transparent, whatever the number of channels and
bits, so that white on black, a palette of classes and a drawing on a transparent layer all serve.

Limitations: a mask is decoded at its full size, one bool a pixel, before it becomes run lengths.
"""

from __future__ import annotations

import numpy as np

from sam_poll.core.errors import PictureError
from sam_poll.core.types import BoolArray, RunLengths, Size
from sam_poll.imaging import decode
from sam_poll.imaging.masks import column_runs, tight

_LOSSY = {"JPEG": "a JPEG", "AVIF": "an AVIF", "HEIC": "a HEIC"}
MAX_RUNS = 2_000_000
"""Most changes between inside and outside along the columns of a mask: 64 MB as run lengths."""


def read_mask(
    data: bytes, *, size: Size | None = None, max_pixels: int = decode.DEFAULT_MAX_PIXELS
) -> RunLengths:
    """Return the run lengths of a mask, upright, at its full size.

    `size`: that of its picture, which the mask must have. It is checked before anything is decoded.

    Raises PictureError for a JPEG, AVIF or HEIC, an empty mask, one of another size, one with more
    than `MAX_RUNS` changes, and, as `decode.decode`, for what is no picture, damaged or too large;
    IncompleteFileError where its end is missing.
    """
    header = decode.read_header(data, max_pixels=max_pixels)
    lossy = _LOSSY.get(header.format)
    if lossy:
        raise PictureError(
            f"is {lossy}, whose black is not exactly black", remedy="save it as a PNG"
        )
    if size is not None and header.size != size:
        raise PictureError(
            f"the mask is {header.size.width}×{header.size.height}, "
            f"but the picture is {size.width}×{size.height}",
            remedy="make the mask at the full size of the upright picture",
        )
    inside = decode.drawn(data, header)
    if not inside.any():
        raise PictureError("is empty: all pixels are black", remedy="make the object white")
    if _changes(inside) > MAX_RUNS:
        raise PictureError(
            f"is no rough mask: it changes between inside and outside more than {MAX_RUNS:,} times",
            remedy="fill the object, without dots or shading",
        )
    return RunLengths(header.size, tuple(column_runs(tight(inside, "", 1.0), header.size)))


def _changes(inside: BoolArray) -> int:
    return int(np.count_nonzero(inside[1:] != inside[:-1])) + int(inside.shape[1])
