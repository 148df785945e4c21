"""Errors for picture files that are truncated, have a hole of zeros, or are damaged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sam_poll.core.errors import IncompleteFileError, PictureError

if TYPE_CHECKING:
    from sam_poll.imaging.headers import Header

COPY_AGAIN = "copy the file again; it was cut off on its way"
SAVE_AGAIN = "open it in a picture editor and save it as JPEG or PNG"
HOLE = bytes(512)  # the smallest block that a file system leaves out


def cut_off(missing: str) -> IncompleteFileError:
    """Return the error for a file that ends too early."""
    return IncompleteFileError(f"the picture is truncated: {missing}", remedy=COPY_AGAIN)


def hole_at(at: int) -> IncompleteFileError:
    """Return the error for a block of zeros.

    Some tools create a copy at its full length first, and fill it afterwards.
    """
    return IncompleteFileError(
        f"a part of the picture is missing: there are zeros from byte {at:,} on", remedy=COPY_AGAIN
    )


def too_many(parts: str) -> PictureError:
    """Return the error for a file whose parts would take too long to walk through."""
    return PictureError(f"the file is made of far too many {parts}", remedy=SAVE_AGAIN)


def damaged(data: bytes, reason: str) -> PictureError:
    """Return the error for a file that a library refused; a hole is the most likely cause."""
    at = data.find(HOLE)
    return hole_at(at) if at >= 0 else PictureError(reason, remedy=SAVE_AGAIN)


def not_decodable(data: bytes, header: Header, reason: str) -> PictureError:
    """Return the error for a file that the decoder refused, with the kind of a TIFF."""
    kind = header.tiff
    if kind:
        what = (
            f"{header.mode}, {kind.samples} samples of {header.bits} bits, "
            f"compression: {kind.compressed}"
        )
        reason = f"{reason} (TIFF: {what})"
    return damaged(data, reason)
