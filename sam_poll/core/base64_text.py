"""Decode a picture file sent as base64 text, bare or as a data URL (`data:image/png;base64,…`).

The media type in a data URL is not relied upon: the kind is determined from the file's bytes.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

from sam_poll.core.errors import PictureError
from sam_poll.core.validation import quoted

_REMEDY = "send the whole picture file, encoded in base64"
_DATA_URL = "data:image/png;base64,…, or the base64 alone"
# Maximum number of characters before the comma; browsers and libraries write less than 40.
_MAX_HEAD = 256
_WORD = r"[a-z0-9!#$&^_.+-]+"
# RFC 2397: a media type, parameters, and the keyword of the encoding.
_HEAD = re.compile(
    rf"data:({_WORD}/{_WORD})?(;{_WORD}=[^;,]*)*(;base64)?", re.IGNORECASE | re.ASCII
)
_UNKNOWN = "application/octet-stream"  # what browsers send for file extensions they do not know


def picture_file(text: Any, place: str) -> bytes:
    """Return the bytes encoded in `text`.

    Raises PictureError, at `place`, where there are none or `text` is not base64.
    """
    if text is None or text == "":
        raise PictureError("there is no picture", place=place, remedy=_REMEDY)
    if not isinstance(text, str):
        raise PictureError("not a base64 text", place=place, remedy=_REMEDY)
    try:
        data = base64.b64decode("".join(_without_head(text, place).split()), validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: letters that are not ASCII
        raise PictureError(f"not base64: {error}", place=place, remedy=_REMEDY) from None
    if not data:
        raise PictureError("there is no picture", place=place, remedy=_REMEDY)
    return data


def _without_head(text: str, place: str) -> str:
    """Return the part of a data URL after its head; any other text unchanged."""
    text = text.lstrip()
    if text[:5].lower() != "data:":
        return text
    head, comma, _ = text[: _MAX_HEAD + 1].partition(",")
    match = _HEAD.fullmatch(head)
    if not comma or not match:
        raise PictureError(f"not a data URL: {quoted(head)}", place=place, remedy=_DATA_URL)
    media_type, _, in_base64 = match.groups()
    if not in_base64:
        raise PictureError(
            f"a data URL that is not in base64: {quoted(head)}", place=place, remedy=_DATA_URL
        )
    if (
        media_type
        and not media_type.lower().startswith("image/")
        and media_type.lower() != _UNKNOWN
    ):
        raise PictureError(
            f"a data URL of type {quoted(media_type)}, which is not a picture",
            place=place,
            remedy=_DATA_URL,
        )
    return text[len(head) + 1 :]
