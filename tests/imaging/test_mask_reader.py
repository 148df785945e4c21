"""Rough masks that are pictures: everything that is drawn is inside, and nothing else."""

from __future__ import annotations

import io
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from PIL import Image

from sam_poll.core.errors import IncompleteFileError, PictureError
from sam_poll.core.types import Box, RunLengths, Size
from sam_poll.imaging import mask_reader
from sam_poll.imaging.mask_reader import read_mask
from sam_poll.prompts import run_lengths
from tests.support.rough_masks import mask_bytes

INSIDE = np.zeros((40, 30), bool)
INSIDE[5:20, 3:12] = INSIDE[30:33, 25:30] = True


def png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def palette() -> bytes:
    image = Image.fromarray((INSIDE * 7).astype(np.uint8), "P")
    image.putpalette([0, 0, 0] * 7 + [0, 1, 0])
    return saved(image)


def on_a_transparent_layer(hidden: int = 200) -> bytes:
    pixels = np.full((*INSIDE.shape, 4), hidden, np.uint8)
    pixels[..., 3] = INSIDE * 128
    return png(pixels)


KINDS: dict[str, Callable[[], bytes]] = {
    "white on black": lambda: png((INSIDE * 255).astype(np.uint8)),
    "the faintest grey": lambda: png(INSIDE.astype(np.uint8)),
    "16 bits": lambda: png(INSIDE.astype(np.uint16)),
    "16 bits, numbered": lambda: png(np.where(INSIDE, np.arange(30) + 1, 0).astype(np.uint16)),
    "one bit": lambda: saved(Image.fromarray(INSIDE)),
    "blue": lambda: png(INSIDE[..., None] * np.array([9, 0, 0], np.uint8)),
    "palette": palette,
    "transparent": on_a_transparent_layer,
    "a transparent grey": lambda: saved(
        Image.fromarray(np.where(INSIDE, 255, 200).astype(np.uint8)), transparency=200
    ),
    "a transparent grey of 16 bits": lambda: saved(
        Image.fromarray(np.where(INSIDE, 513, 512).astype(np.uint16)), transparency=512
    ),
    "BMP": lambda: cv2.imencode(".bmp", INSIDE * np.uint8(255))[1].tobytes(),
    "TIFF": lambda: cv2.imencode(".tif", INSIDE * np.uint8(255))[1].tobytes(),
    "GIF": lambda: saved(Image.fromarray(INSIDE * np.uint8(255)), "GIF"),
}


def bitmap(mask: RunLengths) -> np.ndarray:
    counts = np.array(mask.counts)
    values = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return values.reshape(mask.size.width, mask.size.height).T


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_is_inside_whatever_the_channels_and_bits(kind: str) -> None:
    mask = read_mask(KINDS[kind](), size=Size(30, 40))
    assert (bitmap(mask) == INSIDE).all()


def test_a_mask_is_turned_upright_as_its_picture_is() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(Image.fromarray(INSIDE * np.uint8(255)), exif=exif)
    assert (bitmap(read_mask(data)) == np.rot90(INSIDE, -1)).all()


def test_a_whole_picture_may_be_inside() -> None:
    mask = read_mask(png(np.full((4, 3), 65535, np.uint16)))
    assert mask == RunLengths(Size(3, 4), (0, 12))
    assert run_lengths.bounds(mask) == Box(0, 0, 3, 4)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"no picture", "not a picture"),
        (png(np.zeros((4, 3), np.uint8)), "is empty: all pixels are black"),
        (png(np.zeros((4, 3, 4), np.uint8)), "is empty"),
        (cv2.imencode(".jpg", np.full((4, 3), 255, np.uint8))[1].tobytes(), "is a JPEG"),
        (mask_bytes()[:60] + b"xx" + mask_bytes()[62:], "checksum"),
    ],
    ids=["nothing", "text", "black", "transparent", "jpeg", "damaged"],
)
def test_what_is_no_mask_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(PictureError, match=reason):
        read_mask(data)


def test_a_mask_that_is_cut_off_may_still_be_arriving() -> None:
    with pytest.raises(IncompleteFileError):
        read_mask(mask_bytes()[:-20])


def test_another_size_is_refused_before_anything_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mask_reader.decode, "drawn", None)
    with pytest.raises(PictureError, match="the mask is 64×48, but the picture is 48×64"):
        read_mask(mask_bytes(), size=Size(48, 64))
    with pytest.raises(PictureError, match="more than the limit"):
        read_mask(mask_bytes(), max_pixels=1000)


def test_a_pattern_is_no_rough_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_reader, "MAX_RUNS", 600)
    striped = np.zeros((40, 30), np.uint8)
    striped[::2] = 1
    assert read_mask(png(striped[:20])).size == Size(30, 20)
    with pytest.raises(PictureError, match="is no rough mask"):
        read_mask(png(striped))
