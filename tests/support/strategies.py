"""Hypothesis strategies: masks, logits with their frames, and the files of pictures."""

from __future__ import annotations

import io

import cv2
import numpy as np
from hypothesis import strategies as st
from PIL import Image

from sam_poll.core.types import BoolArray, InputTransform, Logits, Size

seeds = st.integers(0, 2**32 - 1)


# -- masks --------------------


def _noise(rng: np.random.Generator, height: int, width: int) -> BoolArray:
    return rng.random((height, width)) < rng.random()


def _blobs(rng: np.random.Generator, height: int, width: int) -> BoolArray:
    """Smooth shapes with bays, bridges and holes, some of them touching the border."""
    field = cv2.GaussianBlur(rng.random((height, width)), (0, 0), float(rng.uniform(0.8, 5)))
    return field > np.quantile(field, rng.random())


def _rings(rng: np.random.Generator, height: int, width: int) -> BoolArray:
    """Rings in rings around one centre, and partly outside the frame."""
    y, x = np.mgrid[:height, :width]
    away = np.hypot(x - rng.uniform(0, width), (y - rng.uniform(0, height)) * rng.uniform(0.3, 3))
    return (away // rng.uniform(1, 12)) % 2 < 1


def _boxes(rng: np.random.Generator, height: int, width: int) -> BoolArray:
    """Rectangles put on and taken away again, a pixel wide now and then."""
    out = np.zeros((height, width), dtype=bool)
    for turn in range(int(rng.integers(1, 6))):
        x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
        out[y : y + int(rng.integers(1, height + 1)), x : x + int(rng.integers(1, width + 1))] = (
            turn % 2 == 0
        )
    return out


def _lines(rng: np.random.Generator, height: int, width: int) -> BoolArray:
    """Lines one pixel wide, in any direction."""
    out = np.zeros((height, width), dtype=np.uint8)
    for _ in range(int(rng.integers(1, 4))):
        start, end = (
            tuple(int(rng.integers(0, side)) for side in (width, height)) for _ in range(2)
        )
        cv2.line(out, start, end, 1)
    return out.astype(bool)


def _diagonal(rng: np.random.Generator, height: int, width: int) -> BoolArray:
    return np.eye(height, width, int(rng.integers(-3, 4)), dtype=bool)


def _pixel(rng: np.random.Generator, height: int, width: int) -> BoolArray:
    out = np.zeros((height, width), dtype=bool)
    out[int(rng.integers(0, height)), int(rng.integers(0, width))] = True
    return out


def _full(rng: np.random.Generator, height: int, width: int) -> BoolArray:
    return np.ones((height, width), dtype=bool)


def _empty(rng: np.random.Generator, height: int, width: int) -> BoolArray:
    return np.zeros((height, width), dtype=bool)


_KINDS = (_blobs, _rings, _boxes, _noise, _lines, _diagonal, _pixel, _full, _empty)


@st.composite
def bitmaps(draw: st.DrawFn, max_side: int = 60) -> BoolArray:
    """A bool frame H×W of any of the kinds above."""
    height, width = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    kind = draw(st.sampled_from(_KINDS))
    return kind(np.random.default_rng(draw(seeds)), height, width)


# -- logits --------------------


@st.composite
def frames(draw: st.DrawFn, max_side: int = 300) -> InputTransform:
    """How a square of 16 to 128 pixels lies on a picture of any shape, in SAM1's way or SAM2's."""
    size = Size(draw(st.integers(1, max_side)), draw(st.integers(1, max_side)))
    side = draw(st.sampled_from((16, 64, 96, 128)))
    if not draw(st.booleans()):
        return InputTransform(size, side, Size(side, side), two_step=False)
    scale = side / max(size)
    region = Size(max(1, int(size.width * scale + 0.5)), max(1, int(size.height * scale + 0.5)))
    return InputTransform(size, side, region, two_step=True)


@st.composite
def logits(draw: st.DrawFn, max_side: int = 300) -> Logits:
    """Square logits for a frame: noise, smooth fields, or an island in the negative."""
    frame = draw(frames(max_side))
    rng = np.random.default_rng(draw(seeds))
    length = draw(st.sampled_from((4, 16, 33, 64)))
    values = rng.normal(size=(length, length)) * 8
    kind = draw(st.sampled_from(("noise", "smooth", "island")))
    if kind == "smooth":
        values = cv2.GaussianBlur(values, (0, 0), 3)
    elif kind == "island":
        top, left = rng.integers(0, length, 2)
        island = values[top : top + 3, left : left + 3].copy()
        values = -np.abs(values)
        values[top : top + 3, left : left + 3] = island
    return Logits(values.astype(np.float32), 0.5, frame)


# -- pictures --------------------


def sample(width: int = 67, height: int = 41) -> Image.Image:
    """Four differently coloured quarters and a white corner: every turn and flip of it is another
    picture.
    """
    pixels = np.zeros((height, width, 3), np.uint8)
    half_x, half_y = width * 2 // 5, height // 2
    pixels[:half_y, :half_x], pixels[half_y:, :half_x] = (255, 0, 0), (0, 255, 0)
    pixels[:half_y, half_x:], pixels[half_y:, half_x:] = (0, 0, 255), (200, 200, 50)
    pixels[: height // 5, : width // 8] = 255
    return Image.fromarray(pixels)


def encoded(
    image: Image.Image, kind: str = "PNG", orientation: int | None = None, **options: object
) -> bytes:
    """The bytes of a picture file, by Pillow."""
    out = io.BytesIO()
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    if kind == "WEBP":
        options = {"lossless": True, "exact": True, **options}
    image.save(out, kind, **options)
    return out.getvalue()
