"""Rough masks as files."""

from __future__ import annotations

import cv2
import numpy as np


def mask_bytes(x0: int = 10, x1: int = 50, size: tuple[int, int] = (64, 48)) -> bytes:
    """A PNG with a white rectangle from x0 to x1, for the picture of `conftest.picture_bytes`."""
    pixels = np.zeros(size[::-1], np.uint8)
    pixels[10:40, x0:x1] = 255
    return cv2.imencode(".png", pixels)[1].tobytes()
