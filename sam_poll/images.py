"""Pictures: from a file's bytes to upright 8-bit RGB, at the scale that the network needs.

`headers` has read what the file says about itself and whether it is all there; OpenCV decodes, and the turning is done
here, so that header and pixels cannot disagree. No I/O: bytes come in.

What can still go wrong here: damage inside compressed data that its format cannot notice (a JPEG has no checksums)
gives a picture with a damaged part; libjpeg and libpng then write a line of their own to stderr. Colour profiles are
not applied, as CVAT does not apply them. Importing this module silences OpenCV's own log for the whole process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from sam_poll.errors import PictureError
from sam_poll.headers import DEFAULT_MAX_PIXELS, SAVE_AGAIN, Header, for_decoder, not_decodable, read_header
from sam_poll.types import ModelInfo, Picture, Pixels

__all__ = ["DEFAULT_MAX_PIXELS", "ENDINGS", "Header", "decode", "decode_for", "is_picture", "read_header"]

ENDINGS = frozenset({".jpg", ".jpeg", ".jpe", ".png", ".tif", ".tiff", ".bmp", ".webp"})

# OpenCV 4 and 5 keep it in different places; 0 is silent
(cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel)(0)


def is_picture(name: str) -> bool:
    """Whether a file's name ends like a picture's, in any case (`B.JPG`). Says nothing about its content."""
    return PurePath(name).suffix.lower() in ENDINGS


def decode(
    data: bytes,
    *,
    cover: int | None = None,
    both: bool = True,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    digest: str | None = None,
) -> Picture:
    """Decode a picture: RGB, uint8, h×w×3, upright; the first frame where there are several.

    With `cover`, a JPEG is decoded at the smallest of 1/8, 1/4, 1/2 of its size at which both its sides (`both`; SAM2,
    which squeezes both), or its longest side (SAM1), are still at least `cover` pixels. Transparency is left out.
    `digest` is the data's, where the caller has it already.
    16-bit grey is stretched and equalised as CVAT shows it; other 16-bit pictures keep their upper 8 bits.
    Raises PictureError and UnfinishedError, as `read_header` does, and for damaged and missing data.
    """
    header = read_header(data, max_pixels=max_pixels)
    shrink = _shrink(header, cover, both)
    notes: list[str] = []
    if header.several:
        notes.append(f"the {header.format} holds several pictures; the first was used")
    pixels = _decoded(data, header, shrink, notes)
    expected = tuple(-(-side // shrink) for side in (header.size.height, header.size.width))
    if pixels.shape != (*expected, 3):
        raise PictureError(
            f"the header promises {expected[1]} × {expected[0]} pixels, {pixels.shape[1]} × {pixels.shape[0]} came out",
            remedy=SAVE_AGAIN,
        )
    return Picture(pixels, header.size, digest or digest_of(data), tuple(notes))


def decode_for(
    data: bytes, info: ModelInfo, *, cover: int = 0, max_pixels: int = DEFAULT_MAX_PIXELS, digest: str | None = None
) -> Picture:
    """`decode`, at the scale that this network needs as it runs now; at no smaller one than `cover` asks for."""
    wanted = max(info.side, cover)
    return decode(data, cover=wanted, both=info.family != "sam1", max_pixels=max_pixels, digest=digest)


def digest_of(data: bytes) -> str:
    """What a file's bytes are known by, hex. SHA-256, for which most processors have instructions."""
    return hashlib.sha256(data, usedforsecurity=False).hexdigest()


def _shrink(header: Header, cover: int | None, both: bool) -> int:
    if cover is None or header.format != "JPEG":
        return 1
    side = min(header.stored) if both else max(header.stored)
    return next((shrink for shrink in (8, 4, 2) if -(-side // shrink) >= cover), 1)


# -- decoding ----------------------------------------------------------------------------------------------------------

_COLOUR = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
_TURNS: dict[int, Callable[[Any], Any]] = {  # stored → upright, by EXIF orientation
    2: lambda pixels: cv2.flip(pixels, 1),
    3: lambda pixels: cv2.flip(pixels, -1),
    4: lambda pixels: cv2.flip(pixels, 0),
    5: cv2.transpose,
    6: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE),
    7: lambda pixels: cv2.flip(cv2.transpose(pixels), -1),
    8: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE),
}


def _decoded(data: bytes, header: Header, shrink: int, notes: list[str]) -> Pixels:
    data = for_decoder(data, header)
    if header.mode == "grey" and header.bits == 16 and not header.alpha:
        grey, note = _as_cvat_shows(_opencv(data, cv2.IMREAD_ANYDEPTH))
        notes.append(note)
        pixels = cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
    else:
        pixels = _opencv(data, _COLOUR[shrink])
        cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
    turn = _TURNS.get(header.orientation)
    if turn:
        pixels = turn(pixels)
    return np.asarray(pixels, dtype=np.uint8)


def _opencv(data: bytes, flags: int) -> Any:
    try:
        pixels = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise not_decodable(data, f"the picture cannot be decoded: {error.err or error}") from error
    if pixels is None:
        raise not_decodable(data, "the picture is damaged or of a kind that cannot be decoded")
    return pixels


def _as_cvat_shows(grey: npt.NDArray[Any]) -> tuple[Pixels, str]:
    """16-bit grey → 8 bits as CVAT shows it (its media_extractors.py, `_compress_image`): stretched from the smallest
    to the largest value, then the histogram equalised; so the network sees what the person who clicked saw."""
    from PIL import Image, ImageOps  # seldom needed

    low, high = int(grey.min()), int(grey.max())
    if low == high:
        return np.zeros(grey.shape, dtype=np.uint8), f"16-bit grey, all of one value ({low})"
    table = np.zeros(high + 1, dtype=np.uint8)
    table[low:] = np.arange(high - low + 1) / (high - low) * 255
    shown = np.array(ImageOps.equalize(Image.fromarray(table[grey])))
    return shown, f"16-bit grey from {low} to {high}, stretched and equalised to 8 bits as CVAT shows it"
