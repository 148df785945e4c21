"""Pictures for the browser: JPEGs of a limited size, and thumbnails with their masks.

Limitations: a picture with more pixels than `limits.picture_mpx` is not shown.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from sam_poll.core.errors import PictureError
from sam_poll.core.safe_path import SafePath
from sam_poll.core.types import Box, Mask, ModelInfo, Picture, Result, RgbArray, Size
from sam_poll.formats import overlay
from sam_poll.formats.answer_reader import Answer, AnswerObject
from sam_poll.formats.registry import FormatOptions
from sam_poll.imaging import decode, masks, source_file
from sam_poll.imaging.contours import Contour, rasterize

VIEW_SIDE = 2048
"""Longest side of a picture that is looked at or clicked in, in pixels."""
THUMBNAIL_SIDE = 480
_QUALITY = 85
_CACHE_BYTES = 64 << 20
_AT_ONCE = 2  # pictures that are decoded at a time: each may take a gigabyte


class Pictures:
    """Decodes pictures, a few at a time, and keeps the latest JPEGs. Callable from any thread."""

    def __init__(self, *, max_pixels: int, cache_bytes: int = _CACHE_BYTES) -> None:
        self._max_pixels = max_pixels
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[Any, bytes] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(_AT_ONCE)

    def view(self, path: SafePath, side: int) -> bytes:
        """Return a picture as JPEG with at most `side` pixels a side.

        Raises PictureError, OSError.
        """
        return self._cached(path, side, None, lambda: _jpeg(self._pixels(path, side)))

    def thumbnail(self, path: SafePath, answer: Answer, stamp: object, side: int) -> bytes:
        """Return a picture with an answer's masks drawn on it; `stamp` is the answer's version."""

        def make() -> bytes:
            return _jpeg(drawn(self._pixels(path, side), answer))

        return self._cached(path, side, stamp, make)

    def size(self, path: SafePath) -> Size:
        """Return the size of an upright picture. Raises PictureError."""
        return source_file.header(path).size

    def _pixels(self, path: SafePath, side: int) -> RgbArray:
        data, _ = source_file.read(path)
        picture = decode.decode(data, min_decode_side=side, both=False, max_pixels=self._max_pixels)
        return overlay.scaled_down(picture.pixels, side)

    def _cached(self, path: SafePath, side: int, stamp: object, make: Callable[[], bytes]) -> bytes:
        try:
            status = path.lstat()
        except FileNotFoundError:
            raise PictureError("the picture has moved meanwhile", place=path.name) from None
        key = (str(path), status.st_ino, status.st_size, status.st_mtime_ns, side, stamp)
        with self._lock:
            known = self._cache.get(key)
            if known is not None:
                self._cache.move_to_end(key)
                return known
        with self._places:
            made = make()
        with self._lock:
            if key not in self._cache:
                self._size += len(made)
            self._cache[key] = made
            while self._size > self._cache_bytes and len(self._cache) > 1:
                self._size -= len(self._cache.popitem(last=False)[1])
        return made


def drawn(pixels: RgbArray, answer: Answer) -> RgbArray:
    """Return a picture with an answer's masks drawn as in the format `overlay`, without labels."""
    height, width = pixels.shape[:2]
    full = answer.size or Size(width, height)
    scale = (width / full.width, height / full.height)
    size = Size(width, height)
    found = tuple(_mask(one, scale, size) for one in answer.objects)
    model = ModelInfo("", "", 0, "", "")
    result = Result("", "", size, found, (), model)
    return overlay.draw_shapes(
        result, Picture(pixels, size, ""), FormatOptions(min_area_px=0, tolerance_px=0.5)
    )


def _mask(one: AnswerObject, scale: tuple[float, float], size: Size) -> Mask:
    parts = [
        Contour(polygons[0], polygons[1:], 0, Box(0, 0, 0, 0))
        for polygons in (
            tuple(np.clip(polygon * scale, 0, max(size)) for polygon in part) for part in one.parts
        )
    ]
    score = math.nan if one.score is None else one.score
    return masks.tight(rasterize(parts, size), one.label, score)


def _jpeg(pixels: RgbArray) -> bytes:
    done, body = cv2.imencode(
        ".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _QUALITY]
    )
    if not done:
        raise PictureError("the picture cannot be shown")
    return body.tobytes()
