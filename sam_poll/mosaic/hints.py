"""What a picture leaves unsaid, and its owner should know: nodata that is not declared, a place without a transform.

What can still go wrong here: a margin that is white on purpose, as that of a scanned map, is named as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sam_poll.mosaic.tiles import Area
from sam_poll.types import Bitmap, Size

_SIDE = 64  # pixels of a corner that is looked at
_LEAST = 8
_CORNERS = 2  # of one colour
_SHARE = 0.05  # of a picture's values
Values = Callable[[Area], tuple[npt.NDArray[Any], Bitmap]]


def margin(values: Values, size: Size) -> list[float] | None:
    """Return the value of each band, if whole corners of the picture are of this one colour and count as data."""
    side = min(_SIDE, size.width // 4, size.height // 4)
    if side < _LEAST:
        return None
    seen: Counter[tuple[float, ...]] = Counter()
    for x in (0, size.width - side):
        for y in (0, size.height - side):
            bands, valid = values(Area(x, y, x + side, y + side))
            if valid.all() and (bands == bands[:, :1, :1]).all():
                seen[tuple(bands[:, 0, 0].tolist())] += 1
    for colour, count in seen.most_common(1):
        return list(colour) if count >= _CORNERS else None
    return None


def outlier(values: npt.NDArray[Any]) -> float | None:
    """Return the least or the greatest of a band's values, if it is that of many pixels and far from all others."""
    if not values.size:
        return None
    others = np.unique(values)
    if len(others) < 3:
        return None
    for end, next_one in ((others[0], others[1]), (others[-1], others[-2])):
        gap, rest = abs(float(end) - float(next_one)), float(others[-2]) - float(others[1])
        if gap > max(rest, 0.0) / 2 and np.count_nonzero(values == end) >= _SHARE * values.size:
            return float(end)
    return None


def undeclared(value: Sequence[float]) -> str:
    """Say what to do about a value, of each band, that looks like nodata."""
    if len(set(value)) == 1:
        said, remedy = f"{value[0]:g}", f"gdal_translate -a_nodata {value[0]:g} IN OUT.tif"
    else:
        said, remedy = ", ".join(f"{each:g}" for each in value), "by an alpha band, or a mask in the picture"
    return (
        f"large parts of it are of one value ({said}), and it declares no nodata: if they hold nothing, say so "
        f"({remedy}), or they are segmented and count for the stretch"
    )


def without_transform(points: int) -> str:
    """Say that a picture lies on the map by ground control points, or by a camera's model, only."""
    by = f"{points} ground control points" if points else "an RPC model"
    return (
        f"it lies on the map by {by} only: labels.tif has the same, but polygons are in pixels; "
        "for both on the map, make a picture with a transform first: gdalwarp IN OUT.tif"
    )
