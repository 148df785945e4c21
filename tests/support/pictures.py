"""Pictures of all kinds."""

from __future__ import annotations

import numpy as np
from PIL import Image


def ramp() -> np.ndarray:
    y, x = np.mgrid[:41, :67]
    return np.stack([x * 3, y * 5, (x + y) * 2], -1).astype(np.uint8)


def kinds_of_pictures() -> dict[str, Image.Image]:
    rgb = Image.fromarray(ramp())
    alpha = Image.fromarray(
        np.where(np.arange(67) > 30, 255, 40).astype(np.uint8)[None].repeat(41, 0)
    )
    grey, rgba = rgb.convert("L"), rgb.copy()
    rgba.putalpha(alpha)
    cmyk = Image.fromarray(np.dstack([ramp(), ramp()[..., 0] // 2]), "CMYK")
    return {
        "L": grey, "LA": Image.merge("LA", (grey, alpha)), "RGB": rgb, "RGBA": rgba,
        "P": rgb.quantize(60), "P16": rgb.quantize(12), "1": rgb.convert("1"), "CMYK": cmyk,
        "YCbCr": rgb.convert("YCbCr"),
    }  # fmt: skip
