"""Decode a picture's bytes to upright 8-bit RGB, at the scale that the network needs.

`headers` has read the file's header and checked that the file is complete; OpenCV decodes, and the
pixels are turned upright here, so that header and pixels cannot disagree. Does no I/O.

Limitations: damage inside compressed data that its format cannot detect (a JPEG has no checksums)
gives a picture with a damaged part; libjpeg, libpng and Pillow's libtiff then write a line of their
own to stderr. Colour profiles are not applied, as in CVAT. Importing this module silences OpenCV's
own log for the whole process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import PurePath
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from sam_poll.core.errors import PictureError
from sam_poll.core.types import BoolArray, ModelInfo, Picture, RgbArray
from sam_poll.imaging.damage import SAVE_AGAIN, not_decodable
from sam_poll.imaging.headers import (
    DEFAULT_MAX_PIXELS,
    FORMATS,
    Header,
    for_decoder,
    read_header,
    transparent_grey,
)
from sam_poll.imaging.pillow_decoder import INSTALL_HEIC, decode_by_pillow
from sam_poll.imaging.tiff_samples import read_samples

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "ENDINGS",
    "KNOWN_BUT_NOT_READ",
    "Header",
    "NotRead",
    "decode",
    "decode_for",
    "drawn",
    "is_picture",
    "not_read",
    "read_header",
]

_HEIC_IS_READ = find_spec("pillow_heif") is not None
ENDINGS = frozenset(
    ending
    for kind, endings in FORMATS.items()
    if kind != "HEIC" or _HEIC_IS_READ
    for ending in endings
)
"""File extensions of the pictures that are read in this installation, in lower case."""


class NotRead(NamedTuple):
    """A known kind of picture that is not read: its name with an article, and the remedy."""

    name: str
    remedy: str


_AS_JPEG = "save it as JPEG or PNG"
KNOWN_BUT_NOT_READ: dict[str, NotRead] = {  # by ending, in lower case
    **dict.fromkeys(
        (".jp2", ".j2k", ".jpx"), NotRead("a JPEG 2000", f"{_AS_JPEG}: magick IN.jp2 OUT.png")
    ),
    ".jxl": NotRead("a JPEG XL", f"{_AS_JPEG}: djxl IN.jxl OUT.png"),
    **dict.fromkeys(
        (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
        NotRead("a camera's raw picture", f"{_AS_JPEG} in a raw converter"),
    ),
    **dict.fromkeys((".pbm", ".pgm", ".ppm", ".pnm"), NotRead("a Netpbm picture", _AS_JPEG)),
    ".exr": NotRead("an OpenEXR picture", _AS_JPEG),
    ".dcm": NotRead("a DICOM picture", f"{_AS_JPEG}: dcm2img IN.dcm OUT.png"),
    ".psd": NotRead("a Photoshop document", _AS_JPEG),
    ".svg": NotRead("a vector drawing", _AS_JPEG),
    ".ico": NotRead("an icon", _AS_JPEG),
    ".pdf": NotRead("a PDF", f"{_AS_JPEG}: pdftoppm -png IN.pdf OUT"),
}
if not _HEIC_IS_READ:
    KNOWN_BUT_NOT_READ |= dict.fromkeys(
        FORMATS["HEIC"],
        NotRead("a HEIC photo", f"{INSTALL_HEIC}, or {_AS_JPEG}: heif-convert IN.heic OUT.jpg"),
    )

# OpenCV 4 and 5 have this function in different modules; 0 is silent.
if hasattr(cv2, "setLogLevel"):
    cv2.setLogLevel(0)
else:
    cv2.utils.logging.setLogLevel(0)


def is_picture(name: str) -> bool:
    """Return whether a file name has the extension of a picture, in any case (`B.JPG`).

    The content is not checked.
    """
    return PurePath(name).suffix.lower() in ENDINGS


def not_read(name: str) -> NotRead | None:
    """Return the known, unread kind of picture that a file's extension names; None without one."""
    return KNOWN_BUT_NOT_READ.get(PurePath(name).suffix.lower())


def decode(
    data: bytes,
    *,
    min_decode_side: int | None = None,
    both: bool = True,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    digest: str | None = None,
) -> Picture:
    """Decode a picture: RGB, uint8, h×w×3, upright; of several frames the first.

    With `min_decode_side`, a JPEG is decoded at the smallest of 1/8, 1/4, 1/2 of its size at which
    both its sides (`both`, for SAM2, which scales both), or its longest side (SAM1), still have at
    least `min_decode_side` pixels. Transparency is ignored. `digest` is that of the data, where the
    caller has it already. 16-bit grey is stretched and equalised as CVAT shows it; other 16-bit
    pictures keep their upper 8 bits, or are stretched where these would be nearly black; the notes
    say which. Raises PictureError and IncompleteFileError, as `read_header` does, and for damaged
    or missing data.
    """
    header = read_header(data, max_pixels=max_pixels)
    shrink = _shrink(header, min_decode_side, both)
    notes: list[str] = []
    if header.frames > 1:
        notes.append(f"the {header.format} is animated; first frame of {header.frames} used")
    elif header.several:
        which = "main one" if header.format == "HEIC" else "first"
        notes.append(f"the {header.format} holds several pictures; the {which} was used")
    pixels = _decoded(data, header, shrink, notes)
    expected = tuple(-(-side // shrink) for side in (header.size.height, header.size.width))
    if pixels.shape != (*expected, 3):
        raise PictureError(
            f"the header states {expected[1]} × {expected[0]} pixels, "
            f"but the picture has {pixels.shape[1]} × {pixels.shape[0]}",
            remedy=SAVE_AGAIN,
        )
    return Picture(pixels, header.size, digest or digest_of(data), tuple(notes))


def decode_for(
    data: bytes,
    info: ModelInfo,
    *,
    min_decode_side: int = 0,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    digest: str | None = None,
) -> Picture:
    """Decode a picture at the scale that this network needs at present.

    The scale is not smaller than `min_decode_side` requires.
    """
    return decode(
        data,
        min_decode_side=max(info.side, min_decode_side),
        both=info.stretches,
        max_pixels=max_pixels,
        digest=digest,
    )


def drawn(data: bytes, header: Header) -> BoolArray:
    """Return which pixels of a picture are neither black nor fully transparent: bool, h×w, upright.

    `header` is that of `data`. All bits of all samples count. Raises PictureError and
    IncompleteFileError for damaged or missing data.
    """
    if header.decoder == "opencv":
        samples = _opencv(data, header, cv2.IMREAD_UNCHANGED)
        if samples.shape[:2] != (header.stored.height, header.stored.width):
            raise PictureError(
                "the header states another size than the picture has", remedy=SAVE_AGAIN
            )
    else:
        samples = _unusual(data, header, [])
    if samples.ndim == 2:
        inside = samples != 0
        hidden = transparent_grey(data, header)
        if hidden is not None:
            inside &= samples != hidden
    else:
        inside = samples[:, :, :3].any(axis=2)
        if samples.shape[2] == 4:
            inside &= samples[:, :, 3] != 0
    turn = _TURNS.get(header.orientation)
    if turn:
        inside = turn(inside.view(np.uint8)).view(np.bool_)
    return np.asarray(inside, dtype=np.bool_)


def digest_of(data: bytes) -> str:
    """Return the SHA-256 of a file's bytes, hex; most processors have instructions for it."""
    return hashlib.sha256(data, usedforsecurity=False).hexdigest()


def _shrink(header: Header, min_decode_side: int | None, both: bool) -> int:
    if min_decode_side is None or header.format != "JPEG":
        return 1
    side = min(header.stored) if both else max(header.stored)
    return next((shrink for shrink in (8, 4, 2) if -(-side // shrink) >= min_decode_side), 1)


# -- decoding --------------------

# OpenCV has names for the reduced scales in grey and in BGR only, but takes them in RGB, too.
_COLOUR = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_8,
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


def _decoded(data: bytes, header: Header, shrink: int, notes: list[str]) -> RgbArray:
    if header.decoder == "opencv" and header.bits <= 8:
        if header.format == "TIFF":
            pixels = _by_bgr(data, header, cv2.IMREAD_COLOR)
        else:
            pixels = _opencv(data, header, _COLOUR[shrink])
    else:
        pixels = _eight_bit_rgb(_unusual(data, header, notes), header, notes)
    turn = _TURNS.get(header.orientation)
    if turn:
        pixels = turn(pixels)
    return np.asarray(pixels, dtype=np.uint8)


def _opencv(data: bytes, header: Header, flags: int) -> Any:
    data = for_decoder(data, header)
    try:
        pixels = cv2.imdecode(
            np.frombuffer(data, dtype=np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION
        )
    except cv2.error as error:
        raise not_decodable(
            data, header, f"the picture cannot be decoded: {error.err or error}"
        ) from error
    if pixels is None:
        raise not_decodable(
            data, header, "the picture is damaged or of a kind that cannot be decoded"
        )
    return pixels


def _by_bgr(data: bytes, header: Header, flags: int) -> Any:
    """Decode to RGB by way of BGR.

    Asked for RGB, OpenCV (4.11, 5.0) leaves parts of 16-bit TIFFs uninitialised.
    """
    pixels = _opencv(data, header, flags)
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)


def _unusual(data: bytes, header: Header, notes: list[str]) -> npt.NDArray[Any]:
    """Return the samples of a picture with more than 8 bits, or that OpenCV cannot decode.

    H×W grey or H×W×3 RGB.
    """
    if header.decoder == "samples":
        if header.tiff and (header.tiff.extra > 1 or header.tiff.mode != header.mode):
            shown = "the first three, as red, green and blue"
            if header.mode == "grey":
                shown = "the first"
            notes.append(f"the TIFF has {header.tiff.samples} samples a pixel; shown: {shown}")
        return read_samples(data, header)
    if header.decoder == "pillow":
        image = decode_by_pillow(for_decoder(data, header), header)
        # Pillow's conversion of 16 bits to RGB clips nearly all values.
        plain = image.mode == "RGB" or image.mode.startswith("I;16")
        return np.array(image if plain else image.convert("RGB"))
    if header.mode == "grey" and not header.alpha:
        pixels = _opencv(data, header, cv2.IMREAD_ANYDEPTH)
    else:
        pixels = _by_bgr(data, header, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    if header.bits < 16 and pixels.dtype == np.uint16:
        pixels >>= 16 - header.bits  # OpenCV scales samples of 10, 12 and 14 bits up to 16
    return np.asarray(pixels)


# -- 8 bits --------------------


def _eight_bit_rgb(pixels: npt.NDArray[Any], header: Header, notes: list[str]) -> RgbArray:
    if pixels.ndim == 2:
        if pixels.dtype != np.uint8:
            pixels, note = _as_cvat_shows(pixels, header.bits)
            notes.append(note)
        return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB))
    if pixels.dtype != np.uint8:
        pixels, note = _brightened(pixels, header)
        notes.append(note)
    return pixels


def _brightened(pixels: npt.NDArray[np.uint16], header: Header) -> tuple[RgbArray, str]:
    """Convert colours (or grey with transparency) of more than 8 bits to 8 bits, H×W×3.

    They keep their upper 8 bits, as in CVAT and Pillow; but where the values span less than half of
    the range, as a camera's 12 bits in a file of 16, that would be nearly black. Then all channels
    are stretched alike from the smallest to the largest value, so that colours keep their hue.
    """
    what = f"{header.bits}-bit {'grey' if header.mode == 'grey' else 'colour'}"
    low, high = int(pixels.min()), int(pixels.max())
    if 2 * (high - low) >= 2**header.bits or low == high:
        upper = (pixels >> (header.bits - 8)).astype(np.uint8)
        return upper, f"{what} from {low} to {high}, shown by its upper 8 bits"
    scale = 255 / (high - low)
    shown = cv2.convertScaleAbs(pixels, alpha=scale, beta=-low * scale)
    return np.asarray(shown, dtype=np.uint8), f"{what} from {low} to {high}, stretched to 8 bits"


def _as_cvat_shows(grey: npt.NDArray[Any], bits: int) -> tuple[RgbArray, str]:
    """Convert grey of more than 8 bits to 8 bits as CVAT shows it.

    CVAT (media_extractors.py, `_compress_image`) stretches from the smallest to the largest value,
    then equalises the histogram. The network thus sees what the annotator saw.
    """
    from PIL import Image, ImageOps  # rarely needed

    low, high = int(grey.min()), int(grey.max())
    if low == high:
        return np.zeros(grey.shape, dtype=np.uint8), f"{bits}-bit grey, all of one value ({low})"
    table = np.zeros(high + 1, dtype=np.uint8)
    table[low:] = np.arange(high - low + 1) / (high - low) * 255
    shown = np.array(ImageOps.equalize(Image.fromarray(table[grey])))
    return (
        shown,
        f"{bits}-bit grey from {low} to {high}, stretched and equalised to 8 bits as CVAT shows it",
    )
