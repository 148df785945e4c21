"""Warnings about what a picture does not declare: its nodata value, a transform.

Limitations: a margin that is white on purpose, such as that of a scanned map, is reported, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sam_poll.core.types import BoolArray, Size
from sam_poll.mosaic.grid import Area

# Side in pixels of the square that is examined in each corner, and the smallest one that is.
_CORNER_SIDE = 64
_MIN_CORNER_SIDE = 8
_MIN_CORNERS = 2  # of the same single colour, to report an undeclared nodata value
_MIN_OUTLIER_FRACTION = 0.05  # of a picture's values, to report an outlier
# Reads an area: the bands (C×H×W), and which pixels are valid (H×W).
Values = Callable[[Area], tuple[npt.NDArray[Any], BoolArray]]


def margin(values: Values, size: Size) -> list[float] | None:
    """Return the colour, one value per band, that fills whole corners of the picture.

    Returns None where there is none, or where the corners are not valid data.
    """
    side = min(_CORNER_SIDE, size.width // 4, size.height // 4)
    if side < _MIN_CORNER_SIDE:
        return None
    corners: Counter[tuple[float, ...]] = Counter()
    for x in (0, size.width - side):
        for y in (0, size.height - side):
            bands, valid = values(Area(x, y, x + side, y + side))
            if valid.all() and (bands == bands[:, :1, :1]).all():
                corners[tuple(bands[:, 0, 0].tolist())] += 1
    for colour, count in corners.most_common(1):
        return list(colour) if count >= _MIN_CORNERS else None
    return None


def outlier(values: npt.NDArray[Any]) -> float | None:
    """Return the smallest or largest of a band's values if it looks like a nodata value.

    That is so if many pixels have it and it is far from all other values. Returns None otherwise.
    """
    if not values.size:
        return None
    distinct = np.unique(values)
    if len(distinct) < 3:
        return None
    for extreme, neighbour in ((distinct[0], distinct[1]), (distinct[-1], distinct[-2])):
        gap = abs(float(extreme) - float(neighbour))
        spread = max(float(distinct[-2]) - float(distinct[1]), 0.0)  # of the other values
        count = np.count_nonzero(values == extreme)
        if gap > spread / 2 and count >= _MIN_OUTLIER_FRACTION * values.size:
            return float(extreme)
    return None


def undeclared(value: Sequence[float]) -> str:
    """Return the warning for a value, one number per band, that looks like nodata."""
    if len(set(value)) == 1:
        shown = f"{value[0]:g}"
        remedy = f"gdal_translate -a_nodata {value[0]:g} IN OUT.tif"
    else:
        shown = ", ".join(f"{each:g}" for each in value)
        remedy = "by an alpha band, or a mask in the picture"
    return (
        f"large parts of the picture have one value ({shown}), but it declares no nodata; "
        f"if these parts are empty, declare the value ({remedy}), "
        "or else they are segmented and count for the contrast stretch"
    )


def without_transform(points: int) -> str:
    """Return the warning for a picture that is georeferenced without a transform.

    `points` is the number of its ground control points; 0 means that it has an RPC model.
    """
    reference = f"{points} ground control points" if points else "an RPC model"
    return (
        f"the picture is georeferenced by {reference} only: labels.tif gets the same, "
        "but polygons are in pixels; for polygons on the map, "
        "create a picture with a transform first: gdalwarp IN OUT.tif"
    )
