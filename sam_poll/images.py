"""Pictures: from a file's bytes to upright 8-bit RGB, at the scale that the network needs.

`headers` has read what the file says about itself and whether it is all there; OpenCV decodes, and the turning is done
here, so that header and pixels cannot disagree. No I/O: bytes come in.

What can still go wrong here: damage inside compressed data that its format cannot notice (a JPEG has no checksums)
gives a picture with a damaged part; libjpeg, libpng and Pillow's libtiff then write a line of their own to stderr.
Colour profiles are not applied, as CVAT does not apply them. Importing this module silences OpenCV's own log for the
whole process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import PurePath
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from sam_poll.errors import PictureError
from sam_poll.headers import DEFAULT_MAX_PIXELS, SAVE_AGAIN, Header, for_decoder, not_decodable, read_header
from sam_poll.tiff_samples import decoded_by_pillow, read_samples
from sam_poll.types import ModelInfo, Picture, Pixels

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "ENDINGS",
    "KNOWN_BUT_NOT_READ",
    "Header",
    "NotRead",
    "decode",
    "decode_for",
    "is_picture",
    "not_read",
    "read_header",
]

ENDINGS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".tif", ".tiff", ".bmp", ".webp"})


class NotRead(NamedTuple):
    """A kind of picture that is known and not read: what it is called, and what to do."""

    name: str
    remedy: str


_AS_JPEG = "save it as JPEG or PNG"
KNOWN_BUT_NOT_READ: dict[str, NotRead] = {  # by ending, in lower case
    **dict.fromkeys((".heic", ".heif"), NotRead("a HEIC photo", f"{_AS_JPEG}: heif-convert IN.heic OUT.jpg")),
    ".avif": NotRead("an AVIF", f"{_AS_JPEG}: avifdec IN.avif OUT.png"),
    ".gif": NotRead("a GIF", f"{_AS_JPEG}: magick IN.gif[0] OUT.png"),
    **dict.fromkeys((".jp2", ".j2k", ".jpx"), NotRead("a JPEG 2000", f"{_AS_JPEG}: magick IN.jp2 OUT.png")),
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

# OpenCV 4 and 5 keep it in different places; 0 is silent
(cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel)(0)


def is_picture(name: str) -> bool:
    """Whether a file's name ends like a picture's, in any case (`B.JPG`). Says nothing about its content."""
    return PurePath(name).suffix.lower() in ENDINGS


def not_read(name: str) -> NotRead | None:
    """Look up a file's name among the kinds of pictures that are known and not read, by its ending in any case."""
    return KNOWN_BUT_NOT_READ.get(PurePath(name).suffix.lower())


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
    16-bit grey is stretched and equalised as CVAT shows it; other 16-bit pictures keep their upper 8 bits, or are
    stretched where these would be nearly black. The notes say which.
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
    if header.decoder == "opencv" and header.bits <= 8:
        pixels = _opencv(data, header, _COLOUR[shrink])
        cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
    else:
        pixels = _eight_bit_rgb(_unusual(data, header, notes), header, notes)
    turn = _TURNS.get(header.orientation)
    if turn:
        pixels = turn(pixels)
    return np.asarray(pixels, dtype=np.uint8)


def _opencv(data: bytes, header: Header, flags: int) -> Any:
    data = for_decoder(data, header)
    try:
        pixels = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise not_decodable(data, header, f"the picture cannot be decoded: {error.err or error}") from error
    if pixels is None:
        raise not_decodable(data, header, "the picture is damaged or of a kind that cannot be decoded")
    return pixels


def _unusual(data: bytes, header: Header, notes: list[str]) -> npt.NDArray[Any]:
    """The samples of a picture of more than 8 bits, or that OpenCV cannot decode: H×W grey or H×W×3 RGB."""
    if header.decoder == "samples":
        if header.tiff and (header.tiff.extra > 1 or header.tiff.mode != header.mode):
            shown = "the first" if header.mode == "grey" else "the first three, as red, green and blue"
            notes.append(f"the TIFF has {header.tiff.samples} samples a pixel; shown: {shown}")
        return read_samples(data, header)
    if header.decoder == "pillow":
        image = decoded_by_pillow(for_decoder(data, header), header)
        # what Pillow shows in 16 bits it does not convert to RGB in a way that shows anything
        return np.array(image if image.mode.startswith("I;16") else image.convert("RGB"))
    if header.mode == "grey" and not header.alpha:
        pixels = _opencv(data, header, cv2.IMREAD_ANYDEPTH)
    else:
        pixels = _opencv(data, header, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
        cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
    if header.bits < 16 and pixels.dtype == np.uint16:
        pixels >>= 16 - header.bits  # where OpenCV has put samples of 10, 12 and 14 bits
    return np.asarray(pixels)


# -- 8 bits ------------------------------------------------------------------------------------------------------------


def _eight_bit_rgb(pixels: npt.NDArray[Any], header: Header, notes: list[str]) -> Pixels:
    if pixels.ndim == 2:
        if pixels.dtype != np.uint8:
            pixels, note = _as_cvat_shows(pixels, header.bits)
            notes.append(note)
        return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB))
    if pixels.dtype != np.uint8:
        pixels, note = _brightened(pixels, header)
        notes.append(note)
    return pixels


def _brightened(pixels: npt.NDArray[np.uint16], header: Header) -> tuple[Pixels, str]:
    """Colours (or grey with transparency) of more than 8 bits → 8 bits, H×W×3.

    Their upper 8 bits, as CVAT and Pillow show them; but where their values span less than half of what the depth can
    hold, as a camera's 12 bits in a file of 16, that would be nearly black. Then all channels are stretched alike from
    the smallest to the largest value, so that colours keep their hue.
    """
    what = f"{header.bits}-bit {'grey' if header.mode == 'grey' else 'colour'}"
    low, high = int(pixels.min()), int(pixels.max())
    if 2 * (high - low) >= 2**header.bits or low == high:
        return (pixels >> (header.bits - 8)).astype(np.uint8), f"{what} from {low} to {high}, shown by its upper 8 bits"
    scale = 255 / (high - low)
    shown = cv2.convertScaleAbs(pixels, alpha=scale, beta=-low * scale)
    return np.asarray(shown, dtype=np.uint8), f"{what} from {low} to {high}, stretched to 8 bits"


def _as_cvat_shows(grey: npt.NDArray[Any], bits: int) -> tuple[Pixels, str]:
    """Grey of more than 8 bits → 8 bits as CVAT shows it (its media_extractors.py, `_compress_image`): stretched from
    the smallest to the largest value, then the histogram equalised; so the network sees what the person who clicked
    saw."""
    from PIL import Image, ImageOps  # seldom needed

    low, high = int(grey.min()), int(grey.max())
    if low == high:
        return np.zeros(grey.shape, dtype=np.uint8), f"{bits}-bit grey, all of one value ({low})"
    table = np.zeros(high + 1, dtype=np.uint8)
    table[low:] = np.arange(high - low + 1) / (high - low) * 255
    shown = np.array(ImageOps.equalize(Image.fromarray(table[grey])))
    return shown, f"{bits}-bit grey from {low} to {high}, stretched and equalised to 8 bits as CVAT shows it"
