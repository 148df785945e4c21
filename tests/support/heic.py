"""HEIC files for tests, by pillow-heif, where it is installed."""

from __future__ import annotations

import io
import os
from importlib.util import find_spec
from typing import Any

import pytest
from PIL import Image

HAS_HEIC = find_spec("pillow_heif") is not None
_REASON = "pillow-heif is not installed: pip install 'sam_poll[heic]'"
needs_heic = pytest.mark.skipif(
    not HAS_HEIC and os.environ.get("CI") != "true",  # CI must have it, so there the test fails
    reason=_REASON,
)


def heic(
    image: Image.Image, orientation: int | None = None, *others: Image.Image, **options: Any
) -> bytes:
    """The bytes of a HEIC of one picture or several; no plugin of Pillow is registered."""
    import pillow_heif

    file = pillow_heif.from_pillow(image)
    for other in others:
        file.add_from_pillow(other)
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif.tobytes()
    out = io.BytesIO()
    file.save(out, **options)
    return out.getvalue()


def as_pillow_heif_shows(data: bytes) -> Image.Image:
    from pillow_heif import HeifImageFile

    return HeifImageFile(io.BytesIO(data)).convert("RGB")
