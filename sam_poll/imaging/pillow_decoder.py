"""Read by Pillow what OpenCV does not: GIF, AVIF, HEIC (with pillow-heif) and some kinds of TIFF.

OpenCV reads AVIFs in some of its builds only, and takes six times as long.
"""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING, Any

from sam_poll.core.errors import PictureError
from sam_poll.imaging.damage import damaged, not_decodable
from sam_poll.imaging.tiff_kinds import PILLOW_ONLY

if TYPE_CHECKING:
    from sam_poll.imaging.headers import Header

INSTALL_HEIC = "pip install 'sam_poll[heic]'"
_OWN_WHEEL = "install Pillow's own wheel (pip install --force-reinstall 'pillow>=12')"
_DAMAGED = "the picture is damaged or of a kind that cannot be decoded"
_ERRORS = (
    ArithmeticError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
)  # what Pillow and pillow-heif raise for damaged files


def open_by_pillow(data: bytes, picture_format: str) -> Any:
    """Open a TIFF, GIF, AVIF or HEIC of any size, without decoding it; returns a PIL image.

    Raises PictureError for damaged data, and where the library for the format is missing.
    """
    plugin = _plugin(picture_format)
    try:
        return plugin(io.BytesIO(data))
    except _ERRORS as error:
        raise damaged(data, _DAMAGED) from error


def decode_by_pillow(data: bytes, header: Header) -> Any:
    """Decode a TIFF, GIF, AVIF or HEIC of any size; returns a PIL image.

    Raises PictureError for damaged data, and for a compression that this build of Pillow lacks.
    """
    plugin = _plugin(header.format)
    try:
        image = plugin(io.BytesIO(data))
        image.load()
    except _ERRORS as error:
        _check_build(header)
        raise not_decodable(data, header, _DAMAGED) from error
    return image


def _plugin(picture_format: str) -> Any:
    """Return a format's plugin: `Image.open` has a pixel limit of its own."""
    from PIL import AvifImagePlugin, GifImagePlugin, TiffImagePlugin  # rarely needed

    if picture_format == "HEIC":
        try:
            from pillow_heif import HeifImageFile
        except ImportError as error:
            raise PictureError(
                "a HEIC photo needs the package pillow-heif",
                remedy=f"{INSTALL_HEIC}, or save it as JPEG: heif-convert IN.heic OUT.jpg",
            ) from error
        return HeifImageFile
    if picture_format == "AVIF":
        if not AvifImagePlugin.SUPPORTED:
            raise PictureError(
                "this build of Pillow cannot read AVIF",
                remedy=f"{_OWN_WHEEL}, or save it as PNG: avifdec IN.avif OUT.png",
            )
        return AvifImagePlugin.AvifImageFile
    if picture_format == "GIF":
        return GifImagePlugin.GifImageFile
    return TiffImagePlugin.TiffImageFile


def _check_build(header: Header) -> None:
    """Raise PictureError if this build of Pillow lacks the file's compression."""
    from PIL import Image

    if header.tiff is None or header.tiff.compression not in PILLOW_ONLY:
        return
    compression = PILLOW_ONLY[header.tiff.compression]
    try:
        Image.new("L", (1, 1)).save(io.BytesIO(), "TIFF", compression=compression)
    except OSError as error:
        raise PictureError(
            f"the TIFF has {header.tiff.compressed} compression, "
            "which this build of Pillow cannot read",
            remedy=f"{_OWN_WHEEL}, or save the picture with deflate compression",
        ) from error
