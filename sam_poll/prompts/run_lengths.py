"""COCO's run lengths: masks as lists of numbers or as text.

Run lengths alternate between pixels outside and inside, column by column, beginning outside. As
text, each is a number in base 32 with a sign, from the third on the difference to the last but one
(`rleFrString` and `rleToString` in pycocotools' maskApi.c).

`pycocotools` is not used for reading: it has no function from text to numbers, and making a whole
bitmap instead takes the picture's size in memory.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sam_poll.core.types import Box, RunLengths

Counts = npt.NDArray[np.int64]

# Characters of a number: 40 bits, far more than a picture has pixels
_MAX_DIGITS = 8


def counts_of(text: str) -> Counts:
    """Return the run lengths in COCO's text form. Raises ValueError, with the reason, for others.

    They may be negative, and their sum may be anything.
    """
    codes = np.array(list(text.encode("utf-8")), dtype=np.int64) - ord("0")
    if not len(codes):
        raise ValueError("are empty")
    odd = np.flatnonzero((codes < 0) | (codes > 63))
    if len(odd):
        raise ValueError(f"are no run lengths: byte {int(odd[0]) + 1} is not one of 0 to o")
    ends = np.flatnonzero((codes & 32) == 0)
    if not len(ends) or ends[-1] != len(codes) - 1:
        raise ValueError("are cut off: the last number has no end")
    starts = np.concatenate([[0], ends[:-1] + 1])
    digits = ends - starts + 1
    if digits.max() > _MAX_DIGITS:
        raise ValueError("hold a number larger than any picture")
    exponents = 5 * (np.arange(len(codes)) - np.repeat(starts, digits))
    counts: Counts = np.add.reduceat((codes & 31) << exponents, starts)
    counts -= ((codes[ends] & 16) != 0).astype(np.int64) << (5 * digits)
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    return counts


def text_of(mask: RunLengths) -> str:
    """Return run lengths in COCO's text form."""
    from pycocotools import mask as coco_mask  # not needed to read prompt files

    runs = {"size": [mask.size.height, mask.size.width], "counts": list(mask.counts)}
    packed = coco_mask.frPyObjects(runs, mask.size.height, mask.size.width)
    text: str = packed["counts"].decode("ascii")
    return text


def inside(mask: RunLengths) -> tuple[Counts, Counts]:
    """Return the first pixel of each run inside, and the one behind its last.

    Pixels are numbered column by column.
    """
    edges = np.cumsum(np.array(mask.counts, dtype=np.int64))
    ends = edges[1::2]
    starts = edges[::2][: len(ends)]
    filled = ends > starts
    return starts[filled], ends[filled]


def bounds(mask: RunLengths) -> Box:
    """Return the box around the pixels inside, in edge coordinates."""
    starts, ends = inside(mask)
    height = mask.size.height
    left, top = np.divmod(starts, height)
    right, bottom = np.divmod(ends - 1, height)
    # A run into the next column touches the lower and the upper edge.
    spans = bool((left != right).any())
    return Box(
        float(left[0]),
        0.0 if spans else float(top.min()),
        float(right[-1] + 1),
        float(height if spans else bottom.max() + 1),
    )
