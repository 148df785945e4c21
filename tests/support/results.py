"""Results made by hand, without a network, for the tests of what is written: masks are drawn,
prompts are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sam_poll.core.types import BoolArray, Box, Mask, ModelInfo, Picture, Prompt, Result, Size

MODEL = ModelInfo("demo", "sam2", 256, "cpu", "float32", step="float32 256")


def mask_of(frame: BoolArray, label: str = "object", score: float = 0.9) -> Mask:
    """The crop of a full H×W frame, found the slow way."""
    rows, columns = np.flatnonzero(frame.any(axis=1)), np.flatnonzero(frame.any(axis=0))
    if not rows.size:
        return Mask(label, score, 0, 0, np.zeros((0, 0), bool))
    top, left = int(rows[0]), int(columns[0])
    return Mask(label, score, left, top, frame[top : rows[-1] + 1, left : columns[-1] + 1].copy())


def rectangle(size: Size, x0: int, y0: int, x1: int, y1: int, **kwargs: Any) -> Mask:
    """A filled rectangle; x1 and y1 exclusive."""
    frame = np.zeros((size.height, size.width), bool)
    frame[y0:y1, x0:x1] = True
    return mask_of(frame, **kwargs)


def disc(size: Size, x: float, y: float, radius: float, hole: float = 0, **kwargs: Any) -> Mask:
    """A disc, or a ring when `hole` is the radius of its hole."""
    rows, columns = np.mgrid[: size.height, : size.width]
    distance = np.hypot(columns - x, rows - y)
    return mask_of((distance <= radius) & (distance >= hole), **kwargs)


def filled(frame: BoolArray) -> BoolArray:
    """The frame with the holes of each part filled: ground is what can be reached from outside by
    edges.
    """
    around = np.pad((~frame).astype(np.uint8), 1, constant_values=1)
    _, numbers = cv2.connectedComponents(around, connectivity=4)
    return np.asarray(numbers[1:-1, 1:-1] != numbers[0, 0])


def result_of(
    size: Size,
    masks: Sequence[Mask],
    *,
    prompts: Sequence[Prompt] | None = None,
    picture: Picture | None = None,
    **kwargs: Any,
) -> Result:
    if prompts is None:
        prompts = [Prompt(mask.label, box=Box(1, 2, 9, 8)) for mask in masks]
    values: dict[str, Any] = {
        "job_id": "cam1/dog",
        "name": "done/cam1/dog.jpg",
        "model": MODEL,
        **kwargs,
    }
    return Result(size=size, masks=tuple(masks), prompts=tuple(prompts), picture=picture, **values)


def grey_picture(size: Size, scale: int = 1) -> Picture:
    """A picture with a gradient, at 1/scale of `size`."""
    height, width = -(-size.height // scale), -(-size.width // scale)
    ramp = np.linspace(40, 200, width, dtype=np.uint8)
    return Picture(np.repeat(np.tile(ramp, (height, 1))[..., None], 3, axis=2), size, "00")


@st.composite
def frames(draw: st.DrawFn, largest: int = 24) -> BoolArray:
    """Bool H×W, from nothing set to all set, among them single pixels and rings."""
    shape = draw(st.tuples(st.integers(1, largest), st.integers(1, largest)))
    frame = draw(hnp.arrays(np.bool_, shape))
    if draw(st.booleans()) and min(shape) >= 3:
        frame[:] = False
        frame[: draw(st.integers(3, shape[0])), : draw(st.integers(3, shape[1]))] = True
        frame[1, 1] = False  # a ring, or a plate with a hole
    return frame
