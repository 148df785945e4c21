"""Tests of PIL pictures for the functions: rotated by EXIF, of any mode."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from sam_poll.core.types import Size
from sam_poll.engines.fake import FakeEngine
from sam_poll.integrations.cvat.sdk import common
from sam_poll.pipeline.predictor import Predictor


def stored_picture(orientation: int) -> Image.Image:
    """Return a picture of two colours, 40×20 upright, stored with this EXIF orientation."""
    upright = Image.new("RGB", (40, 20), "blue")
    upright.paste("red", (0, 0, 20, 20))
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    stored.save(buffer, "png", exif=exif)
    return Image.open(io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_picture_is_rotated_as_its_exif_says(orientation: int) -> None:
    pixels = common.picture_of(stored_picture(orientation))
    assert isinstance(pixels, np.ndarray)
    assert pixels.shape == (20, 40, 3)
    assert pixels[10, 5].tolist() == [255, 0, 0]
    assert pixels[10, 35].tolist() == [0, 0, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_a_picture_of_any_mode_can_be_embedded(mode: str) -> None:
    prepared = Predictor(FakeEngine()).embed(common.picture_of(Image.new(mode, (30, 20))))
    assert prepared.size == Size(30, 20)
